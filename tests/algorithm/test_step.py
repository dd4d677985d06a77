"""The update on tiny random networks: accumulation, batching, every method, precision."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.updates import (
    BATCH,
    FLUX,
    TEXT,
    TOKENS,
    assert_same_rollouts,
    distance,
    draw,
    gradient,
    images_of,
    make_batch,
    make_networks,
    make_terms,
    rolled_out_gradient,
    run_update,
    settings,
    sgd,
)

from srpo_jax.algorithm import direct_align, flow, step
from srpo_jax.algorithm import networks as networks_lib
from srpo_jax.algorithm.batch import Images, Rollout, join_batch, split_batch
from srpo_jax.algorithm.methods import METHODS
from srpo_jax.algorithm.preference import prepare
from srpo_jax.algorithm.rollout import for_rollout, rollout
from srpo_jax.families.flux import FLUX as FAMILY
from srpo_jax.families.flux import image_ids, text_ids
from srpo_jax.models import block_cache
from srpo_jax.models.compute import Compute, bind, path_name


@pytest.fixture(scope="module")
def tiny():
    return make_networks(Compute())


@pytest.fixture(scope="module")
def batch():
    return make_batch()


def test_the_batch_gradient_is_the_mean_over_samples(tiny, batch):
    recipe = settings()
    draws = draw(tiny[0], recipe)
    whole, metrics = gradient(tiny, recipe, batch, draws)
    one = rolled_out_gradient(tiny[0], recipe)
    singles = [one(tiny[1], tiny[2], *jax.tree.map(lambda x, i=i: x[i : i + 1], (batch, draws))) for i in range(BATCH)]
    mean = jax.tree.map(lambda *g: sum(g) / BATCH, *[g for g, _ in singles])
    assert distance(whole, mean) < 1e-5
    np.testing.assert_allclose(metrics["reward"], np.mean([m["reward"] for _, m in singles], axis=0), rtol=1e-4)


@pytest.mark.parametrize("method", ["srpo", "draft_lv", "refl", "offline srpo"])
def test_how_a_batch_passes_changes_nothing(tiny, batch, method):
    """In parts, its terms merged or in turn: the order of sums is all that differs."""
    if method.startswith("offline"):
        batch = batch._replace(latents=jax.random.normal(jax.random.key(5), (BATCH, *TOKENS)))
        method = "srpo"
    whole, metrics = run_update(tiny, settings(method=method), batch)
    moved = jax.tree.map(lambda a, b: a - b, whole.params, tiny[1])
    for changes in ({"accumulation": 4}, {"accumulation": 2, "merge_terms": True}):
        parted, parted_metrics = run_update(tiny, settings(method=method, **changes), batch)
        parted_moved = jax.tree.map(lambda a, b: a - b, parted.params, tiny[1])
        assert distance(parted_moved, moved) < 1e-4
        assert metrics.keys() == parted_metrics.keys()
        for name, value in metrics.items():
            np.testing.assert_allclose(parted_metrics[name], value, rtol=1e-4, atol=1e-6, err_msg=name)


def test_weights_are_cast_before_they_are_used_many_times(batch):
    """Kernels and biases; the norms' scales stay float32. Gradients come back in the dtype of the masters."""
    made = make_networks(Compute(dtype=jnp.bfloat16))
    _, params, frozen = made
    for path, leaf in jax.tree_util.tree_leaves_with_path(networks_lib.in_compute_dtype(made[0], params)):
        assert leaf.dtype == (jnp.float32 if path[-1].key == "scale" else jnp.bfloat16), path
    for merge in (False, True):
        recipe = settings(merge_terms=merge)
        draws = draw(made[0], recipe)
        given = params, frozen, batch, Images(draws.noise, draws.noise), draws.own
        grads, _ = jax.eval_shape(functools.partial(step.gradient, made[0], recipe), *given)
        assert jax.tree.map(lambda x: x.dtype, grads) == jax.tree.map(lambda x: x.dtype, params)


def test_split_batch_takes_every_nth_sample():
    parts = split_batch(jnp.arange(6), 2)
    np.testing.assert_array_equal(parts, [[0, 2, 4], [1, 3, 5]])


def test_noise_is_shared_or_per_sample(tiny):
    shared = draw(tiny[0], settings(shared_noise=True)).noise
    own = draw(tiny[0], settings()).noise
    assert (shared == shared[:1]).all()
    assert not (own == own[:1]).all(axis=(1, 2))[1:].any()


def test_keys_give_other_numbers(tiny):
    first, other = (draw(tiny[0], settings(), seed) for seed in (0, 1))
    assert not (first.noise == other.noise).any() and not (first.own == other.own).all()


