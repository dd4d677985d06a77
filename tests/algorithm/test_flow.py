"""Noise levels, the Euler sampler and packing, against exact formulas and the released recipe's tables."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from srpo_jax.algorithm import flow


def field(velocity):
    """A velocity that remembers nothing, as a sampler calls it."""
    return lambda x, sigma, index, memory: (velocity(x, sigma), memory)


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
    out = flow.sample(field(lambda x, sigma: noise - x0), noise, flow.shifted_schedule(7, 3.0))
    np.testing.assert_allclose(out, x0, atol=1e-5)


def test_states_are_kept_at_the_start_of_their_steps():
    sigmas = flow.shifted_schedule(7, 3.0)
    x0, noise = (jax.random.normal(jax.random.key(i), (3, 2, 4)) for i in (0, 1))
    keep = jnp.array([[0, 6], [3, 3], [5, 1]])
    last, kept, _ = flow.sample(field(lambda x, sigma: noise - x0), noise, sigmas, keep)
    np.testing.assert_allclose(last, x0, atol=1e-5)
    for place in (0, 1):
        expected = flow.add_noise(x0, noise, jnp.asarray(sigmas)[keep[:, place]])
        np.testing.assert_allclose(kept[:, place], expected, atol=1e-5)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("ab2", 2)])
def test_order_of_a_solver(solver, order):
    """dx/ds = x cos(5 s): twice the steps halve the error, or quarter it, on an uneven schedule."""
    start = jnp.array([[1.0], [-2.0]])
    exact = np.asarray(start) * np.exp(-np.sin(5.0) / 5)
    slope = field(lambda x, s: x * jnp.cos(5 * s))
    ends = [flow.sample(slope, start, flow.shifted_schedule(n, 3.0), None, solver) for n in (32, 64, 128)]
    errors = [np.abs(end - exact) for end in ends]
    for coarse, fine in zip(errors[:-1], errors[1:], strict=True):
        np.testing.assert_allclose(np.log2(coarse / fine), order, atol=0.35)


def test_unknown_solver():
    with pytest.raises(ValueError, match="solver='heun'"):
        flow.sample(field(lambda x, s: x), jnp.ones((1, 2)), flow.shifted_schedule(2, 3.0), None, "heun")
