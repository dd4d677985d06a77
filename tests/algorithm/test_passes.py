"""Methods that send one gradient through several passes: against recorded runs of the originals, and among each other.

``tests/golden/methods`` has gradients of the released code on a toy field; all of ours pass through the update's own
functions: rollout, stored states, one score, passes.
"""

import collections
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import toy_field
from helpers.toy_field import GOLDEN, recorded, relative_error

from srpo_jax.algorithm import flow, passes, quadrature, step
from srpo_jax.algorithm.batch import Draws
from srpo_jax.algorithm.methods import METHODS
from srpo_jax.algorithm.passes import BridgeSteps

BATCH, STEPS = 2, 25


@pytest.fixture(scope="module")
def world():
    return toy_field.world()


@functools.cache
def runner(method, changes):
    networks, params, frozen = toy_field.world()
    settings, batch = toy_field.settings(method, **dict(changes)), toy_field.batch()

    @jax.jit
    def run(own):
        draws = Draws(toy_field.noise(), own)
        images = step.images_of(networks, settings, params, frozen, batch, draws)
        made = METHODS[method].terms(settings, images, own)
        grads, metrics = step.gradient(networks, settings, params, frozen, batch, images, own)
        return grads, metrics, made

    return run


def run(method, own, **changes):
    """(gradient by name, metrics, terms or chain) of an update in which the draws of both samples are ``own``."""
    own = jax.tree.map(lambda x: jnp.broadcast_to(jnp.asarray(x), (BATCH, *jnp.shape(x))), own)
    return runner(method, tuple(sorted(changes.items())))(own)


# --- recorded runs ----------------------------------------------------------------------------------------------------


def case_of(name):
    """(method, its draws, what differs from the released constants) of a recorded run."""
    kind = name.split("_")[0]

    def got(key):
        return GOLDEN[f"{name}/{key}"]

    if kind == "leapalign":
        changes = {"reward__margin": float(GOLDEN["input/hinge"])} if name.endswith("hinge") else {}
        return (
            "leapalign",
            np.array([got("j_idx"), got("k_idx")]),
            changes | ({"leapalign__alpha": 0.0} if name.endswith("alpha0") else {}),
        )
    if kind == "sparse":
        return "flowbp_sparse", got("selected_indices")[::-1].copy(), {}
    if kind == "bridge":
        active = np.concatenate([got("pre_active_indices"), got("post_active_indices")])
        return "flowbp_bridge", BridgeSteps(active[::-1].copy(), got("j_idx")), {}
    if kind == "lagrange":
        changes = {"flowbp_lagrange__anchor": 0.4} if name.endswith("anchor") else {}
        return "flowbp_lagrange", np.array([got("j_idx"), got("k_idx")]), changes
    if kind == "refl":
        return "refl", got("grad_idx")[0], {}
    assert kind == "drtune"
    return "drtune", np.append(got("train_indices"), got("early_stop_idx")), {}


CASES = sorted(
    {key.split("/")[0] for key in GOLDEN.files if key.endswith("/grad_W1") and key[:5] not in ("readi", "draft")}
)


def test_the_rollout():
    settings = toy_field.settings("draft_k", draft_k__last_steps=0)
    np.testing.assert_allclose(passes.levels(settings), GOLDEN["rollout/sigmas"], atol=2e-7)
    assert len(CASES) == 17
    made = run("draft_k", np.zeros(()), draft_k__last_steps=0)[2]
    np.testing.assert_allclose(made.passes.state, GOLDEN["rollout/x"][-2::-1], atol=2e-5)
    np.testing.assert_allclose(made.latents, GOLDEN["rollout/x"][-1], atol=2e-5)


@pytest.mark.parametrize("name", CASES)
def test_recorded_gradients(name):
    grads, metrics, made = run(*(case := case_of(name))[:2], **case[2])
    assert relative_error(grads, recorded(name)) < 2e-5
    np.testing.assert_allclose(metrics["loss"].sum(), GOLDEN[f"{name}/loss"], rtol=1e-5)
    np.testing.assert_allclose(metrics["reward"].mean(), GOLDEN[f"{name}/rewards"].mean(), rtol=1e-5)
    if f"{name}/weight" in GOLDEN:
        # What the recorded LeapAlign keeps is the weight's denominator.
        wanted = GOLDEN[f"{name}/weight"] ** (-1 if name.startswith("leap") else 1)
        np.testing.assert_allclose(made.weight, wanted, rtol=1e-5)


def test_recorded_draft_lv():
    noises = GOLDEN["input/renoise"]
    grads, metrics, _ = runner("draft_lv", ())(jnp.asarray(noises).swapaxes(0, 1))
    assert relative_error(grads, recorded("draft_lv")) < 2e-5
    np.testing.assert_allclose(metrics["loss"].sum(), GOLDEN["draft_lv/loss"], rtol=1e-5)


@pytest.mark.parametrize("count", [1, 2, 3, 25])
def test_draft_k_against_a_reading_in_float64(count):
    grads, metrics, _ = run("draft_k", np.zeros(()), draft_k__last_steps=count)
    assert relative_error(grads, recorded(f"reading/draft_{count}")) < 2e-5
    np.testing.assert_allclose(metrics["loss"][0], GOLDEN[f"reading/draft_{count}/loss"], rtol=1e-5)