@pytest.mark.parametrize("method", ["srpo", "direct_align", "refl", "draft_lv"])
def test_every_method_moves_every_parameter_and_raises_its_reward(tiny, batch, method):
    """A small step along the gradient raises the objective: same noise, recomputed terms held fixed."""
    recipe = settings(method=method, margin=10.0)
    networks, params, frozen = tiny
    draws = draw(networks, recipe)
    prepared = prepare(networks.rewards, frozen.rewards, batch.reward_tokens)
    terms = make_terms(recipe, images_of(networks, recipe, params, frozen, batch, draws), draws)

    @jax.jit
    def total(params):
        count = terms.weight.shape[0]
        picked = [jax.tree.map(lambda x, i=i: x[i], terms) for i in range(count)]
        given = networks, recipe, params, frozen, batch.condition
        return sum(step.term_loss(*given, term, prepared)[0] for term in picked)

    grads, _ = gradient(tiny, recipe, batch, draws)
    assert distance(grads, jax.jit(jax.grad(total))(params)) < 1e-4
    still = [jax.tree_util.keystr(p) for p, g in jax.tree_util.tree_leaves_with_path(grads) if not g.any()]
    assert not still
    norm = optax.tree.norm(grads)
    moved = jax.tree.map(lambda p, g: p - 1e-2 * g / norm, params, grads)
    predicted = -1e-2 * float(norm)
    np.testing.assert_allclose(total(moved) - total(params), predicted, rtol=0.1)


def test_refl_starts_from_a_late_state_of_the_rollout(tiny, batch):
    recipe = settings(method="refl", shared_steps=False)
    networks, params, frozen = tiny
    draws = draw(networks, recipe, 3)
    assert set(np.asarray(draws.own)) == {1, 2}
    terms = make_terms(recipe, images_of(networks, recipe, params, frozen, batch, draws), draws)
    sigmas = flow.shifted_schedule(3, recipe.shift)
    np.testing.assert_array_equal(terms.sigma_from[0], sigmas[np.asarray(draws.own)])
    z = draws.noise
    for i in range(3):
        here = np.asarray(draws.own) == i
        np.testing.assert_allclose(terms.noisy[0][here], z[here], atol=1e-5)
        v = networks_lib.velocity(networks, recipe, params, batch.condition, z, sigmas[i], 1.0)
        z = flow.euler_step(z, v, sigmas[i], sigmas[i + 1])


def test_direct_align_weighs_noise_levels(tiny):
    recipe = settings(method="direct_align", weights=(0.25, 1.0))
    draws = draw(tiny[0], recipe)._replace(own=jnp.array([5, 500, 995, 995]))
    terms = make_terms(recipe, Images(draws.noise, draws.noise), draws)
    np.testing.assert_allclose(terms.weight[0], np.linspace(0.25, 1.0, 1000)[[5, 500, 995, 995]], rtol=1e-5)
    assert list(terms.coefficients) == ["caption"] and (terms.coefficients["caption"] == 1).all()


def test_latents_of_the_batch_replace_the_rollout(tiny, batch):
    recipe = settings()
    latents = jax.random.normal(jax.random.key(5), (BATCH, *TOKENS))
    networks, params, frozen = tiny
    draws = draw(networks, recipe)
    made = step.images_of(networks, recipe, params, frozen, batch._replace(latents=latents), draws)
    terms = make_terms(recipe, made, draws)
    levels = direct_align.denoising_step(recipe.grid, draws.own)
    np.testing.assert_allclose(terms.noisy[0], flow.add_noise(latents, draws.noise, levels.sigma_from), atol=1e-6)


@pytest.mark.parametrize("method", ["srpo", "direct_align"])
def test_pictures_that_a_rollout_would_have_made_give_its_gradient(tiny, batch, method):
    """Offline and online are one formula: they differ in where the clean latents come from and in nothing else."""
    recipe = settings(method=method)
    networks, params, frozen = tiny
    state, measured = run_update(tiny, recipe, batch, key=0)
    online = jax.tree.map(lambda old, new: old - new, params, state.params)
    draws = draw(networks, recipe)
    made = jax.jit(functools.partial(rollout, networks, recipe))(params, batch, draws.noise)[0]
    offline = rolled_out_gradient(networks, recipe)
    grads, found = offline(params, frozen, batch._replace(latents=made), draws)
    assert distance(grads, online) < 1e-4
    for name, values in found.items():
        wanted = [measured[f"{term}/{name}"] for term in METHODS[method].names(recipe)]
        np.testing.assert_allclose(values, wanted, rtol=1e-4, atol=1e-5)
    other, _ = offline(params, frozen, batch._replace(latents=made[::-1]), draws)
    assert distance(other, online) > 1e-2


def test_a_rollout_serves_several_updates(tiny, batch):
    """The second update works on the first one's images and noise; the third makes images of its own."""
    recipe, rate = settings(reuse=2, accumulation=2), 1e-2
    networks, params, frozen = tiny
    optimizer = sgd(rate)
    update = jax.jit(step.make_update(networks, recipe, optimizer))
    roll = jax.jit(functools.partial(rollout, networks, recipe))
    grad = jax.jit(functools.partial(step.gradient, networks, recipe))
    blank = jnp.full((BATCH, *TOKENS), jnp.nan)
    state = step.TrainState(jnp.int32(0), params, optimizer.init(params), rollout=Rollout(blank, blank))
    for index, key in enumerate(jax.random.split(jax.random.key(0), 3)):
        draws = step.draw(networks, recipe, key, BATCH)
        if index != 1:
            made = Rollout(roll(state.params, batch, draws.noise)[0], draws.noise)
        grads, _ = grad(state.params, frozen, batch, Images(*made), draws.own)
        before, (state, _) = state, update(state, frozen, batch, key)
        moved = jax.tree.map(lambda old, new: (old - new) / rate, before.params, state.params)
        assert distance(moved, grads) < 1e-3
        np.testing.assert_allclose(state.rollout.latents, made.latents, atol=1e-5)
        np.testing.assert_array_equal(state.rollout.noise, made.noise)


