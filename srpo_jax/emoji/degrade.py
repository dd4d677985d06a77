"""Pictures made worse in the ways in which generated ones are worse than drawn ones."""

import functools

import jax
import jax.numpy as jnp

from srpo_jax.emoji.pictures import SIZE


def _blur(images: jax.Array) -> jax.Array:
    """Binomial filter of 5x5 (standard deviation 1 pixel) over white surroundings; [B, H, W, 3]."""
    weights = (1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16)
    for axis in (1, 2):
        padding = [(2, 2) if a == axis else (0, 0) for a in range(4)]
        padded = jnp.pad(images, padding, constant_values=1.0)
        size = images.shape[axis]
        images = sum(w * jax.lax.slice_in_dim(padded, i, i + size, axis=axis) for i, w in enumerate(weights))
    return images


def degrade(images: jax.Array, key: jax.Array) -> jax.Array:
    """Shifts, blurs or sharpens, tints and adds noise, each picture in its own measure.

    [B, 64, 64, 3] in [0, 1], in and out. The noise has a fine part and a coarse one, blobs of 8 pixels as errors in
    latents make.
    """
    batch = images.shape[0]
    keys = jax.random.split(key, 8)
    shift = jax.random.randint(keys[0], (batch, 2), 0, 3)  # by one pixel at most: all drawings are centred
    padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=1.0)
    cut = functools.partial(jax.lax.dynamic_slice, slice_sizes=(SIZE, SIZE, 3))
    images = jax.vmap(lambda x, s: cut(x, (s[0], s[1], 0)))(padded, shift)

    def amount(key: jax.Array, low: float, high: float, often: float, shape: tuple[int, ...] = (1, 1, 1)) -> jax.Array:
        draw, switch = jax.random.split(key)
        on = jax.random.bernoulli(switch, often, (batch, 1, 1, 1))
        return on * jax.random.uniform(draw, (batch, *shape), minval=low, maxval=high)

    images = images + amount(keys[1], -0.3, 1.0, 0.6) * (_blur(images) - images)
    # White paper stays white mostly: contrast turns around 1, tints are small.
    images = 1 + (images - 1) * (1 + amount(keys[2], -0.2, 0.15, 0.6)) + amount(keys[3], -0.05, 0.05, 0.5, (1, 1, 3))
    images = images + amount(keys[4], 0.0, 0.06, 0.5) * jax.random.normal(keys[5], images.shape)
    blobs = jax.random.normal(keys[6], (batch, SIZE // 8, SIZE // 8, 3))
    blobs = jax.image.resize(blobs, images.shape, "linear")
    return jnp.clip(images + amount(keys[7], 0.0, 0.06, 0.4) * blobs, 0.0, 1.0)
