"""Complete SRPO steps against numbers from a run of the released trainer (see ``tests/golden/README.md``), float32.

The tiny models come in the files that users have (a diffusers folder, an open_clip folder, a Hugging Face folder)
and pass through our converter; token ids come from our tokenisation of the case's caption.
"""

import dataclasses
import functools
import json
import pathlib
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.parity import relative_error
from helpers.updates import rolled_out_gradient

from srpo_jax import convert
from srpo_jax.algorithm import direct_align, flow, networks, preference, step
from srpo_jax.algorithm.batch import Batch, Draws
from srpo_jax.algorithm.methods import METHODS
from srpo_jax.algorithm.networks import Frozen, Networks, to_unit_range
from srpo_jax.algorithm.rollout import rollout
from srpo_jax.algorithm.settings import Settings
from srpo_jax.config import default
from srpo_jax.families.flux import FLUX
from srpo_jax.models.compute import Compute
from srpo_jax.rewards import REWARDS
from srpo_jax.rewards.clip import preprocess
from srpo_jax.weights import engine, flux, folder

DATA = pathlib.Path(__file__).parents[1] / "golden"
CASES = {
    "hps_gas2_T1000_m437": "hps",
    "ps_gas2_T100_m80_h64w128": "pickscore",
}
FOLDERS = {"hps": DATA / "models" / "hps", "pickscore": DATA / "models" / "ps"}
TOKENIZER = DATA / "models" / "ps"  # both rewards share one vocabulary
BRANCHES = ("denoise", "inversion")  # b0, b1


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """The golden models in our format, written by the converter."""
    target = tmp_path_factory.mktemp("golden")
    for part in ("transformer", "vae"):
        convert.import_folder(DATA / "models" / "flux" / part, target / part)
    for name, source in FOLDERS.items():
        convert.import_folder(source, target / name)
    return target


def check(ours, arrays, key, bound):
    """Compares with a stored array, or with what is stored of a large one: each 16th entry, the norm, a dot product."""
    ours = np.asarray(ours, np.float64)
    if key in arrays:
        assert relative_error(ours, arrays[key]) < bound
        return
    assert ours.shape == tuple(arrays[f"{key}__shape"])
    flat = ours.reshape(-1)
    assert relative_error(flat[::16], arrays[f"{key}__every16"]) < bound
    norm, dot = arrays[f"{key}__norm_dot"]
    np.testing.assert_allclose(np.linalg.norm(flat), norm, rtol=bound)
    # The wave's norm is sqrt(size / 2): an error of the allowed size can change the product by as much.
    np.testing.assert_allclose(flat @ wave(flat.size), dot, atol=bound * norm * np.sqrt(flat.size / 2))


def unit(features):
    """Of unit norm; the record of Hugging Face's models has the features before that."""
    return features / np.linalg.norm(features, axis=-1, keepdims=True)


def wave(size):
    """What the record's dot products are taken with."""
    return np.cos(0.37 * np.arange(size) + 0.1)


def nchw(array):
    return np.moveaxis(np.asarray(array), -1, 1)


def nhwc(array):
    return np.moveaxis(array, 1, -1)


def reward_folder(converted, name):
    """A reward with the tokenizer that both share."""
    where = converted / name
    if not (where / "tokenizer").exists():
        (where / "tokenizer").mkdir()
        for file in ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"):
            shutil.copy(TOKENIZER / file, where / "tokenizer" / file)
    return where


