"""LoRA: peft's forward pass and gradients, the update, training; its files are test_lora_files's."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from helpers import references, runs, tiny, updates
from helpers.factors import EVERYTHING, random_factors, write_file
from helpers.parity import relative_error
from PIL import Image

from srpo_jax import architectures, metrics, program, record, sharding, train, validation
from srpo_jax import config as config_lib
from srpo_jax.algorithm import step
from srpo_jax.algorithm.batch import Rollout
from srpo_jax.algorithm.step import TrainState
from srpo_jax.costs import timing, work
from srpo_jax.errors import UserError
from srpo_jax.families.flux import image_ids, text_ids
from srpo_jax.models import compute, lora
from srpo_jax.models.compute import Compute, join
from srpo_jax.models.flux import FluxConfig
from srpo_jax.weights import engine, folder
from srpo_jax.weights import flux as tables
from srpo_jax.weights import lora as weights_lora

DEFAULT = tuple(config_lib.default().lora.targets)


def nbytes(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


# --- the network ------------------------------------------------------------------------------------------------------


def test_forward_and_gradients_are_pefts():
    """Every layer of the blocks adapted, alpha / rank = 3 / 2; factors carried over in the file format."""
    torch.manual_seed(0)
    model = references.flux_transformer()
    config = FluxConfig.from_dict(dict(model.config))
    settings = lora.Lora(rank=4, alpha=6.0, targets=EVERYTHING)
    factors = random_factors(config, settings)
    raw = dataclasses.replace(settings, alpha=4.0)  # scale 1: the arrays as they are
    tensors = dict(weights_lora.exported(config, engine.flatten(factors), raw, weights_lora.DIFFUSERS))
    modules = sorted({name.removeprefix("transformer.").split(".lora_")[0] for name in tensors})
    peft.inject_adapter_in_model(peft.LoraConfig(r=4, lora_alpha=6, target_modules=modules), model)
    parameters = {name.replace(".default", ""): p for name, p in model.named_parameters() if ".lora_" in name}
    assert {f"transformer.{name}" for name in parameters} == set(tensors)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(torch.tensor(np.array(tensors[f"transformer.{name}"])))

    rng = np.random.default_rng(1)
    rows, columns, text = 4, 6, 5
    latents, words, pooled = (rng.normal(size=s).astype(np.float32) for s in ((2, 6, 64), (2, text, 24), (2, 20)))
    time, guidance = np.array([0.3, 0.9], np.float32), np.array([3.5, 1.0], np.float32)
    ids = image_ids(rows // 2, columns // 2), text_ids(text)
    cotangent = rng.normal(size=latents.shape).astype(np.float32)
    theirs = model(
        hidden_states=torch.tensor(latents), encoder_hidden_states=torch.tensor(words),
        pooled_projections=torch.tensor(pooled), timestep=torch.tensor(time), guidance=torch.tensor(guidance),
        img_ids=torch.tensor(ids[0]), txt_ids=torch.tensor(ids[1]),
    ).sample  # fmt: skip
    (theirs * torch.tensor(cotangent)).sum().backward()

    graphdef, like = lora.abstract(folder.constructor("flux", config), settings)
    state = {name.replace(".base_layer", ""): p.detach().numpy()
             for name, p in model.named_parameters() if ".lora_" not in name}  # fmt: skip
    base = engine.to_params(tables.diffusers_rules(config), state, lora.split(like)[1])

    def product(factors):
        network = compute.bind(graphdef, compute.join(factors, base))
        ours = network(latents, words, pooled, time, guidance, *map(jnp.asarray, ids))
        return jnp.vdot(cotangent, ours), ours

    (_, ours), grads = jax.jit(jax.value_and_grad(product, has_aux=True))(factors)
    assert relative_error(ours, theirs.detach().numpy()) < 1e-5
    assert jax.tree.structure(grads) == jax.tree.structure(factors)
    found = dict(weights_lora.exported(config, engine.flatten(jax.device_get(grads)), raw, weights_lora.DIFFUSERS))
    for name, parameter in parameters.items():
        assert relative_error(found[f"transformer.{name}"], parameter.grad.numpy()) < 2e-5, name


def test_where_training_starts():
    """B is 0; A is peft's initial distribution, and of a layer the same whatever else is adapted."""
    some, all_of_them = (
        lora.initial(lora.split(lora.abstract(folder.constructor("flux", tiny.FLUX), lora.Lora(3, 3.0, t))[1])[0], 7)
        for t in (("double_blocks.img_mlp.out_layer",), EVERYTHING)
    )
    a = some["double_blocks"]["img_mlp"]["out_layer"]["lora_a"]
    np.testing.assert_array_equal(a, all_of_them["double_blocks"]["img_mlp"]["out_layer"]["lora_a"])
    module = torch.nn.Sequential(torch.nn.Linear(256, 4))
    peft.inject_adapter_in_model(peft.LoraConfig(r=512, target_modules=["0"]), module)
    reference = module[0].lora_A.default.weight.detach().numpy()
    limit = 256**-0.5
    assert 0.99 * limit < np.abs(reference).max() <= limit and 0.95 * limit < np.abs(a).max() <= limit
    np.testing.assert_allclose(np.std(a), np.std(reference), rtol=0.05)
    flat = engine.flatten(all_of_them)
    assert not any(leaf.any() for name, leaf in flat.items() if name.endswith("lora_b"))
    assert len({leaf.ravel()[0].item() for name, leaf in flat.items() if name.endswith("lora_a")}) == 14


