"""LoRA: peft's forward pass and gradients, the update, training, and the files that diffusers and ComfyUI read."""

import dataclasses
import functools
import json

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import pytest
import references
import safetensors.numpy
import test_step
import tiny
import torch
from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers
from parity import relative_error
from PIL import Image

from srpo_jax import (
    architectures,
    benchmark,
    checkpoint,
    convert,
    flow,
    generate,
    metrics,
    program,
    sharding,
    step,
    train,
)
from srpo_jax import config as config_lib
from srpo_jax.errors import UserError
from srpo_jax.models import compute, lora
from srpo_jax.models.compute import Compute
from srpo_jax.models.flux import FluxConfig
from srpo_jax.step import TrainState
from srpo_jax.weights import engine, folder
from srpo_jax.weights import flux as tables
from srpo_jax.weights import lora as weights_lora
from srpo_jax.weights.files import SafetensorsFile

EVERYTHING = (".*",)
DOUBLE = "double_blocks.*"  # what diffusers' conversion of kohya's files takes at any width
DEFAULT = tuple(config_lib.default().lora.targets)
FLUX_DEV = architectures.FLUX_DEV


def random_factors(config: FluxConfig, settings: lora.Lora, seed: int = 0):
    """Factors of which none is 0."""
    like = lora.split(lora.abstract(config, Compute(), settings)[1])[0]
    generator = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: 0.2 * generator.normal(size=leaf.shape).astype(np.float32), like)


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
    image_ids, text_ids = flow.image_ids(rows, columns), flow.text_ids(text)
    cotangent = rng.normal(size=latents.shape).astype(np.float32)
    theirs = model(
        hidden_states=torch.tensor(latents), encoder_hidden_states=torch.tensor(words),
        pooled_projections=torch.tensor(pooled), timestep=torch.tensor(time), guidance=torch.tensor(guidance),
        img_ids=torch.tensor(np.asarray(image_ids)), txt_ids=torch.tensor(np.asarray(text_ids)),
    ).sample  # fmt: skip
    (theirs * torch.tensor(cotangent)).sum().backward()

    graphdef, like = lora.abstract(config, Compute(), settings)
    state = {name.replace(".base_layer", ""): p.detach().numpy()
             for name, p in model.named_parameters() if ".lora_" not in name}  # fmt: skip
    base = engine.to_params(tables.diffusers_rules(config), state, lora.split(like)[1])

    def product(factors):
        network = compute.bind(graphdef, compute.join(factors, base))
        ours = network(latents, words, pooled, time, guidance, jnp.asarray(image_ids), jnp.asarray(text_ids))
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
        lora.initial(lora.split(lora.abstract(tiny.FLUX, Compute(), lora.Lora(3, 3.0, t))[1])[0], 7)
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
    sizes = architectures.published(config, "flux-dev")[0]
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
    sizes = architectures.published(config, "flux-dev")[0]
    built = program.build(config, sharding.make_mesh(config.mesh), sizes)
    sizes = [nbytes(tree) for tree in (built.frozen.base, built.state.params)]
    assert sizes[0] / 1e9 == pytest.approx(gigabytes, abs=0.005)
    assert sizes[1] == 4 * 65_372_160
    assert nbytes(built.state) == 3 * sizes[1] + 4 * 2  # updates are counted twice


# --- the update -------------------------------------------------------------------------------------------------------

SETTINGS = lora.Lora(2, 4.0, EVERYTHING)


@pytest.fixture(scope="module")
def adapted():
    """``test_step``'s networks, with random factors beside the transformer."""
    networks, params, frozen = test_step.make_networks(Compute())
    graphdef, _ = lora.abstract(test_step.FLUX, Compute(), SETTINGS)
    factors = jax.tree.map(jnp.asarray, random_factors(test_step.FLUX, SETTINGS))
    return dataclasses.replace(networks, transformer=graphdef), factors, frozen._replace(base=params)


batch = test_step.batch


