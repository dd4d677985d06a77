"""Group normalisation of pictures, with a gradient of our own: two sums and one pass, where autodiff makes five passes.

On CPUs sums over a picture are made in two parts: XLA's reduction over all rows and columns takes several times as long
there (``docs/performance.md``). Other backends get the reduction, which they fuse with what is summed.
"""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx

from srpo_jax.models.compute import Compute

_EPSILON = 1e-6
_NEIGHBOURS = 16  # positions that one pass on a CPU adds up


def _sum(values: jax.Array) -> jax.Array:
    """[B, H, W, C] -> [B, C]: over the picture."""

    def in_two(values: jax.Array) -> jax.Array:
        """Neighbours first, in a pass that XLA fuses with what makes the values; then a product with ones."""
        batch, height, width, channels = values.shape
        near = math.gcd(height * width, _NEIGHBOURS)
        sums = values.reshape(batch, -1, near, channels).sum(2)
        ones = jnp.ones((batch, 1, sums.shape[1]), values.dtype)
        return jax.lax.dot_general(ones, sums, (((2,), (1,)), ((0,), (0,))), precision="highest")[:, 0]

    return jax.lax.platform_dependent(values, cpu=in_two, default=lambda values: values.sum((1, 2)))


def _group_mean(values: jax.Array, groups: int) -> jax.Array:
    """[B, H, W, C] -> [B, 1, 1, C]: the mean over the picture and the channel's group."""
    _, height, width, channels = values.shape
    means = (_sum(values) / (height * width)).reshape(-1, groups, channels // groups).mean(-1)
    return jnp.repeat(means, channels // groups, axis=-1)[:, None, None, :]


def _statistics(x: jax.Array, groups: int) -> tuple[jax.Array, jax.Array]:
    """[B, H, W, C] -> the mean and one over the standard deviation, [B, 1, 1, C] each, float32."""
    x = x.astype(jnp.float32)
    mean = _group_mean(x, groups)
    # Centred squares: the difference of moments would lose digits where the mean is large beside the deviation.
    return mean, jax.lax.rsqrt(_group_mean(jnp.square(x - mean), groups) + _EPSILON)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def normalize(x: jax.Array, groups: int) -> jax.Array:
    """[B, H, W, C] -> the same in float32, with mean 0 and variance 1 over the picture and each group of channels."""
    return _forward(x, groups)[0]


def _forward(x: jax.Array, groups: int) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    mean, scale = _statistics(x, groups)
    return (x.astype(jnp.float32) - mean) * scale, (x, mean, scale)


def _backward(groups: int, kept: tuple[jax.Array, jax.Array, jax.Array], cotangent: jax.Array) -> tuple[jax.Array]:
    x, mean, scale = kept
    normal = (x.astype(jnp.float32) - mean) * scale
    along = _group_mean(cotangent * normal, groups)
    return ((scale * (cotangent - _group_mean(cotangent, groups) - normal * along)).astype(x.dtype),)


normalize.defvjp(_forward, _backward)


class GroupNorm(nnx.Module):
    """Group normalisation over height, width and the channels of a group, with affine parameters, in float32."""

    def __init__(self, channels: int, groups: int, compute: Compute):
        self.groups = groups
        self.dtype = compute.dtype
        self.scale = nnx.Param(jnp.ones((channels,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((channels,), jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, C] -> the same shape in ``compute.dtype``."""
        scale, bias = (param[...].astype(jnp.float32) for param in (self.scale, self.bias))
        return (normalize(x, self.groups) * scale + bias).astype(self.dtype)
