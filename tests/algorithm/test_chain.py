"""Chains of passes in the update of tiny FLUX networks: parts of a batch, precision, what they follow, rollouts cut."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.updates import BATCH, TOKENS, distance, draw, make_batch, make_networks, run_update, settings

from srpo_jax.algorithm import flow, preference, step
from srpo_jax.algorithm.batch import Draws
from srpo_jax.algorithm.methods import METHODS
from srpo_jax.algorithm.settings import Bridge
from srpo_jax.models.compute import Compute


@pytest.fixture(scope="module")
def tiny():
    return make_networks(Compute())


def recipe(**changes):
    made = settings(method="flowbp_bridge", rollout_steps=4, shared_steps=False, bridge=Bridge(3, 1.0, 0.5))
    return dataclasses.replace(made, **changes)


def test_how_a_batch_passes_changes_nothing(tiny):
    """With steps of each sample's own, in one part and in two."""
    batch = make_batch()
    whole, metrics = run_update(tiny, recipe(margin=10.0), batch)
    parted, parted_metrics = run_update(tiny, recipe(margin=10.0, accumulation=2), batch)
    moved, parted_moved = (jax.tree.map(lambda a, b: a - b, made.params, tiny[1]) for made in (whole, parted))
    assert distance(parted_moved, moved) < 1e-4
    still = [jax.tree_util.keystr(p) for p, g in jax.tree_util.tree_leaves_with_path(moved) if not g.any()]
    assert not still and metrics.keys() == parted_metrics.keys()
    of_image = {"image/loss", "image/reward", "image/caption_reward"}
    assert set(metrics) == {"loss", "grad_norm", "skipped", "largest_weight"} | of_image
    for name, value in metrics.items():
        np.testing.assert_allclose(parted_metrics[name], value, rtol=1e-4, atol=1e-6, err_msg=name)


def test_gradients_have_the_dtype_of_sums():
    networks, params, frozen = make_networks(Compute(dtype=jnp.bfloat16))
    draws = draw(networks, recipe())
    images = jax.eval_shape(
        functools.partial(step.images_of, networks, recipe()), params, frozen, make_batch(), draws
    )  # fmt: skip
    grads, _ = jax.eval_shape(
        functools.partial(step.gradient, networks, recipe()), params, frozen, make_batch(), images, draws.own
    )
    assert jax.tree.map(lambda x: x.dtype, grads) == jax.tree.map(lambda x: np.dtype(np.float32), params)
    assert images.states.shape == (BATCH, 3, *TOKENS) and images.sums is None


def test_memory_is_that_of_one_pass(tiny):
    """Of the compiled update's temporaries: five passes take hardly more than two, and less than two at once would."""
    networks, params, frozen = tiny
    taken = {}
    for passes in (2, 5):
        used = recipe(rollout_steps=8, bridge=Bridge(passes, 1.0, 0.5))
        draws = draw(networks, used)
        images = jax.eval_shape(functools.partial(step.images_of, networks, used), params, frozen, make_batch(), draws)
        lowered = jax.jit(functools.partial(step.gradient, networks, used)).lower(
            params, frozen, make_batch(), images, draws.own
        )
        taken[passes] = lowered.compile().memory_analysis().temp_size_in_bytes
    assert taken[5] < 1.02 * taken[2] + 5 * BATCH * np.prod(TOKENS) * 4 * 4


def test_any_method_follows_the_relative_reward():
    """SRPO's, at the recipe's discount; the metrics keep the plain one of the caption beside it."""
    for form, (plus, minus) in (("released", (1.25, -1.0)), ("paper", (0.25, 0.75))):
        found = preference.target("relative", 2, 0.25, form)
        assert {name: value.tolist() for name, value in found.items()} == {
            "positive": [plus] * 2,
            "negative": [minus] * 2,
        }
    assert list(preference.target("caption", 2, 0.25, "released")) == ["caption"]


@pytest.mark.parametrize("method", ["draft_k", "refl"])
def test_the_relative_reward_reaches_the_loss(tiny, method):
    networks, params, frozen = tiny
    batch, used = make_batch(), settings(method=method, rollout_steps=2, target="relative", discount=0.25, margin=10.0)
    draws = draw(networks, used)

    @jax.jit
    def run(params):
        images = step.images_of(networks, used, params, frozen, batch, draws)
        metrics = step.gradient(networks, used, params, frozen, batch, images, draws.own)[1]
        terms = METHODS[method].terms(used, images, draws.own)
        return metrics, terms

    metrics, terms = run(params)
    assert set(terms.coefficients) == {"positive", "negative"}
    np.testing.assert_allclose(metrics["loss"], 10.0 - metrics["reward"], rtol=1e-5)
    assert abs(metrics["reward"] - metrics["caption_reward"]).max() > 1e-3


# --- rollouts ---------------------------------------------------------------------------------------------------------


def test_sums_of_velocities():
    """Weighted by step; the whole way is the sum that the lengths of all steps give."""
    noise, sigmas = jax.random.normal(jax.random.key(0), (3, 5)), flow.shifted_schedule(6, 3.0)
    weigh = jnp.stack([jnp.diff(jnp.asarray(sigmas)), jnp.eye(6)[2]]) * jnp.array([1.0, 2.0, 0.0])[:, None, None]

    def field(x, sigma, index, memory):
        return jnp.sin(3 * x) + sigma, memory

    last, kept, sums = flow.sample(field, noise, sigmas, jnp.array([[2]] * 3), weigh=weigh)
    np.testing.assert_allclose(sums[0, 0], (last - noise)[0], atol=1e-6)
    np.testing.assert_allclose(sums[1, 0], 2 * (last - noise)[1], atol=1e-5)
    np.testing.assert_allclose(sums[1, 1], 2 * (jnp.sin(3 * kept[1, 0]) + sigmas[2]), atol=1e-5)
    assert not sums[2].any()


@pytest.mark.parametrize("solver", ["euler", "ab2"])
def test_a_rollout_ends_where_it_is_told_to(solver):
    noise, sigmas = jax.random.normal(jax.random.key(0), (3, 5)), flow.shifted_schedule(6, 3.0)

    def field(x, sigma, index, memory):
        return jnp.sin(3 * x) + sigma, memory + 1

    keep = jnp.array([[0, 4]] * 3)
    whole, states, _ = flow.sample(field, noise, sigmas, keep, solver, jnp.int32(0))
    last, kept, _ = jax.jit(lambda stop: flow.sample(field, noise, sigmas, keep, solver, jnp.int32(0), stop=stop))(4)
    np.testing.assert_allclose(kept, states, atol=1e-6)
    np.testing.assert_allclose(last, states[:, 1], atol=1e-6)
    assert np.abs(last - whole).max() > 0.1


def test_refl_rolls_out_as_far_as_its_step(tiny):
    networks, params, frozen = tiny
    used, batch = settings(method="refl", rollout_steps=4), make_batch()
    made = jax.jit(functools.partial(step.images_of, networks, used))
    images = made(params, frozen, batch, Draws(draw(networks, used).noise, jnp.full(BATCH, 2)))
    np.testing.assert_allclose(images.latents, images.states[:, 0], atol=1e-6)