def load_case(name, converted, compute=Compute(), frozen_compute=None):  # noqa: B008 (frozen)
    """Everything of one case: our networks and inputs, the record, the arrays."""
    record = json.loads((DATA / "cases" / f"{name}.json").read_text())
    arrays = dict(np.load(DATA / "cases" / f"{name}.npz"))
    args, reward_name = record["args"], CASES[name]
    config = default()
    config.data.height, config.data.width = args["h"], args["w"]
    config.rollout.steps, config.rollout.shift = args["sampling_steps"], args["shift"]
    config.rollout.guidance = float(args["train_guidence"])
    config.align.guidance = args["vis_guidence"]
    config.align.schedule_steps, config.align.length = args["vis_sampling_step"], args["timestep_length"]
    config.align.train_timestep = tuple(args["train_timestep"])
    config.align.groundtruth_ratio = args["groundtruth_ratio"]
    config.align.discount_positive = tuple(args["discount_pos"])
    config.align.discount_negative = tuple(args["discount_inv"])
    settings = Settings.from_config(config, FLUX)

    flux_config, transformer, params = folder.load(converted / "transformer", "flux", compute)
    _, autoencoder, vae_params = folder.load(converted / "vae", "autoencoder", frozen_compute or compute)
    clip_config, clip, clip_params = folder.load(converted / reward_name, "clip", frozen_compute or compute)
    reward = REWARDS[reward_name](clip_config, clip)
    made = Networks(FLUX, transformer, autoencoder, {reward_name: reward})
    frozen = Frozen(vae_params, {reward_name: clip_params})

    words = preference.control_words(record["step"], config.reward.positive, config.reward.negative)
    prompts = preference.captions([record["caption"]], words)
    tokenize = reward.tokens(reward_folder(converted, reward_name))
    ids = {key: jnp.asarray(tokenize(texts)) for key, texts in prompts.items()}
    condition = {
        "text": jnp.asarray(arrays["encoder_hidden_states"]), "pooled": jnp.asarray(arrays["pooled_projections"]),
    }  # fmt: skip
    batch = Batch(condition, {reward_name: ids})
    draws = Draws(FLUX.pack(jnp.asarray(nhwc(arrays["noise"]))), jnp.array([record["mid_timestep"]]))
    return SimpleNamespace(
        record=record, arrays=arrays, settings=settings, networks=made, params=params, frozen=frozen, batch=batch,
        draws=draws, prompts=prompts, reward=reward_name, table=flux.diffusers_rules(flux_config),
    )  # fmt: skip


@pytest.fixture(scope="module", params=list(CASES))
def case(request, converted):
    return load_case(request.param, converted)


@pytest.fixture(scope="module")
def terms(case):
    """The stacked terms that our rollout and method lay out, and the text features."""

    @jax.jit
    def make(params, frozen, batch, draws):
        prepared = preference.prepare(case.networks.rewards, frozen.rewards, batch.reward_tokens)
        images = step.images_of(case.networks, case.settings, params, frozen, batch, draws)
        return METHODS["srpo"].terms(case.settings, images, draws.own), prepared

    return make(case.params, case.frozen, case.batch, case.draws)


def outcome(case, term, params, prepared):
    return step.run_term(case.networks, case.settings, params, case.frozen, case.batch.condition, term, prepared)


@pytest.fixture(scope="module")
def outcomes(case, terms):
    """What happens in each branch."""
    run = jax.jit(functools.partial(outcome, case))
    return [run(jax.tree.map(lambda x, i=i: x[i], terms[0]), case.params, terms[1]) for i in range(2)]


def test_indices_levels_and_discounts(case):
    for index, make_step in enumerate((direct_align.denoising_step, direct_align.inversion_step)):
        made = make_step(case.settings.grid, case.draws.own)
        branch = case.record["branches"][index]
        assert made.sigma_from.item() == np.float32(branch["sigma_inject"])
        assert made.sigma_to.item() == np.float32(branch["sigmast"])
        assert made.discount.item() == np.float32(branch["reward_k"])
        assert flow.truncate_time(made.sigma_from).item() == np.float32(branch["timestep_passed"])


def test_prompts_and_token_ids(case):
    for branch, plus, minus in zip(
        case.record["branches"], ("positive", "negative"), ("negative", "positive"), strict=True
    ):
        assert [branch["prompt"], branch["neg_prompt"]] == case.prompts[plus] + case.prompts[minus]
        for key, variant in (("prompt_ids", plus), ("neg_prompt_ids", minus)):
            ids = np.asarray(case.batch.reward_tokens[case.reward][variant])[0]
            np.testing.assert_array_equal(ids[: len(branch[key])], branch[key])


def test_rollout(case):
    settings, arrays = case.settings, case.arrays
    sigmas = flow.shifted_schedule(settings.rollout_steps, settings.shift)
    np.testing.assert_array_equal(sigmas, arrays["rollout_sigmas"])

    @jax.jit
    def field(x, sigma):
        given = case.params, case.batch.condition, x, sigma, settings.rollout_guidance
        return networks.velocity(case.networks, settings, *given)

    z, states, velocities = case.draws.noise, [], []
    for sigma, sigma_next in zip(sigmas[:-1], sigmas[1:], strict=True):
        states.append(z[0])
        velocities.append(field(z, sigma)[0])
        z = flow.euler_step(z, velocities[-1][None], sigma, sigma_next)
    check(np.stack(states), arrays, "rollout_z", 1e-5)
    check(np.stack(velocities), arrays, "rollout_v", 1e-5)
    roll = jax.jit(functools.partial(rollout, case.networks, settings))
    x0, *_ = roll(case.params, case.batch, case.draws.noise)
    assert relative_error(x0, arrays["latent_start"]) < 1e-5


