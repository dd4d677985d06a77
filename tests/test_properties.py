"""What holds of schedules, packing, recovery and indices whatever the numbers, within the ranges that are let in."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from srpo_jax import config, ranges, validation
from srpo_jax.algorithm import direct_align, flow
from srpo_jax.data import filters, stored
from srpo_jax.errors import UserError
from srpo_jax.families.flux import FLUX, Scheduler, pipeline_schedule

few = hypothesis.settings(max_examples=25, deadline=None, derandomize=True, database=None)


def numbers(key, most=None):
    """Of the range of a key of the configuration."""
    found = ranges.of(key)
    least, most = found.least, min(found.most, most or found.most)
    return st.integers(int(least), int(most)) if isinstance(config.standard(key), int) else st.floats(least, most)


@st.composite
def recipes(draw):
    """What ``validation`` lets pass of the keys that make a training grid."""
    made = config.default()
    made.rollout.steps, made.rollout.shift = draw(numbers("rollout.steps", 100)), draw(numbers("rollout.shift"))
    made.align.schedule_steps = steps = draw(st.integers(2, 200))
    first = draw(st.integers(1, steps - 1))
    made.align.train_timestep = first, draw(st.integers(first + 1, steps))
    made.align.length = draw(numbers("align.length", 2000))
    made.align.groundtruth_ratio = draw(numbers("align.groundtruth_ratio"))
    hypothesis.assume(made.rollout.shift)
    try:
        validation.validate(made, paths=False)
    except UserError as error:
        assert any(key in str(error) for key in ("rollout.shift", "align.train_timestep", "late_steps", "passes"))
        hypothesis.reject()
    return made


@few
@hypothesis.given(recipes())
def test_a_recipe_that_is_let_in_has_a_schedule_that_falls(made):
    levels = flow.shifted_schedule(made.rollout.steps, made.rollout.shift)
    assert abs(levels[0] - 1) < 1e-5 and levels[-1] == 0 and (np.diff(levels) < 0).all()


@few
@hypothesis.given(recipes(), st.integers(0, 2**32 - 1))
def test_a_recipe_that_is_let_in_has_steps_within_its_grid(made, seed):
    """Indices, levels and discounts of both branches: nothing outside, nothing divided by 0."""
    align = made.align
    grid = direct_align.training_grid(
        train_timestep=align.train_timestep,
        length=align.length,
        schedule_steps=align.schedule_steps,
        shift=made.rollout.shift,
        groundtruth_ratio=align.groundtruth_ratio,
        discount_positive=(0.0, 1.0),
        discount_negative=(0.0, 1.0),
    )
    mid = direct_align.sample_mid(jax.random.key(seed), 16, grid.length)
    assert (mid >= direct_align.MARGIN).all() and (mid <= grid.length - direct_align.MARGIN).all()
    mid = jnp.concatenate([mid, jnp.array([direct_align.MARGIN, grid.length - direct_align.MARGIN])])
    down, up = direct_align.denoising_step(grid, mid), direct_align.inversion_step(grid, mid)
    assert (down.sigma_from >= down.sigma_to).all() and (up.sigma_from <= up.sigma_to).all()
    for step in (down, up):
        levels = np.stack([step.sigma_from, step.sigma_to])
        assert (levels >= grid.sigmas[-1]).all() and (levels <= grid.sigmas[0]).all() and (levels < 1).all()
        assert ((step.discount >= 0) & (step.discount <= 1)).all()


@few
@hypothesis.given(st.floats(0, 0.999), st.floats(0, 0.999), st.integers(0, 2**31))
def test_an_exact_velocity_recovers_the_picture(sigma_from, sigma_to, seed):
    x0, noise = np.random.default_rng(seed).normal(size=(2, 2, 3, 4)).astype(np.float32)
    levels = jnp.full((2,), sigma_from, jnp.float32), jnp.full((2,), sigma_to, jnp.float32)
    found = direct_align.recover(flow.add_noise(x0, noise, levels[0]), noise - x0, noise, *levels)
    np.testing.assert_allclose(found, x0, atol=4e-6 / (1 - sigma_to))


@few
@hypothesis.given(st.integers(1, 3), st.integers(1, 6), st.integers(1, 6), st.integers(0, 2**31))
def test_packing_is_undone(batch, rows, columns, seed):
    height, width = FLUX.cell * rows, FLUX.cell * columns
    x = np.random.default_rng(seed).normal(size=(batch, *FLUX.latent_shape(height, width)))
    tokens = FLUX.pack(x)
    assert tokens.shape == (batch, *FLUX.token_shape(height, width))
    np.testing.assert_array_equal(FLUX.unpack(tokens, height, width), x)


@few
@hypothesis.given(st.integers(1, 200), st.integers(1, 8192), st.booleans(), st.floats(0.001, 100), st.floats(-2, 2))
def test_the_schedule_of_a_pipeline_falls_from_1_to_0(steps, tokens, dynamic, shift, base):
    scheduler = Scheduler(shift=shift, use_dynamic_shifting=dynamic, base_shift=base)
    levels = pipeline_schedule(steps, tokens, scheduler)
    assert len(levels) == steps + 1 and levels[0] == 1 and levels[-1] == 0 and (np.diff(levels) < 0).all()


@few
@hypothesis.given(st.integers(1, 500), st.integers(1, 50))
def test_shards_hold_every_example_once_in_order(count, size):
    manifest = stored.Manifest(count, size, {}, {}, "", "", "")
    assert [member for shard in range(manifest.shards) for member in manifest.members(shard)] == list(range(count))


@few
@hypothesis.given(
    st.lists(st.text("ab é", max_size=4), min_size=1, max_size=20),
    st.integers(0, 3),
    st.integers(0, 4),
    st.booleans(),
    st.integers(0, 20),
)
def test_a_filter_keeps_places_in_order_and_counts_the_rest(prompts, least, most, unique, sample):
    try:
        places, counts = filters.select(prompts, filters.Filter(least, most, "", "", unique, sample))
    except UserError:
        return
    assert places == sorted(set(places)) and len(places) + sum(counts.values()) == len(prompts)
    kept = [prompts[place] for place in places]
    assert all(len(prompt) >= least and (not most or len(prompt) <= most) for prompt in kept)
    assert not unique or len(set(kept)) == len(kept)
    assert not sample or len(kept) <= sample
