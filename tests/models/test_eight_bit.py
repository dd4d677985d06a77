"""Products of 8-bit numbers: against float32, in a layer and in the whole transformer, and in a rollout."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import tiny

from srpo_jax import architectures, program, sharding
from srpo_jax.algorithm.rollout import in_eight_bits, rollout
from srpo_jax.models import eight_bit
from srpo_jax.models.compute import bind

KINDS = ["int8", "float8"]
# Of a product of normal numbers, what was measured with a half more: half a step of 2 / 127 of 3.4 deviations, twice,
# and of 3 bits of mantissa, twice.
BOUND = {"int8": 0.016, "float8": 0.055}


def of_layer(kernel, layer):
    """One layer of a stack, as a scan hands it out."""
    graphdef, state = nnx.split(kernel)
    return nnx.merge(graphdef, jax.tree.map(lambda x: x[layer], state))


@pytest.mark.parametrize("kind", KINDS)
def test_a_product_is_near_that_of_float32(kind):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 5, 256)).astype(np.float32) * np.exp2(rng.integers(-9, 9, (2, 5, 1)))
    w = rng.normal(size=(3, 256, 2, 48)).astype(np.float32) * np.exp2(rng.integers(-9, 9, (1, 1, 2, 48)))
    kernel = eight_bit.EightBitKernel(jnp.asarray(w), kind)
    assert kernel.codes[...].dtype.itemsize == 1
    for layer in range(3):
        found = of_layer(kernel, layer).product(jnp.asarray(x), jnp.float32)
        exact = np.tensordot(x, w[layer], axes=1)
        # Every token and every feature has its own size: compare each in it.
        size = np.linalg.norm(x, axis=-1)[..., None, None] * np.linalg.norm(w[layer], axis=0) / 16
        assert found.shape == exact.shape
        error = np.sqrt(np.mean(((found - exact) / size) ** 2))
        assert 0 < error < BOUND[kind], error


def test_nothing_stays_nothing():
    kernel = eight_bit.EightBitKernel(jnp.ones((1, 8, 4)), "int8")
    found = of_layer(kernel, 0).product(jnp.zeros((1, 3, 8)), jnp.float32)
    np.testing.assert_array_equal(found, np.zeros((1, 3, 4)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_rollout(kind, models):
    """The latents of two steps, relative to what the steps changed; the modulations' kernels stay as they are."""
    config = tiny.config(models, rollout__dtype=kind)
    built = program.build(config, sharding.make_mesh(config.mesh), architectures.read(config))
    params = program.initial_state(config, built).params
    rng = np.random.default_rng(0)
    batch = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), built.batch)
    noise = jnp.asarray(rng.normal(size=(2, *built.networks.tokens(built.settings))), jnp.float32)

    def roll(config):
        built = program.build(config, sharding.make_mesh(config.mesh), architectures.read(config))
        return jax.jit(functools.partial(rollout, built.networks, built.settings))(params, batch, noise)[0]

    found = roll(config)
    config.rollout.dtype = "model"
    exact = roll(config)
    error = float(jnp.linalg.norm(found - exact) / jnp.linalg.norm(exact - noise))
    assert 0 < error < 3 * BOUND[kind], error

    networks, eight = in_eight_bits(built.networks, params, kind)
    kept = eight["double_blocks"]["img_mod"]["kernel"]
    np.testing.assert_array_equal(kept, params["double_blocks"]["img_mod"]["kernel"])
    assert set(eight["single_blocks"]["mlp_in"]["kernel"]) == {"codes", "scales"}
    assert bind(networks.transformer, eight).config == tiny.FLUX