def test_text_features(case, terms):
    for branch, order in enumerate((("positive", "negative"), ("negative", "positive"))):
        features = np.concatenate([terms[1][case.reward][variant] for variant in order])
        assert relative_error(features, unit(case.arrays[f"b{branch}_text_emb"])) < 1e-5


@pytest.mark.parametrize("branch", [0, 1], ids=BRANCHES)
def test_every_stage_of_a_branch(case, terms, outcomes, branch):
    arrays, record, ours = case.arrays, case.record["branches"][branch], outcomes[branch]
    noisy = terms[0].noisy[branch]
    assert relative_error(noisy, arrays[f"b{branch}_noisy"]) < 1e-5
    known = terms[0].sigma_to[branch] * terms[0].noise[branch]
    assert relative_error(known, arrays[f"b{branch}_gt_vector"]) < 1e-5
    assert relative_error(ours.velocity, arrays[f"b{branch}_pred"]) < 1e-5
    assert relative_error(ours.recovered, arrays[f"b{branch}_recovered_packed"]) < 1e-5
    check(nchw(ours.decoded), arrays, f"b{branch}_decoded", 1e-5)
    seen = preprocess(to_unit_range(ours.decoded), 224)[0, ::16, ::16]
    subsampled = arrays[f"b{branch}_reward_in_sub"].reshape(3, 14, 14)
    assert relative_error(np.moveaxis(np.asarray(seen), -1, 0), subsampled) < 1e-5
    assert relative_error(ours.seen[case.reward], unit(arrays[f"b{branch}_image_emb"])) < 1e-5
    np.testing.assert_allclose(ours.reward.item(), record["reward"], atol=2e-6)


@pytest.mark.parametrize("branch", [0, 1], ids=BRANCHES)
def test_gradients_of_the_intermediates(case, terms, outcomes, branch):
    """From the loss back to the image, the recovered latents, the prediction and the network's input."""
    term = jax.tree.map(lambda x: x[branch], terms[0])
    frozen, made, settings = case.frozen, case.networks, case.settings

    def loss_of_image(image):
        seen = preference.look(made.rewards, frozen.rewards, image)
        reward = preference.mixture(made.rewards, frozen.rewards, seen, terms[1], term.coefficients)
        return jnp.mean(term.weight * preference.hinge(reward, settings.margin))

    def loss_of_recovered(x):
        return loss_of_image(to_unit_range(networks.decode(made, settings, frozen.autoencoder, x)))

    def loss_of_velocity(v):
        return loss_of_recovered(direct_align.recover(term.noisy, v, term.noise, term.sigma_from, term.sigma_to))

    ours, arrays = outcomes[branch], case.arrays
    image = to_unit_range(ours.decoded)
    check(nchw(jax.jit(jax.grad(loss_of_image))(image)), arrays, f"b{branch}_grad_image", 1e-4)
    by_recovered = jax.jit(jax.grad(loss_of_recovered))(ours.recovered)
    assert relative_error(by_recovered, arrays[f"b{branch}_grad_recovered"]) < 1e-4
    by_velocity = jax.jit(jax.grad(loss_of_velocity))(ours.velocity)
    assert relative_error(by_velocity, arrays[f"b{branch}_grad_pred"]) < 1e-4


def branch_gradients(case, terms, branch):
    """The gradient of one branch's loss by torch name and layout, and the loss."""

    @jax.jit
    def run(params, term):
        def loss(params):
            given = case.networks, case.settings, params, case.frozen, case.batch.condition
            return step.term_loss(*given, term, terms[1])

        return jax.value_and_grad(loss, has_aux=True)(params)

    (loss, _), grads = run(case.params, jax.tree.map(lambda x: x[branch], terms[0]))
    return loss.item(), engine.from_params(case.table, grads)


@pytest.mark.parametrize("branch", [0, 1], ids=BRANCHES)
def test_parameter_gradients_of_a_branch(case, terms, branch):
    loss, grads = branch_gradients(case, terms, branch)
    record, arrays = case.record["branches"][branch], case.arrays
    np.testing.assert_allclose(loss, record["loss"], rtol=1e-5)
    total = np.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in grads.values()))
    np.testing.assert_allclose(total, record["grad_norm"], rtol=1e-4)
    check_gradient_digest(grads, arrays, f"b{branch}", total)
    full = DATA / "cases" / f"{case.record['case']}.grads_b{branch}.npz"
    if full.exists():
        theirs = dict(np.load(full))
        assert set(grads) == set(theirs)
        for name, gradient in theirs.items():
            difference = np.linalg.norm(grads[name].astype(np.float64) - gradient)
            assert difference <= 1e-4 * max(np.linalg.norm(gradient), 1e-3 * total), name


