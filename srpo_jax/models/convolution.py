"""Convolutions of pictures with stride 1, whose gradient a CPU computes as fast inside of a loop as outside.

The gradient of a convolution's input is itself a convolution, with the kernel turned round. JAX asks for it by naming
the kernel's axes in another order; XLA's CPU compiler puts such axes in order at the top of a program, but not in the
body of a loop, where it then takes ten times as long (``docs/performance.md``). Here the kernel is turned, on CPUs: it
is small beside the picture. Other backends have kernels of their own for JAX's form and get that.
"""

import functools

import jax
import jax.numpy as jnp

Padding = tuple[tuple[int, int], tuple[int, int]]  # before and behind, of rows and of columns
_AXES = ("NHWC", "HWIO", "NHWC")


def _plain(x: jax.Array, kernel: jax.Array, padding: Padding) -> jax.Array:
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=_AXES)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def convolve(x: jax.Array, kernel: jax.Array, padding: Padding) -> jax.Array:
    """[B, H, W, I] by a kernel [h, w, I, O] -> [B, H', W', O]; both have one dtype, and so has the result."""
    return _plain(x, kernel, padding)


def _forward(x: jax.Array, kernel: jax.Array, padding: Padding) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _plain(x, kernel, padding), (x, kernel)


def _backward(padding: Padding, kept: tuple[jax.Array, jax.Array], cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = kept

    def turned(cotangent: jax.Array, kernel: jax.Array) -> jax.Array:
        around = tuple(
            (size - 1 - before, size - 1 - behind)
            for size, (before, behind) in zip(kernel.shape[:2], padding, strict=True)
        )
        return _plain(cotangent, jnp.flip(kernel, (0, 1)).swapaxes(2, 3), around)

    def as_jax(cotangent: jax.Array, kernel: jax.Array) -> jax.Array:
        return jax.linear_transpose(lambda x: _plain(x, kernel, padding), x)(cotangent)[0]

    of_kernel = jax.linear_transpose(lambda kernel: _plain(x, kernel, padding), kernel)(cotangent)[0]
    return jax.lax.platform_dependent(cotangent, kernel, cpu=turned, default=as_jax), of_kernel


convolve.defvjp(_forward, _backward)


def general(x: jax.Array, kernel: jax.Array, strides: tuple[int, ...], padding: str, **_: object) -> jax.Array:
    """``convolve`` instead of ``jax.lax.conv_general_dilated``, for an ``nnx.Conv`` without options but its padding."""
    return convolve(x, kernel, tuple(jax.lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], strides, padding)))