def test_a_target_that_matches_nothing():
    config = config_lib.default()
    config.lora.rank, config.lora.targets = 4, ("double_blocks.img_attn.qkv", "blocks.to_q")
    sizes = architectures.published(config, "flux-dev")
    with pytest.raises(UserError, match=r"config\.lora\.targets: 'blocks\.to_q' matches no layer; there are double_bl"):
        program.build(config, sharding.make_mesh(config.mesh), sizes)


def test_the_default_targets():
    names = lora.layers(compute.bind(*folder.abstract("flux", tiny.FLUX)))
    chosen = lora.chosen(lora.Lora(1, 1.0, DEFAULT), names)
    assert set(names) - set(chosen) == {"double_blocks.img_mod", "double_blocks.txt_mod", "single_blocks.mod"}


@pytest.mark.parametrize(("kind", "gigabytes"), [("none", 23.80), ("int8", 12.15), ("nf4", 6.42)])
def test_bytes_of_flux_dev(kind, gigabytes):
    """What is stored, without a byte of it: the frozen transformer, and rank 16 with its two moments."""
    config = config_lib.default()
    config.lora.rank, config.lora.quantize = 16, kind
    sizes = architectures.published(config, "flux-dev")
    built = program.build(config, sharding.make_mesh(config.mesh), sizes)
    sizes = [nbytes(tree) for tree in (built.frozen.base, built.state.params)]
    assert sizes[0] / 1e9 == pytest.approx(gigabytes, abs=0.005)
    assert sizes[1] == 4 * 65_372_160
    assert nbytes(built.state) == 3 * sizes[1] + 4 * 2  # updates are counted twice


# --- the update -------------------------------------------------------------------------------------------------------

SETTINGS = lora.Lora(2, 4.0, EVERYTHING)


@pytest.fixture(scope="module")
def adapted():
    """``updates``' networks, with random factors beside the transformer."""
    networks, params, frozen = updates.make_networks(Compute())
    graphdef, _ = lora.abstract(folder.constructor("flux", updates.FLUX), SETTINGS)
    factors = jax.tree.map(jnp.asarray, random_factors(updates.FLUX, SETTINGS))
    return dataclasses.replace(networks, transformer=graphdef), factors, frozen._replace(base=params)


