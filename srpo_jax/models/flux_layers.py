"""What FLUX's blocks are made of: linear layers, embedders, norms, sinusoids of time and guidance.

Widths in comments as in ``flux``: B batch, T tokens, D model width, H heads of width Dh.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from srpo_jax.models.activation import gelu
from srpo_jax.models.compute import Compute, keep
from srpo_jax.models.eight_bit import EightBitKernel

TIME_CHANNELS = 256  # of the sinusoids of time and guidance
TIME_FACTOR = 1000.0  # the network was trained with times and guidances in thousandths
THETA = 10_000  # base of their frequencies
EPSILON = 1e-6  # of every norm
MLP_RATIO = 4


# --- sums over tokens -------------------------------------------------------------------------------------------------
# What every token is added to or scaled with gets a gradient that is summed over all of them. Left to itself it is
# summed in the tokens' dtype, on GPUs in bfloat16, where thousands of tokens leave two digits. These sum in float32,
# as PyTorch does; forward, and to the tokens, they are the plain formula.


@jax.custom_vjp
def add_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
    """x [..., *features] plus a bias [*features], in the dtype of x."""
    return x + bias.astype(x.dtype)


def _add_bias_backward(bias: jax.Array, cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
    axes = tuple(range(cotangent.ndim - bias.ndim))
    return cotangent, jnp.sum(cotangent, axes, dtype=_wide(cotangent)).astype(bias.dtype)


add_bias.defvjp(lambda x, bias: (add_bias(x, bias), bias), _add_bias_backward)


@jax.custom_vjp
def add_gated(x: jax.Array, gate: jax.Array, change: jax.Array) -> jax.Array:
    """Tokens x [B, T, D] plus a change of them, scaled by a gate [B, 1, D]; all of one dtype."""
    return x + gate * change


def _add_gated_backward(
    kept: tuple[jax.Array, jax.Array], cotangent: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    gate, change = kept
    product = cotangent.astype(_wide(cotangent)) * change.astype(_wide(change))
    return cotangent, product.sum(axis=1, keepdims=True).astype(gate.dtype), cotangent * gate


add_gated.defvjp(lambda x, gate, change: (add_gated(x, gate, change), (gate, change)), _add_gated_backward)


def _wide(x: jax.Array) -> jnp.dtype:
    return jnp.promote_types(x.dtype, jnp.float32)


# --- layers -----------------------------------------------------------------------------------------------------------


class Linear(nnx.Module):
    """y = x W + b, where the output may have several axes: [..., features_in] -> [..., *features_out]."""

    def __init__(self, features_in: int, features_out: int | tuple[int, ...], compute: Compute, *, rngs: nnx.Rngs):
        shape = features_out if isinstance(features_out, tuple) else (features_out,)
        limit = features_in**-0.5
        kernel = jax.random.uniform(rngs.params(), (features_in, *shape), compute.param_dtype, -limit, limit)
        self.kernel = nnx.Param(kernel)
        self.bias = nnx.Param(jnp.zeros(shape, compute.param_dtype))
        self.dtype = compute.dtype

    def __call__(self, *parts: jax.Array) -> jax.Array:
        """Of several arrays, y is that of all their features side by side. Those of tokens may lie in heads: [B, D],
        [B, T, D] or [B, T, H, Dh]."""
        if isinstance(self.kernel, EightBitKernel):
            # A token has one scale for all of its features.
            flat = [x.reshape(*x.shape[:2], -1) if x.ndim > 3 else x for x in parts]
            y = self.kernel.product(jnp.concatenate(flat, axis=-1), self.dtype)
        else:
            y = product_of_parts([x.astype(self.dtype) for x in parts], self.kernel[...].astype(self.dtype))
        return add_bias(y, self.bias[...])


def product_of_parts(parts: Sequence[jax.Array], kernel: jax.Array) -> jax.Array:
    """The product of arrays as ``Linear`` takes them, side by side, with a kernel [in, *features_out].

    A product for each, of its rows of the kernel: side by side they would be written and read once more. A sum over
    heads and their channels likewise leaves them where attention wrote them.
    """
    sums, start = [], 0
    for x in parts:
        features = x.shape[min(x.ndim - 1, 2) :]
        rows = kernel[start : start + math.prod(features)].reshape(*features, *kernel.shape[1:])
        sums.append(jnp.tensordot(x, rows, axes=len(features)))
        start += math.prod(features)
    return sum(sums[1:], start=sums[0])


class Embedder(nnx.Module):
    """Two layers with SiLU between them, from a conditioning vector to the model's width."""

    def __init__(self, features_in: int, width: int, compute: Compute, *, rngs: nnx.Rngs):
        self.in_layer = Linear(features_in, width, compute, rngs=rngs)
        self.out_layer = Linear(width, width, compute, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.out_layer(jax.nn.silu(self.in_layer(x)))


class Mlp(nnx.Module):
    """Two layers with tanh-approximated GELU between them."""

    def __init__(self, width: int, compute: Compute, *, rngs: nnx.Rngs):
        self.in_layer = Linear(width, MLP_RATIO * width, compute, rngs=rngs)
        self.out_layer = Linear(MLP_RATIO * width, width, compute, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return keep(self.out_layer(gelu(keep(self.in_layer(x), "mlp"))), "out")


class HeadNorm(nnx.Module):
    """RMSNorm of queries or keys over the channels of each head, computed in float32: [B, T, H, Dh] -> the same in
    ``compute.dtype``, to which the reference rounds them too before it rotates."""

    def __init__(self, head_dim: int, compute: Compute):
        self.scale = nnx.Param(jnp.ones((head_dim,), compute.param_dtype))
        self.dtype = compute.dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + EPSILON)
        return (x * self.scale[...].astype(jnp.float32)).astype(self.dtype)


def sinusoid(values: jax.Array) -> jax.Array:
    """[B] -> [B, 256] float32: cosines, then sines, of 1000 * value at geometric frequencies from 1 down to 1/10000."""
    half = TIME_CHANNELS // 2
    # Angles reach 3,500, so that a last bit of a frequency shows: round as the reference does, the exponent to float32.
    exponents = np.float32(-math.log(THETA)) * np.arange(half, dtype=np.float32) / half
    frequencies = np.exp(exponents.astype(np.float64)).astype(np.float32)
    angles = TIME_FACTOR * values.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def parts_of(qkv: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """[B, T, 3, H, Dh] -> three times [B, T, H, Dh].

    Slices, whose gradients are written side by side, as the weights' gradient reads them. Those of a moved axis lie
    apart, and are transposed first.
    """
    return qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]


def modulate(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    """Adaptive layer norm: normalises each token [B, T, D] in float32, then scales and shifts by [B, 1, D]."""
    dtype = x.dtype
    x = x.astype(jnp.float32)
    x = x - x.mean(axis=-1, keepdims=True)
    x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + EPSILON)
    return (x * (1 + scale.astype(jnp.float32)) + shift.astype(jnp.float32)).astype(dtype)