@pytest.mark.parametrize("method", ["srpo", "direct_align", "refl", "draft_lv"])
def test_gradients_of_every_method_are_those_of_merged_weights(adapted, batch, method):
    """W' = W + s A B gives the same losses, and its gradient dW' those of the factors: s A' dW' and s dW' B'."""
    networks, factors, frozen = adapted
    recipe = test_step.settings(method=method, margin=10.0)
    draws = step.draw(recipe, jax.random.key(0), test_step.BATCH)
    grads, values = test_step.gradient((networks, factors, frozen), recipe, batch, draws)
    flat = engine.flatten(jax.device_get(factors))
    source = engine.MemorySource(engine.flatten(jax.device_get(frozen.base)))
    merged = weights_lora.MergedSource(source, flat, SETTINGS)
    params = engine.unflatten({name: merged.read(name) for name in merged.specs}, frozen.base)
    plain = dataclasses.replace(networks, transformer=test_step.make_networks(Compute())[0].transformer)
    whole, expected = test_step.gradient((plain, params, frozen._replace(base=None)), recipe, batch, draws)
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


def test_how_a_batch_passes_changes_nothing(adapted, batch):
    networks, factors, frozen = adapted
    optimizer = test_step.sgd(1.0)
    states = []
    for changes in ({}, {"accumulation": 4}, {"accumulation": 2, "merge_terms": True, "reuse": 2}):
        recipe = test_step.settings(ema_decay=0.5, **changes)
        blank = jnp.zeros((test_step.BATCH, recipe.tokens, 64))
        kept = step.Rollout(blank, blank) if recipe.reuse > 1 else None
        state = TrainState(jnp.int32(0), factors, optimizer.init(factors), factors, kept)
        state, _ = jax.jit(step.make_update(networks, recipe, optimizer))(state, frozen, batch, jax.random.key(0))
        states.append(jax.tree.map(lambda new, old: new - old, state.params, factors))
        average = jax.tree.map(lambda new, old: 0.5 * (new + old), state.params, factors)
        assert test_step.distance(state.ema, average) < 1e-6
    for moved in states[1:]:
        assert test_step.distance(moved, states[0]) < 1e-4


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return tiny.write_all(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def recipe(models, tmp_path_factory):
    cache = str(tmp_path_factory.mktemp("xla"))
    every = dict(compilation_cache=cache, lora__rank=2, lora__quantize="int8", optim__ema_decay=0.5, sample__every=2)
    return lambda **changes: tiny.config(models, **every | changes)


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory):
    """The workdir of an uninterrupted run of four updates beside an int8 base."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    assert train.train(recipe(steps=4), workdir) is None
    return workdir


def arrays(workdir):
    return {
        f"{item}{name}": leaf
        for item in ("params", "opt_state", "ema")
        for name, leaf in tiny.read_arrays(workdir / "checkpoints" / "4" / item).items()
    }


def test_a_checkpoint_holds_factors_alone(whole):
    stored = arrays(whole)
    assert len(stored) == 4 * 2 * 11 + 1  # weights, two moments and average of both factors of 11 layers; a counter
    assert all("lora_" in name or leaf.ndim == 0 for name, leaf in stored.items())
    assert all(leaf.any() for leaf in stored.values())
    assert checkpoint.lora(whole) == lora.Lora(2, 16.0, DEFAULT, "int8")


def test_sample_grids_show_the_factors_at_work(whole):
    first, last = (np.asarray(Image.open(whole / "samples" / f"{n:06d}.png"), np.int32) for n in (0, 4))
    assert np.abs(first - last).max() > 0


def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(whole, recipe, tmp_path):
    train.train(recipe(steps=2), tmp_path / "run")
    train.train(recipe(steps=4), tmp_path / "run")
    expected, found = arrays(whole), arrays(tmp_path / "run")
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
    sizes = program.read_architecture(config)
    report = benchmark.benchmark(config, sizes, 1, ("rollout", "transformer", "optimizer"), said.append)
    plain = recipe(lora__rank=0, lora__quantize="none")
    full = benchmark.flops.update(plain, sizes)
    for part in ("transformer", "optimizer"):
        assert 0 < report["parts"][part]["model_flops"] < full[part].model


# --- files ------------------------------------------------------------------------------------------------------------


def write_run(path, config, settings, factors):
    """A workdir as training leaves it, with these factors."""
    path.mkdir(parents=True)
    content = config_lib.default()
    content.lora.rank, content.lora.alpha, content.lora.targets = settings.rank, settings.alpha, settings.targets
    (path / "config.json").write_text(config_lib.to_json(content))
    checkpoints = checkpoint.Checkpoints(path, keep=1)
    checkpoints.save(1, TrainState(jax.device_put(np.int32(1)), factors, optax.sgd(1.0).init(factors), None), {})
    checkpoints.close()
    return path


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    """(diffusers' folder, ours)."""
    path = tmp_path_factory.mktemp("pipeline")
    references.flux_pipeline(path / "diffusers")
    convert.import_folder(path / "diffusers", path / "ours")
    return path / "diffusers", path / "ours"


@pytest.fixture(scope="module", params=[EVERYTHING, (DOUBLE,)], ids=["all layers", "double blocks"])
def run(request, pipelines, tmp_path_factory):
    """(settings, workdir): alpha / rank is 3 / 2, a number that a float holds exactly."""
    settings = lora.Lora(4, 6.0, request.param)
    config = folder.read_config(pipelines[1] / "transformer")[1]
    path = tmp_path_factory.mktemp("run") / "workdir"
    return settings, write_run(path, config, settings, random_factors(config, settings))


LATENTS = np.random.default_rng(0).normal(size=(1, 4, 64)).astype(np.float32)


def theirs(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        "a red bird", height=32, width=32, num_inference_steps=3, guidance_scale=3.5, output_type="pil",
        latents=torch.tensor(LATENTS), max_sequence_length=references.TEXT_LENGTH,
    ).images  # fmt: skip
    return np.asarray(images[0], np.int32)


def ours(model, out, *words):
    np.savez(out.with_suffix(".npz"), latents=LATENTS)
    generate.main([
        f"--model={model}", "--prompt=a red bird", f"--out={out}", "--height=32", "--width=32", "--steps=3",
        f"--latents={out.with_suffix('.npz')}", *words,
    ])  # fmt: skip
    return np.asarray(Image.open(next(out.iterdir())), np.int32)


def test_what_diffusers_loads_draws_what_we_draw(pipelines, run, tmp_path):
    """The same picture four ways: our factors beside the weights, ours merged, diffusers' pipeline with the LoRA file,
    and with merged weights; for double blocks also from the file for ComfyUI."""
    settings, workdir = run
    diffusers_folder, source = pipelines
    plain = ours(source, tmp_path / "plain")
    expected = ours(source, tmp_path / "applied", f"--checkpoint={workdir}")
    assert np.abs(expected - plain).mean() > 2
    formats = [weights_lora.DIFFUSERS, *([weights_lora.COMFYUI] if settings.targets == (DOUBLE,) else [])]
    for name in (*formats, "diffusers"):
        words = ["--source", str(source), "--target", str(tmp_path / name), "--checkpoint", str(workdir)]
        convert.main(["export", *words, "--format", name])
    for name in formats:
        pipeline = diffusers.FluxPipeline.from_pretrained(diffusers_folder)
        assert np.abs(theirs(pipeline) - plain).max() <= 1
        subfolder, stem = weights_lora.PLACES[name]
        pipeline.load_lora_weights(tmp_path / name / subfolder, weight_name=f"{stem}.safetensors")
        assert np.abs(theirs(pipeline) - expected).max() <= 1, name
    merged = diffusers.FluxPipeline.from_pretrained(tmp_path / "diffusers")
    assert np.abs(theirs(merged) - expected).max() <= 1
    convert.main(["import", "--source", str(tmp_path / "diffusers"), "--target", str(tmp_path / "back")])
    assert np.abs(ours(tmp_path / "back", tmp_path / "merged") - expected).max() <= 1


def test_generating_beside_a_quantised_base(pipelines, run, tmp_path):
    _, workdir = run
    expected = ours(pipelines[1], tmp_path / "full", f"--checkpoint={workdir}")
    rough = ours(pipelines[1], tmp_path / "int8", f"--checkpoint={workdir}", "--quantize=int8")
    assert 0 < np.abs(rough - expected).mean() < 2


def test_the_file_for_comfyui_adds_what_was_trained(pipelines, run, tmp_path):
    """ComfyUI's sum, weight + alpha / R * up @ down by BFL's names, is what the merged export holds."""
    settings, workdir = run
    for name, words in (("lora", ["--format=lora-comfyui"]), ("merged", ["--format=bfl"]), ("base", ["--format=bfl"])):
        words += ["--source", str(pipelines[1] / "transformer"), "--target", str(tmp_path / name)]
        convert.main(["export", *words, *([] if name == "base" else ["--checkpoint", str(workdir)])])
    tensors = safetensors.numpy.load_file(tmp_path / "lora" / "loras" / "flux1-lora.safetensors")
    base, merged = (safetensors.numpy.load_file(tmp_path / name / "flux1.safetensors") for name in ("base", "merged"))
    used = set()
    for name, weight in base.items():
        key = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
        if f"{key}.alpha" in tensors:
            up, down, alpha = (tensors[f"{key}.{part}"] for part in ("lora_up.weight", "lora_down.weight", "alpha"))
            used |= {f"{key}.{part}" for part in ("lora_up.weight", "lora_down.weight", "alpha")}
            assert np.abs(merged[name] - weight).max() > 0.1
            weight = weight + alpha / down.shape[0] * up @ down
        np.testing.assert_allclose(merged[name], weight, atol=1e-5, err_msg=name)
    assert used == set(tensors) and len(used) == 3 * (2 * 10 + (3 * 3 if settings.targets == EVERYTHING else 0))


@pytest.mark.parametrize("targets", [("single_blocks.*",), ("single_blocks.qkv",), (r"single_blocks\.mlp_in",)])
def test_fused_layers_of_full_width_are_what_diffusers_takes_apart(targets):
    """Its conversion knows FLUX.1's widths alone."""
    config = dataclasses.replace(FLUX_DEV, num_layers=0, num_single_layers=1)
    settings = lora.Lora(2, 6.0, targets)
    factors = {}
    for name, shape in folder.shapes("flux", config).items():
        stem = name.removesuffix(".kernel")
        if stem in lora.chosen(settings, ["single_blocks." + n for n in ("mod", "qkv", "mlp_in", "out")]):
            for suffix, size in zip(("lora_a", "lora_b"), lora.factor_shapes(shape, 2), strict=True):
                factors[f"{stem}.{suffix}"] = np.random.default_rng(len(factors)).normal(size=size)
    comfyui, expected = (
        dict(weights_lora.exported(config, factors, settings, style)) for style in reversed(weights_lora.FORMATS)
    )
    found = _convert_kohya_flux_lora_to_diffusers({name: torch.tensor(np.array(t)) for name, t in comfyui.items()})

    def products(tensors):
        names = {name.split(".lora_")[0] for name in tensors}
        return {n: np.asarray(tensors[f"{n}.lora_B.weight"]) @ np.asarray(tensors[f"{n}.lora_A.weight"]) for n in names}

    found, expected = products(found), products(expected)
    assert expected.keys() <= found.keys()
    for name, value in found.items():  # of a fused layer that is adapted in part, it makes zeros for the rest
        np.testing.assert_allclose(value, expected.get(name, np.zeros_like(value)), atol=1e-5, err_msg=name)


@pytest.mark.parametrize("style", weights_lora.FORMATS)
def test_files_in_bfloat16(pipelines, run, tmp_path, style):
    words = ["--source", str(pipelines[1]), "--target", str(tmp_path / "out"), "--checkpoint", str(run[1])]
    convert.main(["export", *words, "--format", style, "--dtype", "bfloat16"])
    subfolder, stem = weights_lora.PLACES[style]
    tensors = safetensors.torch.load_file(tmp_path / "out" / subfolder / f"{stem}.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert "alpha" not in "".join(tensors) if style == weights_lora.DIFFUSERS else True


def write_file(path, tensors, **metadata):
    safetensors.numpy.save_file({name: np.ascontiguousarray(t) for name, t in tensors.items()}, path, metadata)
    return str(path)


def test_a_file_as_a_start(pipelines, run, tmp_path):
    """What was exported comes back; so does what diffusers' pipeline saves, which notes the alpha."""
    settings, workdir = run
    config = folder.read_config(pipelines[1] / "transformer")[1]
    words = ["--source", str(pipelines[1]), "--target", str(tmp_path / "lora"), "--checkpoint", str(workdir)]
    convert.main(["export", *words, "--format", "lora-diffusers"])
    expected = engine.flatten(jax.tree.map(np.asarray, checkpoint.load_params(workdir)))
    pipeline = diffusers.FluxPipeline.from_pretrained(pipelines[0])
    pipeline.load_lora_weights(tmp_path / "lora", weight_name="pytorch_lora_weights.safetensors")
    state = peft.get_peft_model_state_dict(pipeline.transformer, adapter_name="default_0")
    metadata = {"transformer": dict(r=4, lora_alpha=2)}
    diffusers.FluxPipeline.save_lora_weights(
        tmp_path / "saved", transformer_lora_layers=state, transformer_lora_adapter_metadata=metadata["transformer"]
    )
    for path, factor in (("lora", 1.0), ("saved", 0.5)):  # half the alpha, half the product
        file = SafetensorsFile(tmp_path / path / "pytorch_lora_weights.safetensors")
        found = weights_lora.imported(config, file, settings, file.metadata)
        assert found.keys() == expected.keys()
        for name, value in found.items():
            wanted = expected[name] * (factor if name.endswith("lora_b") else 1)
            np.testing.assert_allclose(value, wanted, rtol=1e-6, err_msg=name)


def test_training_starts_from_a_file(recipe, models, tmp_path):
    config = recipe(lora__init=str(tmp_path / "start.safetensors"), lora__quantize="none")
    settings = lora.Lora.from_config(config.lora)
    factors = engine.flatten(random_factors(tiny.FLUX, settings))
    write_file(config.lora.init, dict(weights_lora.exported(tiny.FLUX, factors, settings, weights_lora.DIFFUSERS)))
    built = program.build(config, sharding.make_mesh(config.mesh), program.read_architecture(config))
    state = program.initial_state(config, built)
    for tree in (state.params, state.ema):
        for name, leaf in engine.flatten(tree).items():
            np.testing.assert_allclose(leaf, factors[name], rtol=1e-6)


def test_files_that_are_no_start(tmp_path):
    settings = lora.Lora(2, 2.0, ("double_blocks.img_mlp.*",))
    factors = engine.flatten(random_factors(tiny.FLUX, settings))
    good = dict(weights_lora.exported(tiny.FLUX, factors, settings, weights_lora.DIFFUSERS))
    kohya = dict(weights_lora.exported(tiny.FLUX, factors, settings, weights_lora.COMFYUI))
    first = next(iter(good))
    half = dataclasses.replace(settings, targets=("double_blocks.img_mlp.in_layer",))
    cases = [
        ({name: t for name, t in good.items() if name != first}, settings, {}, "lacks transformer.transformer_bl"),
        (good, dataclasses.replace(settings, rank=3), {}, r"shapes \(2, 64\) and \(256, 2\); lora.rank=3"),
        (good, half, {}, "holds 2 tensors that lora.targets does not name"),
        (kohya, settings, {}, "has kohya's names"),
        (good, settings, {"transformer.use_dora": True}, "use_dora, which is not supported"),
    ]
    for number, (tensors, wanted, note, message) in enumerate(cases):
        path = write_file(tmp_path / f"{number}.safetensors", tensors, lora_adapter_metadata=json.dumps(note))
        with pytest.raises(UserError, match=message):
            weights_lora.imported(tiny.FLUX, SafetensorsFile(path), wanted, SafetensorsFile(path).metadata)


# --- what does not fit ------------------------------------------------------------------------------------------------


def test_factors_of_another_base(run, models, tmp_path):
    words = ["--source", str(models / "pipeline"), "--target", str(tmp_path / "out"), "--checkpoint", str(run[1])]
    message = r"LoRA is not of .*transformer.*: \d+ layers differ, as double_blocks\.img_attn\.proj \(A \(2, 32, 4\)"
    for style in ("lora-diffusers", "lora-comfyui", "diffusers"):
        with pytest.raises(UserError, match=message):
            convert.main(["export", *words, "--format", style])
    with pytest.raises(UserError, match=message):
        words = [f"--model={models / 'pipeline'}", "--prompt=a", f"--out={tmp_path / 'out'}"]
        generate.main([*words, f"--checkpoint={run[1]}"])
    assert not (tmp_path / "out").exists()


def test_a_full_run_has_no_factors(pipelines, tmp_path):
    _, _, params = folder.load(pipelines[1] / "transformer", "flux")
    settings = lora.Lora(1, 1.0, EVERYTHING)
    workdir = write_run(tmp_path / "run", None, dataclasses.replace(settings, rank=0), params)
    words = ["export", "--source", str(pipelines[1]), "--target", str(tmp_path / "out"), "--format", "lora-diffusers"]
    with pytest.raises(UserError, match=r"config\.lora\.rank; .*run trained all weights"):
        convert.main([*words, "--checkpoint", str(workdir)])
    with pytest.raises(UserError, match=r"config\.lora\.rank; no --checkpoint is given"):
        convert.main(words)
    with pytest.raises(UserError, match="--quantize=int8 is for the base of a LoRA run"):
        words = [f"--model={pipelines[1]}", "--prompt=a", "--out=o", "--quantize=int8"]
        generate.main([*words, f"--checkpoint={workdir}"])


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
        config_lib.validate(config, paths=False)
    assert "\n" not in str(error.value)
