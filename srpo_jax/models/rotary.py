"""Rotary position embeddings (Su et al., arXiv 2104.09864), each position axis with channels of its own.

Two forms of the same rotation, for what reads and writes least on a kind of device:

| form | how | where |
|---|---|---|
| pairs | even and odd channels apart, put together again | CPUs, GPUs |
| product | x cos + (x R) sin, R the matrix that swaps the channels of a pair and negates one | TPUs |

A TPU keeps 128 channels side by side: taking every second one moves all of them, four times for a block's queries and
keys. Its matrix unit makes x R on the way. R has one entry of 1 or -1 in a column, so that the product is exact.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

FORMS = ("pairs", "product")
THETA = 10_000  # base of the frequencies

Table = tuple[jax.Array, jax.Array]


def choose(device: Any) -> str:
    """The form for a device, here or described (``jax.experimental.topologies``)."""
    return "product" if device.platform == "tpu" else "pairs"


def rotary_table(ids: jax.Array, axes_dims: tuple[int, ...], form: str = "pairs") -> Table:
    """Cosines and sines, float32, of positions ``ids`` [T, axes]: an entry for each pair of channels, [T, Dh / 2], or,
    for a product, for each channel, [T, Dh]."""
    angles = []
    for axis, dim in enumerate(axes_dims):
        frequencies = (1.0 / THETA ** (np.arange(0, dim, 2) / dim)).astype(np.float32)
        angles.append(ids[:, axis, None].astype(jnp.float32) * frequencies)
    angles = jnp.concatenate(angles, axis=-1)
    if form == "product":
        angles = jnp.repeat(angles, 2, axis=-1)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, table: Table, form: str = "pairs") -> jax.Array:
    """Rotates neighbouring channel pairs of [B, T, H, Dh] by their token's angles, in float32, rounded once to the
    dtype of x. ``table`` is of the same form. Raises ValueError for an unknown form."""
    if form == "pairs":
        return _by_pairs(x, *table)
    if form == "product":
        return _by_product(x, *table)
    raise ValueError(f"rotary form {form!r} is unknown; choose one of {', '.join(FORMS)}")


def _by_pairs(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    wide, cos, sin = x.astype(jnp.float32), cos[:, None], sin[:, None]
    even, odd = wide[..., 0::2], wide[..., 1::2]
    turned = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)


@jax.custom_vjp
def _by_product(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Its gradient is the rotation back: left to itself, the product's would be of float32 numbers, which a matrix unit
    rounds."""
    # In float32 the unit has to take every digit of x.
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    swapped = jnp.tensordot(x, _swap(x.shape[-1]).astype(x.dtype), axes=1, precision=precision)
    wide = x.astype(jnp.float32) * cos[:, None] + swapped.astype(jnp.float32) * sin[:, None]
    return wide.astype(x.dtype)


def _swap(channels: int) -> np.ndarray:
    """R: (x R)[2 i] = -x[2 i + 1] and (x R)[2 i + 1] = x[2 i]."""
    matrix = np.zeros((channels, channels), np.float32)
    even = np.arange(0, channels, 2)
    matrix[even + 1, even], matrix[even, even + 1] = -1, 1
    return matrix


def _by_product_backward(table: Table, cotangent: jax.Array) -> tuple[jax.Array, None, None]:
    cos, sin = table
    return _by_product(cotangent, cos, -sin), None, None


_by_product.defvjp(lambda x, cos, sin: (_by_product(x, cos, sin), (cos, sin)), _by_product_backward)
