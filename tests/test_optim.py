"""The optimiser against PyTorch's, and the warm-up."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from srpo_jax import optim
from srpo_jax.config import default


def test_adamw_with_clip_is_torchs():
    """Ten updates of two parameters; gradients above and below the clip."""
    settings = default().optim
    settings.learning_rate, settings.weight_decay = 1e-2, 1e-1
    rng = np.random.default_rng(0)
    start = {"a": rng.normal(size=(3, 4)).astype(np.float32), "b": rng.normal(size=5).astype(np.float32)}
    grads = [
        jax.tree.map(lambda x, s=scale: (s * rng.normal(size=x.shape)).astype(np.float32), start)
        for scale in (1.0, 1e-3) * 5
    ]
    theirs = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in start.items()}
    reference = torch.optim.AdamW(theirs.values(), lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-1)
    optimizer = optim.make_optimizer(settings)
    params, state = start, optimizer.init(start)
    for grad in grads:
        for name, parameter in theirs.items():
            parameter.grad = torch.tensor(grad[name])
        torch.nn.utils.clip_grad_norm_(theirs.values(), settings.clip_norm)
        reference.step()
        updates, state = optimizer.update(grad, state, params, key=jax.random.key(0))
        params = jax.tree.map(jnp.add, params, updates)
    for name, value in params.items():
        assert np.abs(value - start[name]).max() > 1e-2
        np.testing.assert_allclose(value, theirs[name].detach().numpy(), rtol=2e-5, atol=2e-6)


def test_warm_up_rises_from_the_first_update():
    settings = default().optim
    settings.learning_rate, settings.warmup_steps = 8.0, 4
    rate = optim.learning_rate(settings)
    np.testing.assert_allclose([rate(i) for i in range(6)], [2, 4, 6, 8, 8, 8])
    settings.warmup_steps = 1
    assert optim.learning_rate(settings)(0) == 8.0
    settings.warmup_steps = 0
    assert optim.learning_rate(settings)(0) == 8.0


def test_small_updates_of_bfloat16_weights_are_not_lost():
    """A rate of 5e-6 on weights near 1, whose neighbours in bfloat16 are 2**-8 and 2**-7 away."""
    settings = default().optim
    settings.weight_decay = 0.0
    start = np.random.default_rng(0).uniform(0.5, 2.0, 20_000).astype(jnp.bfloat16)
    grad = {"w": jnp.full(start.shape, 1e-4)}

    def train(weights, moments, apply):
        settings.weights, settings.moments = weights, moments
        optimizer = optim.make_optimizer(settings)
        params = {"w": jnp.asarray(start, weights)}

        def body(carry, key):
            params, state = carry
            updates, state = optimizer.update(grad, state, params, key=jax.random.fold_in(key, 0))
            return (apply(params, updates, jax.random.fold_in(key, 1)), state), None

        keys = jax.random.split(jax.random.key(0), 200)
        (params, _), _ = jax.jit(lambda: jax.lax.scan(body, (params, optimizer.init(params)), keys))()
        return float(jnp.mean(params["w"].astype(jnp.float32) - start.astype(np.float32)))

    def to_nearest(params, updates, key):
        del key
        return jax.tree.map(lambda p, u: (p.astype(jnp.float32) + u).astype(p.dtype), params, updates)

    exact = train("float32", "float32", optim.apply_updates)
    np.testing.assert_allclose(exact, -200 * 5e-6, rtol=1e-2)
    assert train("bfloat16", "float32", to_nearest) == 0.0
    # The mean of 20,000 weights, each a random walk of up to 4 steps of 2**-7: its own deviation is 2 % of the way.
    for moments in ("float32", "bfloat16", "float8"):
        np.testing.assert_allclose(train("bfloat16", moments, optim.apply_updates), exact, rtol=0.1)


@pytest.mark.parametrize(("moments", "bound"), [("bfloat16", 0.02), ("float8", 0.18)])
def test_moments_in_fewer_bits_stay_near_adamw(moments, bound):
    """On noisy gradients of many sizes, the way of each weight over 300 updates; bounds are twice what was measured."""
    settings = default().optim
    settings.learning_rate, settings.clip_norm = 1e-3, 1e9
    rng = np.random.default_rng(0)
    size = np.exp2(rng.uniform(-12, 0, (16, 256))).astype(np.float32)
    trend = size * rng.normal(size=size.shape).astype(np.float32)

    def train(moments):
        settings.moments = moments
        optimizer = optim.make_optimizer(settings)
        params = {"w": jnp.zeros(size.shape)}

        def body(carry, key):
            params, state = carry
            noise = jax.random.normal(jax.random.fold_in(key, 0), size.shape)
            grad = {"w": trend + size * noise}
            updates, state = optimizer.update(grad, state, params, key=jax.random.fold_in(key, 1))
            return (optim.apply_updates(params, updates, key), state), None

        keys = jax.random.split(jax.random.key(0), 300)
        return jax.jit(lambda: jax.lax.scan(body, (params, optimizer.init(params)), keys))()[0][0]["w"]

    exact, found = train("float32"), train(moments)
    difference = float(jnp.linalg.norm(found - exact) / jnp.linalg.norm(exact))
    assert 0 < difference < bound