@pytest.fixture(scope="module")
def batch():
    return updates.make_batch()


@pytest.mark.parametrize("method", ["srpo", "direct_align", "refl", "draft_lv"])
def test_gradients_of_every_method_are_those_of_merged_weights(adapted, batch, method):
    """W' = W + s A B gives the same losses, and its gradient dW' those of the factors: s A' dW' and s dW' B'."""
    networks, factors, frozen = adapted
    recipe = updates.settings(method=method, margin=10.0)
    draws = updates.draw(networks, recipe)
    grads, values = updates.gradient((networks, factors, frozen), recipe, batch, draws)
    flat = engine.flatten(jax.device_get(factors))
    source = engine.MemorySource(engine.flatten(jax.device_get(frozen.base)))
    merged = weights_lora.MergedSource(source, flat, SETTINGS)
    params = engine.unflatten({name: merged.read(name) for name in merged.specs}, frozen.base)
    plain = dataclasses.replace(networks, transformer=updates.make_networks(Compute())[0].transformer)
    whole, expected = updates.gradient((plain, params, frozen._replace(base=None)), recipe, batch, draws)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5), values, expected)
    whole, found = engine.flatten(whole), engine.flatten(grads)
    assert {name.rpartition(".")[0] for name in found} == {name.rpartition(".")[0] for name in flat}
    for stem in {name.rpartition(".")[0] for name in flat}:
        kernel, a, b = whole[f"{stem}.kernel"], flat[f"{stem}.lora_a"], flat[f"{stem}.lora_b"]
        if a.ndim == 4:
            to_a = np.einsum("liphd,lprhd->lipr", kernel, b)
            to_b = np.einsum("liphd,lipr->lprhd", kernel, a)
        else:
            to_a, to_b = np.einsum("lio,lro->lir", kernel, b), np.einsum("lio,lir->lro", kernel, a)
        for kind, wanted in (("a", to_a), ("b", to_b)):
            assert relative_error(found[f"{stem}.lora_{kind}"], SETTINGS.scale * wanted) < 1e-3, stem


def test_blocks_apart_make_the_same_rollout(adapted, batch):
    networks, factors, frozen = adapted
    recipes = [updates.settings(rollout_unroll=unroll) for unroll in (False, True)]
    updates.assert_same_rollouts(networks, join(factors, frozen.base), batch, recipes)


