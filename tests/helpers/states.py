"""A training state of two arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from srpo_jax.algorithm.step import TrainState


def make_state(step, ema=True, dtype=jnp.float32):
    params = {"block": {"kernel": jnp.arange(6.0, dtype=dtype).reshape(2, 3) * (1 + step)}, "bias": jnp.ones(3, dtype)}
    optimizer = optax.adamw(1e-3)
    _, opt_state = optimizer.update(params, optimizer.init(params), params)
    average = jax.tree.map(lambda x: x / 3, params) if ema else None
    return TrainState(jax.device_put(np.int32(step)), params, opt_state, average)


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