def check_gradient_digest(grads, arrays, key, total):
    """Norm, dot product with cos(0.37 i + 0.1) and the first six values of every parameter's gradient, torch layout."""
    for row, name in enumerate(arrays["grad_names"]):
        gradient = grads[str(name)].astype(np.float64).reshape(-1)
        norm, dot, head = (arrays[f"grad_{key}_{part}"][row] for part in ("norm", "dot", "head"))
        scale = max(norm, 1e-3 * total)
        assert abs(np.linalg.norm(gradient) - norm) < 1e-4 * scale, name
        # As in ``check``.
        assert abs(gradient @ wave(gradient.size) - dot) < 1e-4 * scale * max(1.0, np.sqrt(gradient.size / 2)), name
        np.testing.assert_allclose(gradient[:6], head[: gradient.size], atol=1e-4 * scale, err_msg=str(name))


def whole_gradient(case):
    """The gradient and the metrics of a case, from its rollout on."""
    run = rolled_out_gradient(case.networks, case.settings)
    return run(case.params, case.frozen, case.batch, case.draws)


def test_the_steps_gradient_is_the_sum_over_branches(case):
    grads, metrics = whole_gradient(case)
    total = np.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in jax.tree.leaves(grads)))
    np.testing.assert_allclose(total, case.record["total_grad_norm"], rtol=1e-4)
    check_gradient_digest(engine.from_params(case.table, grads), case.arrays, "total", total)
    np.testing.assert_allclose(metrics["loss"], [b["loss"] for b in case.record["branches"]], rtol=1e-5)
    np.testing.assert_allclose(metrics["reward"], [b["reward"] for b in case.record["branches"]], atol=2e-6)


@pytest.mark.parametrize("name", list(CASES))
def test_bfloat16_stays_near_float32(name, converted):
    """Frozen networks are loaded as training loads them: in bfloat16, but for norms and scales.

    Bounds are some two to three times the worse case's distance, which moves as sums are rounded elsewhere: its norm
    by -2.6 % with a single block's last product in two, by -2.2 % with these two added in float32.
    """

    def run(compute, frozen):
        grads, metrics = whole_gradient(load_case(name, converted, compute, frozen))
        return np.concatenate([np.asarray(g, np.float64).ravel() for g in jax.tree.leaves(grads)]), metrics

    half = Compute(dtype=jnp.bfloat16)
    exact, exact_metrics = run(Compute(), Compute())
    rounded, rounded_metrics = run(half, dataclasses.replace(half, param_dtype=jnp.bfloat16))
    cosine = exact @ rounded / np.linalg.norm(exact) / np.linalg.norm(rounded)
    length = np.linalg.norm(rounded) / np.linalg.norm(exact) - 1
    rewards = np.abs(rounded_metrics["reward"] - exact_metrics["reward"]).max()
    print(f"{name}: 1 - cosine {1 - cosine:.2e}, norm {length:+.2%}, rewards off by {rewards:.4f}")
    assert cosine > 0.991 and abs(length) < 0.05 and rewards < 0.026


def test_scales_of_rewards_are_not_rounded(converted):
    """exp(logit_scale) of a PickScore in bfloat16 would be 1 % smaller."""
    compute = Compute(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    exact, loaded = (folder.load(converted / "pickscore", "clip", c)[2] for c in (Compute(), compute))
    assert loaded["logit_scale"] == exact["logit_scale"] and loaded["logit_scale"].dtype == jnp.float32
    rounded = float(jnp.exp(exact["logit_scale"].astype(jnp.bfloat16).astype(jnp.float32)))
    assert abs(rounded / float(jnp.exp(exact["logit_scale"])) - 1) > 1e-3  # it would matter
    for path, leaf in jax.tree_util.tree_leaves_with_path(loaded):
        named = jax.tree_util.keystr(path)
        assert leaf.dtype == (jnp.float32 if "norm" in named or "logit_scale" in named else jnp.bfloat16), named


def test_term_order_is_the_records_order():
    config = default()
    assert METHODS["srpo"].names(Settings.from_config(config, FLUX)) == BRANCHES
