"""An update taken apart: what its parts are called with."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import plans, tiny

from srpo_jax import program, sharding
from srpo_jax.costs import parts, work


@pytest.fixture
def config(tmp_path):
    return tiny.config(tmp_path, optim__accumulation=2, rollout__reuse=2)


def test_parts_ask_for_what_the_update_has(config):
    """Arguments of the parts are one pass of the batch, of rollouts the whole batch, in the program's dtypes and
    places."""
    config.data.batch_size = 8
    built = program.build(config, sharding.make_mesh(config.mesh), plans.ARCHITECTURE)
    found = {part.name: part for part in parts.take_apart(config, built)}
    assert tuple(found) == work.PARTS
    weights, base, batch, noise = found["rollout"].arguments
    assert jax.tree.structure(weights) == jax.tree.structure(built.state.params) and base is None
    assert batch.condition["text"].shape == built.batch.condition["text"].shape and noise.shape == (8, 6, 64)
    assert jax.eval_shape(found["rollout"].function, weights, base, batch, noise).shape == noise.shape
    grads = jax.eval_shape(found["transformer"].function, *found["transformer"].arguments)
    assert jax.tree.map(jnp.shape, grads) == jax.tree.map(jnp.shape, weights)
    config.optim.merge_terms = True
    built = program.build(config, sharding.make_mesh(config.mesh), plans.ARCHITECTURE)
    merged = {part.name: part for part in parts.take_apart(config, built)}
    assert merged["rollout"].arguments[3].shape == noise.shape
    for name in ("transformer", "autoencoder", "reward"):
        jax.eval_shape(merged[name].function, *merged[name].arguments)
        assert merged[name].calls == found[name].calls / 2
        assert jax.tree.leaves(merged[name].arguments[-1])[0].shape[0] == 8


def test_fill_makes_weights_and_inputs():
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def leaf(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    weights = {"a": {"kernel": leaf(3, 40, 50, dtype=jnp.bfloat16), "scale": leaf(7)}}
    made, inputs, ids = parts.fill((weights, leaf(30, 40), leaf(2, dtype=jnp.int32)))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), made) == jax.tree.map(lambda x: (x.shape, x.dtype), weights)
    kernel = np.asarray(made["a"]["kernel"], np.float32)
    assert abs(kernel.mean()) < 1e-3 and kernel.std() == pytest.approx(parts.INIT / math.sqrt(3), rel=0.05)
    assert np.all(np.asarray(made["a"]["scale"]) == 1) and not np.any(ids)
    assert np.std(inputs) == pytest.approx(1 / math.sqrt(3), rel=0.05)