def test_how_a_batch_passes_changes_nothing(adapted, batch):
    networks, factors, frozen = adapted
    optimizer = updates.sgd(1.0)
    states = []
    for changes in ({}, {"accumulation": 4}, {"accumulation": 2, "merge_terms": True, "reuse": 2}):
        recipe = updates.settings(ema_decay=0.5, **changes)
        blank = jnp.zeros((updates.BATCH, *updates.TOKENS))
        kept = Rollout(blank, blank) if recipe.reuse > 1 else None
        state = TrainState(jnp.int32(0), factors, optimizer.init(factors), factors, kept)
        state, _ = jax.jit(step.make_update(networks, recipe, optimizer))(state, frozen, batch, jax.random.key(0))
        states.append(jax.tree.map(lambda new, old: new - old, state.params, factors))
        average = jax.tree.map(lambda new, old: 0.5 * (new + old), state.params, factors)
        assert updates.distance(state.ema, average) < 1e-6
    for moved in states[1:]:
        assert updates.distance(moved, states[0]) < 1e-4


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recipe(models, compiled):
    every = dict(compilation_cache=compiled, lora__rank=2, lora__quantize="int8", optim__ema_decay=0.5, sample__every=2)
    return lambda **changes: tiny.config(models, **every | changes)


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory):
    """The workdir of an uninterrupted run of four updates beside an int8 base."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    assert train.train(recipe(steps=4), workdir) is None
    return workdir


def test_a_checkpoint_holds_factors_alone(whole):
    stored = runs.arrays(whole, 4)[0]
    assert len(stored) == 4 * 2 * 11 + 1  # weights, two moments and average of both factors of 11 layers; a counter
    assert all("lora_" in name or leaf.ndim == 0 for name, leaf in stored.items())
    assert all(leaf.any() for leaf in stored.values())
    assert record.lora(whole) == lora.Lora(2, 16.0, DEFAULT, "int8")


def test_sample_grids_show_the_factors_at_work(whole):
    first, last = (np.asarray(Image.open(whole / "samples" / f"{n:06d}.png"), np.int32) for n in (0, 4))
    assert np.abs(first - last).max() > 0


def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(whole, recipe, tmp_path):
    train.train(recipe(steps=2), tmp_path / "run")
    train.train(recipe(steps=4), tmp_path / "run")
    expected, found = runs.arrays(whole, 4)[0], runs.arrays(tmp_path / "run", 4)[0]
    assert expected.keys() == found.keys()
    assert not [name for name in expected if expected[name].tobytes() != found[name].tobytes()]
    numbers = [[record["loss"] for record in metrics.read(path)] for path in (whole, tmp_path / "run")]
    assert numbers[0] == numbers[1] and len(numbers[0]) == 4


def test_a_run_of_another_kind_is_refused(whole, recipe, tmp_path):
    with pytest.raises(UserError, match=r"lora\.quantize is 'int8' there, 'nf4' here"):
        train.train(recipe(steps=5, lora__quantize="nf4"), whole)
    with pytest.raises(UserError, match=r"lora\.rank is 2 there, 3 here"):
        train.train(recipe(steps=5, lora__rank=3), whole)


def test_benchmark_takes_a_lora_update_apart(recipe):
    """The parts' programs run, and the update's work is less than that of training all weights."""
    config, said = recipe(), []
    sizes = architectures.read(config)
    report = timing.benchmark(config, sizes, 1, ("rollout", "transformer", "optimizer"), said.append)
    plain = recipe(lora__rank=0, lora__quantize="none")
    full = work.update(plain, sizes)
    for part in ("transformer", "optimizer"):
        assert 0 < report["parts"][part]["model_flops"] < full[part].model


def test_training_starts_from_a_file(recipe, models, tmp_path):
    config = recipe(lora__init=str(tmp_path / "start.safetensors"), lora__quantize="none")
    settings = lora.Lora.from_config(config.lora)
    factors = engine.flatten(random_factors(tiny.FLUX, settings))
    write_file(config.lora.init, dict(weights_lora.exported(tiny.FLUX, factors, settings, weights_lora.DIFFUSERS)))
    built = program.build(config, sharding.make_mesh(config.mesh), architectures.read(config))
    state = program.initial_state(config, built)
    for tree in (state.params, state.ema):
        for name, leaf in engine.flatten(tree).items():
            np.testing.assert_allclose(leaf, factors[name], rtol=1e-6)


# --- what does not fit ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("lora.quantize", "int8", r"config\.lora\.quantize='int8': trained weights cannot be quantised"),
        ("lora.quantize", "int3", r"config\.lora\.quantize='int3': choose one of none, int8, nf4"),
        ("lora.init", "a.safetensors", r"config\.lora\.init='a\.safetensors': is for LoRA"),
        ("lora.rank", -1, r"config\.lora\.rank=-1: must not be negative"),
        ("lora.alpha", 0.0, r"config\.lora\.alpha=0\.0: must be greater than 0"),
        ("lora.targets", (), r"config\.lora\.targets=\[\]: name one or more layers"),
        ("lora.targets", ("(",), r"config\.lora\.targets: '\(' is not a regular expression"),
    ],
)
def test_bad_values_are_named(key, value, message):
    config = config_lib.default()
    config.update_from_flattened_dict({key: value})
    with pytest.raises(UserError, match=message) as error:
        validation.validate(config, paths=False)
    assert "\n" not in str(error.value)
