"""Numbers kept in few bits: unbiased rounding, and 8-bit floats that share a scale by blocks.

Rounding to the nearest loses what is smaller than half a step of the format: a weight of 1 in bfloat16 never moves by
updates of 5e-6. Stochastic rounding goes up with the probability of the remainder, so that the mean moves as it should
(Gupta et al., arXiv 1502.02551).
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

BLOCK = 128  # numbers that share a scale, along the last axis
LOWEST_EXPONENT = -100  # smaller numbers are rounded as if they were of this binade, which float32 still divides by


def stochastic(x: jax.Array, dtype: jnp.dtype, key: jax.Array) -> jax.Array:
    """Rounds float32 to one of the two neighbours in a smaller float type, whose mean over keys is ``x``.

    Every number has its own random bits, which depend on its place in the whole array and not on how that is sharded.
    What is beyond the largest finite number of ``dtype`` becomes that number; NaN stays.
    """
    info = jnp.finfo(dtype)
    exponent = (jax.lax.bitcast_convert_type(x, jnp.int32) >> 23 & 0xFF) - 127
    exponent = jnp.maximum(exponent, max(int(info.minexp), LOWEST_EXPONENT))
    # The distance of neighbours in that binade, a power of two made from its bits.
    step = jax.lax.bitcast_convert_type((exponent - info.nmant + 127) << 23, jnp.float32)
    largest = float(info.max)
    rounded = jnp.floor(x / step + jax.random.uniform(key, x.shape)) * step
    return jnp.clip(rounded, -largest, largest).astype(dtype)


class Scaled(NamedTuple):
    """Numbers ``[..., n]`` as ``values * scale``: 8-bit floats, and a power of two ``[..., n / block]``, float32."""

    values: jax.Array
    scale: jax.Array


def block(size: int) -> int:
    """How many neighbours of an axis of this size share a scale: the largest divisor that ``BLOCK`` has in common."""
    return math.gcd(size, BLOCK)


def scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the scales of an array."""
    return (*shape[:-1], shape[-1] // block(shape[-1]))


def scaled(x: jax.Array, dtype: jnp.dtype, key: jax.Array, floor: bool = False) -> Scaled:
    """Rounds float32 ``[..., n]`` stochastically to 8-bit floats that share scales by blocks.

    Scales are powers of two: where a block's scale stays, a number that is one of the format stays what it is, and
    averages that are stored again and again do not walk.

    Args:
      x: numbers; with ``floor``, none is negative.
      dtype: an 8-bit float type.
      key: for the rounding.
      floor: whether a positive number becomes the smallest of the format rather than zero, so that it can divide.
    """
    width = block(x.shape[-1])
    blocks = x.reshape(*x.shape[:-1], x.shape[-1] // width, width)
    info = jnp.finfo(dtype)
    largest = jnp.abs(blocks).max(-1) / float(info.max)
    _, exponent = jnp.frexp(largest)  # largest <= 2**exponent
    scale = jnp.where(largest > 0, jnp.ldexp(jnp.float32(1), jnp.maximum(exponent, LOWEST_EXPONENT)), 1.0)
    values = stochastic(blocks / scale[..., None], dtype, key)
    if floor:
        values = jnp.where((blocks > 0) & (values == 0), info.smallest_subnormal.astype(dtype), values)
    return Scaled(values.reshape(x.shape), scale)


def unscaled(x: Scaled) -> jax.Array:
    """The numbers, float32."""
    width = x.values.shape[-1] // x.scale.shape[-1]
    blocks = x.values.astype(jnp.float32).reshape(*x.scale.shape, width)
    return (blocks * x.scale[..., None]).reshape(x.values.shape)