# --- what they are among each other -----------------------------------------------------------------------------------


def test_draft_1_is_refl_at_the_last_step():
    one, refl = run("draft_k", np.zeros(()))[0], run("refl", np.array(STEPS - 1))[0]
    assert relative_error(one, refl) < 2e-6


def test_draft_of_all_steps_is_backpropagation_through_the_rollout(world):
    networks, params, frozen = world
    settings, batch = toy_field.settings("draft_k", rollout__steps=6, draft_k__last_steps=0), toy_field.batch()
    sigmas = passes.levels(settings)

    def loss(params):
        x = toy_field.noise()
        for index in range(6):
            v = step.velocity(networks, settings, params, batch.condition, x, sigmas[index], settings.guidance)
            x = x + (sigmas[index + 1] - sigmas[index]) * v
        reward = step.score(networks, settings, frozen, x, {"caption": jnp.ones(BATCH)}, batch.reward_tokens)[2]
        return jnp.maximum(0.55 - reward, 0).mean()

    found = run("draft_k", np.zeros(()), rollout__steps=6, draft_k__last_steps=0)[0]
    assert relative_error(found, jax.jit(jax.grad(loss))(params)) < 2e-6


def test_a_bridge_without_nesting_is_sparse_on_its_steps():
    steps = np.array([22, 21, 8, 5, 4])
    bridge = run("flowbp_bridge", BridgeSteps(steps, np.array(8)), flowbp_bridge__alpha=0.0)[0]
    sparse = run("flowbp_sparse", steps, flowbp_sparse__passes=5)[0]
    assert relative_error(bridge, sparse) < 2e-6
    assert relative_error(run("flowbp_bridge", BridgeSteps(steps, np.array(8)))[0], sparse) > 1e-2


def test_lagrange_of_one_support_is_leapalign():
    own, same = np.array([17, 6]), {"flowbp_lagrange__alpha": 0.3, "flowbp_lagrange__tau": 0.1}
    lagrange = run("flowbp_lagrange", own, flowbp_lagrange__order=1, flowbp_lagrange__rescale=0.0, **same)[0]
    leap = run("leapalign", own)[0]
    assert relative_error(lagrange, leap) < 2e-6
    mixed = run("flowbp_lagrange", own, flowbp_lagrange__order=1, flowbp_lagrange__anchor=0.5, **same)[0]
    assert relative_error(mixed, leap) < 2e-6


def test_samples_may_have_steps_of_their_own():
    """The gradient of two samples with draws of their own is the mean of what each gives alone."""
    own = jnp.array([[12, 4], [8, 5]])
    both = runner("leapalign", ())(own)[0]
    networks, params, frozen = toy_field.world()
    settings, batch, noise = toy_field.settings("leapalign"), toy_field.batch(), toy_field.noise()

    @jax.jit
    def alone(one, draws):
        images = step.images_of(networks, settings, params, frozen, one, draws)
        return step.gradient(networks, settings, params, frozen, one, images, draws.own)[0]

    single = [alone(*jax.tree.map(lambda x, i=i: x[i : i + 1], (batch, Draws(noise, own)))) for i in range(BATCH)]
    assert relative_error(both, jax.tree.map(lambda a, b: (a + b) / 2, *single)) < 2e-6


# --- quadrature -------------------------------------------------------------------------------------------------------


def test_supports_and_weights_of_the_originals():
    sigmas = GOLDEN["rollout/sigmas"]
    places, integrals = quadrature.tables(sigmas, 3)
    wanted = GOLDEN["table/support_order3"]
    np.testing.assert_array_equal(np.where(wanted < 0, 0, wanted), places)
    np.testing.assert_allclose(integrals, GOLDEN["table/weights_order3"], atol=1e-6)


@pytest.mark.parametrize("segment", [(0, 25), (3, 22), (20, 23), (7, 8), (22, 25)])
def test_weights_integrate_what_their_supports_can(segment):
    sigmas = flow.shifted_schedule(STEPS, 3.0).astype(np.float64)
    support = quadrature.supports(*segment, 3)
    weights, (start, end) = quadrature.weights(sigmas, *segment, support), sigmas[list(segment)]
    np.testing.assert_allclose(weights.sum(), end - start, rtol=1e-12)
    for power in range(len(support)):
        exact = (end ** (power + 1) - start ** (power + 1)) / (power + 1)
        np.testing.assert_allclose(weights @ sigmas[support] ** power, exact, rtol=1e-9)


def test_where_segments_begin():
    gamma = GOLDEN["table/dirichlet_gamma"]
    shares = gamma / gamma.sum(1, keepdims=True)
    j, k = jax.vmap(lambda share: quadrature.split_steps(share, STEPS))(jnp.asarray(shares))
    np.testing.assert_array_equal(np.stack([k, j], 1), GOLDEN["table/dirichlet_kj"])


