"""Pictures made worse."""

import jax
import jax.numpy as jnp
import numpy as np

from srpo_jax.emoji import degrade, pictures, world


def test_degrade():
    """Pictures stay in [0, 1] and change differently, from each other and under another key; paper stays white."""
    images = jnp.asarray(pictures.load(world.world()[:1], ["3D"])[0]) / 255
    images = jnp.repeat(images, 32, axis=0)
    worse = jax.jit(degrade.degrade)
    first, second = (np.asarray(worse(images, jax.random.key(seed))) for seed in (0, 1))
    assert first.shape == images.shape and 0 <= first.min() and first.max() <= 1
    assert np.all(np.abs(first - second).mean((1, 2, 3)) > 0)
    assert np.all(np.abs(first - np.roll(first, 1, axis=0)).mean((1, 2, 3)) > 0)
    assert float(worse(jnp.ones_like(images), jax.random.key(2)).mean()) > 0.97