def test_a_rollout_keeps_the_change_of_the_middle_blocks(tiny, batch):
    """Steps 0 and 2 of 4 run all blocks, 1 and 3 the double block alone."""
    recipe = settings(rollout_steps=4, cache=2, cache_ends=(1, 0))
    networks, params, _ = tiny
    transformer, noise = bind(networks.transformer, params), draw(networks, recipe).noise
    cached = jax.jit(lambda *values: block_cache.velocity(transformer, *values, (1, 0)))
    sigmas = flow.shifted_schedule(4, recipe.shift)
    x, change = noise, block_cache.no_change(transformer, BATCH, TEXT + TOKENS[0])
    ids, scale = (image_ids(2, 3), text_ids(TEXT)), jnp.full((BATCH,), recipe.rollout_guidance)
    text, pooled = batch.condition["text"], batch.condition["pooled"]
    for index in range(4):
        time = jnp.full((BATCH,), flow.truncate_time(sigmas[index]))
        inputs = x, text, transformer.modulations(pooled, time, scale), *ids
        v, change = cached(inputs, change, index in (0, 2))
        x = flow.euler_step(x, v, sigmas[index], sigmas[index + 1])
    roll = jax.jit(functools.partial(rollout, networks, recipe))
    np.testing.assert_allclose(roll(params, batch, noise)[0], x, atol=1e-5)
    plain = jax.jit(functools.partial(rollout, networks, dataclasses.replace(recipe, cache=1)))
    assert np.abs(plain(params, batch, noise)[0] - x).max() > 1e-3


@pytest.mark.parametrize("changes", [{}, {"solver": "ab2"}, {"rollout_dtype": "int8"}], ids=str)
def test_a_cache_of_no_blocks_changes_nothing(tiny, batch, changes):
    plain = settings(rollout_steps=4, **changes)
    everything = dataclasses.replace(plain, cache=2, cache_ends=(FLUX.num_layers, FLUX.num_single_layers))
    assert_same_rollouts(tiny[0], tiny[1], batch, (plain, everything), jnp.array([[0], [1], [2], [3]]))


@pytest.mark.parametrize(
    "changes", [{}, {"rollout_dtype": "int8"}, {"cache": 2, "cache_ends": (0, 1)}, {"accumulation": 2}], ids=str
)
def test_blocks_apart_make_the_same_rollout(tiny, batch, changes):
    """The parameters that the steps read have no layer axis, so that no step takes a layer out of a stack."""
    stacked = settings(rollout_steps=3, **changes)
    apart = dataclasses.replace(stacked, rollout_unroll=True)
    networks, params, _ = tiny
    assert_same_rollouts(networks, params, batch, (stacked, apart), jnp.array([[0], [1], [2], [2]]))

    def shapes(recipe):
        weights = jax.eval_shape(lambda params: for_rollout(networks, recipe, params)[1], params)
        return {path_name(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(weights)}

    before, after = shapes(stacked), shapes(apart)
    expected = {}
    for path, shape in before.items():
        stack, _, rest = path.partition(".")
        layers = shape[0] if stack in ("double_blocks", "single_blocks") else None
        expected |= {path: shape} if layers is None else {f"{stack}.{i}.{rest}": shape[1:] for i in range(layers)}
    assert after == expected and len(after) > len(before)


def test_parts_of_a_batch_join_again():
    parted = split_batch(jnp.arange(12).reshape(6, 2), 3)
    np.testing.assert_array_equal(join_batch(parted), np.arange(12).reshape(6, 2))


def test_moving_average(tiny, batch):
    state, _ = run_update(tiny, settings(ema_decay=0.75), batch)
    expected = jax.tree.map(lambda old, new: 0.75 * old + 0.25 * new, tiny[1], state.params)
    assert distance(state.ema, expected) < 1e-6


def test_rounded_times_are_bfloat16s(tiny, batch):
    """822 becomes 820 and 3500 becomes 3504, as under the released script's autocast."""
    seen = []

    class Spy(type(FAMILY)):
        def prepare(self, transformer, condition, time, guidance):
            seen.append((float(time[0]) * 1000, float(guidance[0]) * 1000))

        def velocity(self, transformer, x, *_):
            return x

    spied, x = dataclasses.replace(tiny[0], family=Spy()), jnp.zeros((BATCH, *TOKENS))
    for rounded in (False, True):
        recipe = settings(round_time=rounded)
        networks_lib.velocity(spied, recipe, tiny[1], batch.condition, x, jnp.float32(0.8221), 3.5)
    np.testing.assert_allclose(seen, [(822, 3500), (820, 3504)], rtol=1e-6)
