"""LoRA's files: what diffusers and ComfyUI read, what a run starts from, what is refused."""

import dataclasses

import diffusers
import jax
import numpy as np
import optax
import peft
import pytest
import safetensors.numpy
import torch
from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers
from helpers import references, tiny
from helpers.factors import EVERYTHING, random_factors
from PIL import Image

from srpo_jax import checkpoint, convert, generate, stored_weights
from srpo_jax import config as config_lib
from srpo_jax.algorithm.step import TrainState
from srpo_jax.errors import UserError
from srpo_jax.families.flux import DEV
from srpo_jax.models import lora
from srpo_jax.weights import adapters, engine, folder
from srpo_jax.weights import lora as weights_lora

DOUBLE = "double_blocks.*"  # what diffusers' conversion of kohya's files takes at any width


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return tiny.write_all(tmp_path_factory.mktemp("models"))


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
    config = dataclasses.replace(DEV.transformer, num_layers=0, num_single_layers=1)
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
    alphas = {name: tensor for name, tensor in tensors.items() if tensor.ndim == 0}
    assert {tensor.dtype for name, tensor in tensors.items() if name not in alphas} == {torch.bfloat16}
    assert bool(alphas) == (style == weights_lora.COMFYUI)


def test_a_file_as_a_start(pipelines, run, tmp_path):
    """What was exported comes back; so does what diffusers' pipeline saves, which notes the alpha."""
    settings, workdir = run
    config = folder.read_config(pipelines[1] / "transformer")[1]
    words = ["--source", str(pipelines[1]), "--target", str(tmp_path / "lora"), "--checkpoint", str(workdir)]
    convert.main(["export", *words, "--format", "lora-diffusers"])
    expected = engine.flatten(jax.tree.map(np.asarray, stored_weights.load_params(workdir)))
    pipeline = diffusers.FluxPipeline.from_pretrained(pipelines[0])
    pipeline.load_lora_weights(tmp_path / "lora", weight_name="pytorch_lora_weights.safetensors")
    state = peft.get_peft_model_state_dict(pipeline.transformer, adapter_name="default_0")
    metadata = {"transformer": dict(r=4, lora_alpha=2)}
    diffusers.FluxPipeline.save_lora_weights(
        tmp_path / "saved", transformer_lora_layers=state, transformer_lora_adapter_metadata=metadata["transformer"]
    )
    for path, factor in (("lora", 1.0), ("saved", 0.5)):  # half the alpha, half the product
        found = adapters.read(tmp_path / path, config, settings)
        assert found.keys() == expected.keys()
        for name, value in found.items():
            wanted = expected[name] * (factor if name.endswith("lora_b") else 1)
            np.testing.assert_allclose(value, wanted, rtol=1e-6, err_msg=name)


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
