"""Noise levels, the Euler sampler and packing, against exact formulas and the released recipe's tables."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from srpo_jax.algorithm import flow


@pytest.mark.parametrize(("start", "stop", "count"), [(1, 0, 26), (1, 0, 51), (0.9643, 0.75, 1000), (0.1, 0.25, 100)])
def test_linspace_is_torchs_to_the_bit(start, stop, count):
    start, stop = float(np.float32(start)), float(np.float32(stop))
    np.testing.assert_array_equal(flow.linspace(start, stop, count), torch.linspace(start, stop, count).numpy())


def test_truncated_time_of_the_fifty_step_schedule():
    """Two entries lie just under a whole thousandth in float32: 874 and 249, where exact arithmetic has 875 and 250."""
    thousandths = np.asarray(jax.jit(flow.truncate_time)(flow.shifted_schedule(50, 3.0)) * 1000)
    exact = [3 * i * 1000 // (50 + 2 * i) for i in range(50, -1, -1)]
    differing = {e: round(float(t)) for e, t in zip(exact, thousandths, strict=True) if e != round(float(t))}
    assert differing == {875: 874, 250: 249}


def test_euler_sampling_of_a_straight_flow_ends_at_the_image():
    key = jax.random.key(0)
    x0, noise = jax.random.normal(key, (2, 3, 6, 64))
    out = flow.sample(lambda x, sigma: noise - x0, noise, flow.shifted_schedule(7, 3.0))
    np.testing.assert_allclose(out, x0, atol=1e-5)


def test_stopped_samples_stay_at_their_noise_level():
    x0, noise = jax.random.normal(jax.random.key(0), (2, 3, 6, 64))
    sigmas = flow.shifted_schedule(7, 3.0)
    stop = jnp.array([0, 4, 7])
    out = flow.sample(lambda x, sigma: noise - x0, noise, sigmas, stop)
    np.testing.assert_allclose(out, flow.add_noise(x0, noise, jnp.asarray(sigmas)[stop]), atol=1e-5)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("ab2", 2)])
def test_order_of_a_solver(solver, order):
    """dx/ds = x cos(5 s): twice the steps halve the error, or quarter it, on an uneven schedule."""
    start = jnp.array([[1.0], [-2.0]])
    exact = np.asarray(start) * np.exp(-np.sin(5.0) / 5)
    errors = [
        np.abs(flow.sample(lambda x, s: x * jnp.cos(5 * s), start, flow.shifted_schedule(n, 3.0), None, solver) - exact)
        for n in (32, 64, 128)
    ]
    for coarse, fine in zip(errors[:-1], errors[1:], strict=True):
        np.testing.assert_allclose(np.log2(coarse / fine), order, atol=0.35)


def test_unknown_solver():
    with pytest.raises(ValueError, match="solver='heun'"):
        flow.sample(lambda x, s: x, jnp.ones((1, 2)), flow.shifted_schedule(2, 3.0), None, "heun")


def test_packing_is_that_of_flux_and_inverts():
    latents = np.random.default_rng(0).normal(size=(2, 4, 6, 16)).astype(np.float32)
    nchw = torch.tensor(latents).permute(0, 3, 1, 2)
    expected = nchw.view(2, 16, 2, 2, 3, 2).permute(0, 2, 4, 1, 3, 5).reshape(2, 6, 64).numpy()
    packed = flow.pack(jnp.asarray(latents))
    np.testing.assert_array_equal(packed, expected)
    np.testing.assert_array_equal(flow.unpack(packed, 4, 6), latents)


def test_image_ids_are_row_and_column():
    ids = flow.image_ids(4, 6).reshape(2, 3, 3)
    assert (ids[1, 2] == [0, 1, 2]).all()
    assert flow.image_ids(4, 6).shape == (6, 3)


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize(("steps", "tokens"), [(4, 16), (28, 2025), (50, 4096)])
def test_pipeline_schedule_is_diffusers(steps, tokens, dynamic):
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=dynamic, base_shift=0.5, max_shift=1.15)
    config = dict(scheduler.config)
    mu = calculate_shift(tokens, config["base_image_seq_len"], config["max_image_seq_len"], 0.5, 1.15)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    np.testing.assert_allclose(flow.pipeline_schedule(steps, tokens, config), scheduler.sigmas.numpy(), rtol=3e-7)
