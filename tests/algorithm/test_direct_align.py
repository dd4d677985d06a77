"""Direct-Align's indices, levels and recovery on toy velocity fields."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from srpo_jax.algorithm import direct_align, flow

HPS = {
    "train_timestep": (5, 25),
    "length": 1000,
    "schedule_steps": 50,
    "shift": 3.0,
    "groundtruth_ratio": 0.9,
    "discount_positive": (0.1, 0.25),
    "discount_negative": (0.3, 0.01),
}


@pytest.fixture(scope="module")
def grid():
    return direct_align.training_grid(**HPS)


def reference_indices(mid, length, stride_limit):
    """The table of the algorithm in plain integers: (from, to, m) of both branches."""
    k = min(length - mid, stride_limit, mid)
    m = max(mid - k, 1)
    return (length - min(mid + k, length), length - mid, mid), (length - m, length - min(m + k, length), m)


def test_grid_of_the_released_recipes(grid):
    assert grid.stride == 100  # 101 in exact arithmetic
    np.testing.assert_allclose(grid.sigmas[[0, -1]], [0.9643, 0.75], atol=1e-4)
    pickscore = direct_align.training_grid(**HPS | {"train_timestep": (5, 30)})
    np.testing.assert_allclose(pickscore.sigmas[[0, -1]], [0.9643, 2 / 3], atol=1e-4)


@pytest.mark.parametrize("length", [100, 1000])
def test_every_grid_position_has_the_tabled_levels(length):
    grid = direct_align.training_grid(**HPS | {"length": length})
    mids = np.arange(direct_align.MARGIN, length - direct_align.MARGIN + 1)
    denoise = direct_align.denoising_step(grid, jnp.asarray(mids))
    inversion = direct_align.inversion_step(grid, jnp.asarray(mids))
    for i, mid in enumerate(mids):
        (d_from, d_to, d_m), (i_from, i_to, i_m) = reference_indices(int(mid), length, grid.stride)
        assert tuple(x[i] for x in denoise) == (grid.sigmas[d_from], grid.sigmas[d_to], grid.discount_positive[d_m])
        assert tuple(x[i] for x in inversion) == (grid.sigmas[i_from], grid.sigmas[i_to], grid.discount_negative[i_m])


def test_directions_and_common_landing(grid):
    mids = jnp.arange(grid.stride + 1, grid.length - 5)
    denoise, inversion = direct_align.denoising_step(grid, mids), direct_align.inversion_step(grid, mids)
    assert (denoise.sigma_from > denoise.sigma_to).all()
    assert (inversion.sigma_from < inversion.sigma_to).all()
    np.testing.assert_array_equal(denoise.sigma_to, inversion.sigma_to)


def test_mid_covers_both_ends():
    mids = np.asarray(direct_align.sample_mid(jax.random.key(0), 5000, 50))
    assert set(mids) == set(range(5, 46))


@pytest.mark.parametrize("make_step", [direct_align.denoising_step, direct_align.inversion_step])
def test_an_exact_velocity_recovers_the_image(grid, make_step):
    x0, noise = jax.random.normal(jax.random.key(0), (2, 4, 6, 64))
    step = make_step(grid, jnp.array([5, 50, 500, 995]))
    noisy = flow.add_noise(x0, noise, step.sigma_from)
    recovered = direct_align.recover(noisy, noise - x0, noise, step.sigma_from, step.sigma_to)
    np.testing.assert_allclose(recovered, x0, atol=2e-5)


def test_gradient_of_the_recovery_has_opposite_signs_in_the_branches(grid):
    """d recovered / d velocity is (s_to - s_from) / (1 - s_to): negative when denoising, positive when inverting."""
    zeros = jnp.zeros((1, 1, 1))
    for make_step, sign in ((direct_align.denoising_step, -1), (direct_align.inversion_step, 1)):
        step = make_step(grid, jnp.array([500]))

        def recovered(velocity, step=step):
            return direct_align.recover(zeros, velocity, zeros, step.sigma_from, step.sigma_to).sum()

        slope = jax.grad(recovered)(zeros).item()
        expected = (step.sigma_to - step.sigma_from) / (1 - step.sigma_to)
        assert np.sign(slope) == sign
        np.testing.assert_allclose(slope, expected.item(), rtol=1e-6)
