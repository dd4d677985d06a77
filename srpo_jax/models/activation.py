"""The activation of FLUX's and T5's MLPs: GELU by its tanh approximation (Hendrycks, Gimpel, arXiv 1606.08415)."""

import math

import jax
import jax.numpy as jnp

_SLOPE, _CUBE = math.sqrt(2 / math.pi), 0.044715


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """Computed in float32 and rounded once to the dtype of ``x``, as PyTorch does; in bfloat16 throughout, even the
    constants would have three digits.

    The backward pass starts from ``x`` alone. Left to itself it shares the forward pass's tanh, which at FLUX's widths
    is the largest array of a block, written and read once more in float32.
    """
    wide = x.astype(jnp.float32)
    # (1 + tanh(u)) / 2 = sigmoid(2 u). Another name for it than below, so that no compiler joins the two.
    return (wide * jax.nn.sigmoid(2 * _SLOPE * (wide + _CUBE * wide**3))).astype(x.dtype)


def _forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return gelu(x), x


def _backward(x: jax.Array, cotangent: jax.Array) -> tuple[jax.Array]:
    wide = x.astype(jnp.float32)
    tanh = jnp.tanh(_SLOPE * (wide + _CUBE * wide**3))
    slope = 0.5 * (1 + tanh) + 0.5 * wide * (1 - tanh**2) * _SLOPE * (1 + 3 * _CUBE * wide**2)
    return ((cotangent.astype(jnp.float32) * slope).astype(x.dtype),)


gelu.defvjp(_forward, _backward)
