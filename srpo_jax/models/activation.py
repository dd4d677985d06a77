"""Activations (Hendrycks, Gimpel, arXiv 1606.08415): GELU by its tanh approximation, of FLUX's and T5's MLPs, and SiLU,
of the autoencoder. Both are computed in float32 and rounded once to the dtype of the input, as PyTorch does; their
gradients start from the input alone.
"""

import math

import jax
import jax.numpy as jnp

_SLOPE, _CUBE = math.sqrt(2 / math.pi), 0.044715


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """x times the normal distribution's share below x, nearly.

    In bfloat16 throughout, even the constants would have three digits. Left to itself the backward pass shares the
    forward pass's tanh, which at FLUX's widths is the largest array of a block, written and read once more in float32.
    """
    wide = x.astype(jnp.float32)
    # (1 + tanh(u)) / 2 = sigmoid(2 u). Another name for it than below, so that no compiler joins the two.
    return (wide * jax.nn.sigmoid(2 * _SLOPE * (wide + _CUBE * wide**3))).astype(x.dtype)


def _gelu_forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return gelu(x), x


def _gelu_backward(x: jax.Array, cotangent: jax.Array) -> tuple[jax.Array]:
    wide = x.astype(jnp.float32)
    tanh = jnp.tanh(_SLOPE * (wide + _CUBE * wide**3))
    slope = 0.5 * (1 + tanh) + 0.5 * wide * (1 - tanh**2) * _SLOPE * (1 + 3 * _CUBE * wide**2)
    return ((cotangent.astype(jnp.float32) * slope).astype(x.dtype),)


gelu.defvjp(_gelu_forward, _gelu_backward)


@jax.custom_vjp
def silu(x: jax.Array) -> jax.Array:
    """x sigmoid(x).

    Left to itself the backward pass reads the sigmoid that the forward pass wrote, as large as the picture: on a CPU
    that takes longer than to make it again.
    """
    wide = x.astype(jnp.float32)
    return (wide * jax.nn.sigmoid(wide)).astype(x.dtype)


def _silu_forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return silu(x), x


def _silu_backward(x: jax.Array, cotangent: jax.Array) -> tuple[jax.Array]:
    wide = x.astype(jnp.float32)
    sigmoid = jax.nn.sigmoid(wide)
    return ((cotangent.astype(jnp.float32) * sigmoid * (1 + wide * (1 - sigmoid))).astype(x.dtype),)


silu.defvjp(_silu_forward, _silu_backward)
