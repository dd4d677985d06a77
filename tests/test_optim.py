"""The optimiser against PyTorch's, and the warm-up."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
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
        params, state = optimizer.apply(params, grad, state, jax.random.key(0), optax.tree.norm(grad))
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


def train(settings, start, gradient, updates, weights="float32"):
    """The weights after so many updates; ``gradient(key)`` makes each one's gradient."""
    optimizer, params = optim.make_optimizer(settings), {"w": jnp.asarray(start, weights)}

    def body(carry, key):
        grad = {"w": gradient(key)}
        return optimizer.apply(carry[0], grad, carry[1], key, optax.tree.norm(grad)), None

    keys = jax.random.split(jax.random.key(0), updates)
    (params, _), _ = jax.jit(lambda: jax.lax.scan(body, (params, optimizer.init(params)), keys))()
    return params["w"]


def test_small_updates_of_bfloat16_weights_are_not_lost(monkeypatch):
    """A rate of 5e-6 on weights near 1, whose neighbours in bfloat16 are 2**-8 and 2**-7 away."""
    settings = default().optim
    settings.weight_decay = 0.0
    start = np.random.default_rng(0).uniform(0.5, 2.0, 20_000).astype(jnp.bfloat16)

    def way(weights, moments):
        settings.moments = moments
        end = train(settings, start, lambda key: jnp.full(start.shape, 1e-4), 200, weights)
        return float(jnp.mean(end.astype(jnp.float32) - start.astype(np.float32)))

    exact = way("float32", "float32")
    np.testing.assert_allclose(exact, -200 * 5e-6, rtol=1e-2)
    # The mean of 20,000 weights, each a random walk of up to 4 steps of 2**-7: its own deviation is 2 % of the way.
    for moments in ("float32", "bfloat16", "float8"):
        np.testing.assert_allclose(way("bfloat16", moments), exact, rtol=0.1)
    monkeypatch.setattr(optim.rounding, "stochastic", lambda x, dtype, key: x.astype(dtype))
    assert way("bfloat16", "float32") == 0.0, "what rounding to the nearest loses"


@pytest.mark.parametrize(("moments", "bound"), [("bfloat16", 0.02), ("float8", 0.18)])
def test_moments_in_fewer_bits_stay_near_adamw(moments, bound):
    """On noisy gradients of many sizes, the way of each weight over 300 updates; bounds are twice what was measured."""
    settings = default().optim
    settings.learning_rate, settings.clip_norm = 1e-3, 1e9
    rng = np.random.default_rng(0)
    size = np.exp2(rng.uniform(-12, 0, (16, 256))).astype(np.float32)
    trend = size * rng.normal(size=size.shape).astype(np.float32)

    def gradient(key):
        return trend + size * jax.random.normal(jax.random.fold_in(key, 0), size.shape)

    exact = train(settings, np.zeros_like(size), gradient, 300)
    settings.moments = moments
    found = train(settings, np.zeros_like(size), gradient, 300)
    difference = float(jnp.linalg.norm(found - exact) / jnp.linalg.norm(exact))
    assert 0 < difference < bound


@pytest.mark.parametrize("moments", ["float32", "float8"])
def test_a_large_stack_is_updated_layer_by_layer(monkeypatch, moments):
    """The same numbers as at once, but for the random bits of the rounding."""
    settings = default().optim
    settings.moments, settings.learning_rate = moments, 1e-2
    start = np.random.default_rng(0).normal(size=(4, 8, 256)).astype(np.float32)

    def gradient(key):
        return jax.random.normal(key, start.shape)

    whole = train(settings, start, gradient, 3)
    monkeypatch.setattr(optim, "LARGEST", 1000)
    layers = train(settings, start, gradient, 3)
    assert np.abs(whole - start).max() > 1e-2
    distance = np.linalg.norm(layers - whole) / np.linalg.norm(whole - start)
    assert distance < (1e-6 if moments == "float32" else 0.05)