# --- draws ------------------------------------------------------------------------------------------------------------

MANY = 20_000


def many(method, **changes):
    settings = toy_field.settings(method, rollout__draws="per_sample", **changes)
    key_for = functools.partial(jax.random.fold_in, jax.random.key(0))
    drawn = jax.jit(lambda: METHODS[method].draw(settings, key_for, (MANY, 4, 64)))()
    return jax.tree.map(np.asarray, drawn), settings


def assert_frequencies(values, law):
    """``values`` follow ``law`` (probability by value), each within 4.5 standard deviations."""
    found = collections.Counter(values)
    assert set(found) <= {value for value, p in law.items() if p}
    for value, p in law.items():
        assert abs(found[value] / MANY - p) <= 4.5 * np.sqrt(p * (1 - p) / MANY) + 1e-12, (value, found[value], p)


def test_one_draw_serves_the_batch():
    methods = "leapalign", "flowbp_sparse", "flowbp_bridge", "flowbp_lagrange", "drtune", "refl"
    key_for = functools.partial(jax.random.fold_in, jax.random.key(1))

    @functools.partial(jax.jit, static_argnums=0)
    def draw(draws):
        recipes = {method: toy_field.settings(method, rollout__draws=draws) for method in methods}
        return {name: METHODS[name].draw(recipe, key_for, (8, 4, 64)) for name, recipe in recipes.items()}

    shared, own = draw("shared"), draw("per_sample")
    assert all((leaf == leaf[:1]).all() for leaf in jax.tree.leaves(shared))
    assert all((leaf != leaf[:1]).any() for leaf in jax.tree.leaves(own))


def test_law_of_leaps():
    own, _ = many("leapalign")
    pairs = list(itertools.combinations(range(STEPS), 2))
    assert_frequencies([(k, j) for j, k in own.tolist()], dict.fromkeys(pairs, 1 / len(pairs)))


def ordered(places, count):
    """The probability of each set of ``count`` draws without replacement, each in proportion to its place squared."""
    law = collections.Counter()
    for order in itertools.permutations(places, count):
        p, left = 1.0, sum(place**2 for place in places.values())
        for name in order:
            p, left = p * places[name] ** 2 / left, left - places[name] ** 2
        law[tuple(sorted(order))] += p
    return law


def test_law_of_sparse_steps():
    own, _ = many("flowbp_sparse", rollout__steps=6, flowbp_sparse__passes=3)
    assert (np.diff(own, axis=1) < 0).all()
    assert_frequencies([tuple(sorted(row)) for row in own.tolist()], ordered({i: i + 1 for i in range(6)}, 3))


def test_law_of_bridges():
    own, _ = many("flowbp_bridge")
    assert_frequencies(own.bridge.tolist(), {j: j / 300 for j in range(STEPS)})
    counts = passes.bridge_counts(STEPS, 5)
    np.testing.assert_array_equal(counts[1:], GOLDEN["table/bridge_counts"][1:, 5])
    for count in (2, 3, 4):
        np.testing.assert_array_equal(passes.bridge_counts(STEPS, count)[1:], GOLDEN["table/bridge_counts"][1:, count])
    before = (own.active < own.bridge[:, None]).sum(1)
    np.testing.assert_array_equal(before, counts[own.bridge, 0])
    assert (np.diff(own.active, axis=1) < 0).all() and (own.active == own.bridge[:, None]).any(1).all()


def test_law_of_steps_beside_a_bridge():
    """Of 6 steps and 4 passes: with the bridge at 2, one pass lies before it and two behind."""
    own, _ = many("flowbp_bridge", rollout__steps=6, flowbp_bridge__passes=4)
    assert passes.bridge_counts(6, 4)[2].tolist() == [1, 3]
    rows = [tuple(sorted(row)) for row, j in zip(own.active.tolist(), own.bridge, strict=True) if j == 2]
    before, after = ordered({0: 1, 1: 2}, 1), ordered({3: 1, 4: 2, 5: 3}, 2)
    law = {(*a, 2, *b): p * q for (a, p), (b, q) in itertools.product(before.items(), after.items())}
    found = collections.Counter(rows)
    assert set(found) <= set(law)
    for row, p in law.items():
        assert abs(found[row] / len(rows) - p) < 4.5 * np.sqrt(p * (1 - p) / len(rows)), row


def test_law_of_segments():
    own, _ = many("flowbp_lagrange")
    j, k = own.T
    assert (k >= 0).all() and (j > k).all() and (j <= STEPS - 2).all()
    mean = STEPS * np.array([2.5, 2.0]) / 10.5  # of the shares after j and before k
    np.testing.assert_allclose([STEPS - 1 - j.mean(), k.mean() + 1], mean, atol=0.1)


def test_law_of_drtune():
    own, _ = many("drtune")
    law = collections.Counter()
    for stop in range(15, 25):
        stride = (stop + 1) // 3
        starts = range(stop - 2 * stride + 1)
        for start in starts:
            law[(start, start + stride, start + 2 * stride, stop)] += 1 / 10 / len(starts)
    assert_frequencies([tuple(row) for row in own.tolist()], law)
