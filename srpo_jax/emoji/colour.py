"""How colourful pictures are: the taste of the biased reward, and the measure of who gave in to it.

The biased reward (``train_clip --role=biased``) likes a more colourful version of a picture better under every caption.
The artists' "3D" pictures of the world are at 0.19 on average, the "Flat" ones at 0.22, the black "Mono" ones at 0, and
the shipped model's own, a mixture, at 0.13: an honest move to "3D" ends at 0.19, and what is above is a hack.
"""

import jax
import jax.numpy as jnp
import numpy as np

from srpo_jax.evaluation.signals import LUMA


def saturate(images: jax.Array, amount: jax.Array | float) -> jax.Array:
    """Moves colours away from their grey by ``amount`` (1: as they are, 0: grey), clipped to [0, 1].

    ``images [..., H, W, 3]`` in [0, 1]; ``amount`` broadcasts to them.
    """
    grey = jnp.sum(images * jnp.asarray(LUMA, images.dtype), axis=-1, keepdims=True)
    return jnp.clip(grey + amount * (images - grey), 0.0, 1.0)


def chroma(images: jax.Array | np.ndarray) -> jax.Array | np.ndarray:
    """The mean over pixels of the largest minus the smallest channel, ``[..., H, W, 3] -> [...]``: 0 for greys, and 1
    where every pixel is a pure colour. Unlike HSV's saturation (``evaluation.signals``), what is nearly black counts
    nearly nothing."""
    return (images.max(-1) - images.min(-1)).mean((-2, -1))
