"""What the converter refuses, what a fault leaves (nothing), and what it says that a path is."""

import json
import os
import shutil

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from helpers import references

from srpo_jax import convert, importing
from srpo_jax.errors import UserError
from srpo_jax.weights import files
from srpo_jax.weights.files import SafetensorsFile


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """A diffusers pipeline folder in bfloat16, its transformer and autoencoder in several files."""
    path = tmp_path_factory.mktemp("diffusers") / "pipeline"
    references.flux_pipeline(path, torch.bfloat16, shard="100KB")
    return path


@pytest.fixture(scope="module")
def ours(pipeline, tmp_path_factory):
    """The same pipeline in our format."""
    path = tmp_path_factory.mktemp("ours") / "pipeline"
    convert.import_folder(pipeline, path)
    return path


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return references.save_clip(tmp_path_factory.mktemp("clip") / "hf")


LOOKS = {
    "transformer_blocks.0.attn.to_q.lora_A.weight": "a LoRA",
    "lora_unet_double_blocks_0_img_attn_proj.lora_down.weight": "a LoRA",
    "model.diffusion_model.input_blocks.0.0.weight": "an all-in-one checkpoint",
    "double_blocks.0.img_attn.qkv.scale_weight": "a quantised checkpoint",
    "decoder.block.0.layer.0.SelfAttention.q.weight": "a T5 with its decoder",
    "model.layers.0.self_attn.q_proj.weight": "a language model",
    "something.weight": "no network that is known here \\(2 tensors, as ",
}


@pytest.mark.parametrize("name", LOOKS)
def test_wrong_kind_says_what_it_looks_like(tmp_path, name):
    path = tmp_path / "file.safetensors"
    safetensors.numpy.save_file({name: np.zeros(2, np.float32), "first_stage": np.zeros(2, np.float32)}, path)
    for function in (lambda: convert.import_folder(path, tmp_path / "out"), lambda: list(convert.describe(path))):
        with pytest.raises(UserError, match=f"file.safetensors looks like {LOOKS[name]}"):
            function()
    assert not (tmp_path / "out").exists()


def test_wrong_network_config_and_pipeline(pipeline, clip, ours, tmp_path):
    out = tmp_path / "out"
    for arguments, words in (
        ((pipeline / "vae", out, "flux"), r"looks like autoencoder \(diffusers\); expected flux"),
        ((pipeline / "vae", out, None, "bfl"), r"looks like autoencoder \(diffusers\); expected bfl"),
        ((clip, out, "clip_text"), r"looks like clip \(hf\); expected clip_text"),
        ((pipeline, out, "flux"), "whole pipeline, for which --network has no meaning"),
        ((ours, out), "in our format already"),
        ((ours / "vae", out), "in our format already"),
        ((tmp_path / "none", out), "does not exist"),
        ((pipeline / "tokenizer", out), "no weights under a usual name"),
    ):
        with pytest.raises(UserError, match=words):
            convert.import_folder(*arguments)
    shutil.copytree(pipeline / "vae", tmp_path / "mixed")
    shutil.copy(pipeline / "transformer" / "config.json", tmp_path / "mixed" / "config.json")
    with pytest.raises(UserError, match="describes FluxTransformer2DModel, but the weights look like autoencoder"):
        convert.import_folder(tmp_path / "mixed", out)
    config = json.loads((pipeline / "vae" / "config.json").read_text())
    (tmp_path / "mixed" / "config.json").write_text(json.dumps(config | {"act_fn": "relu"}))
    with pytest.raises(UserError, match="act_fn"):
        convert.import_folder(tmp_path / "mixed", out)
    index = json.loads((pipeline / importing.INDEX).read_text())
    (tmp_path / "pipe").mkdir()
    for content, words in (
        (index | {"_class_name": "StableDiffusionXLPipeline"}, "describes a StableDiffusionXLPipeline"),
        (index, "lacks the folders transformer, vae, text_encoder, text_encoder_2, tokenizer"),
    ):
        (tmp_path / "pipe" / importing.INDEX).write_text(json.dumps(content))
        with pytest.raises(UserError, match=words):
            convert.import_folder(tmp_path / "pipe", out)
    for source in (pipeline, tmp_path / "none", clip):
        with pytest.raises(UserError, match="is not a folder made by"):
            convert.export_folder(source, out, "diffusers")
    with pytest.raises(UserError, match="choose diffusers, bfl, comfyui"):
        convert.export_folder(ours, out, "gguf")
    for style in ("bfl", "comfyui"):
        part = {"bfl": ours / "text_encoder", "comfyui": tmp_path / "reward"}[style]
        if style == "comfyui":
            convert.import_folder(clip, part)
        with pytest.raises(UserError, match=f"{style} has no place for .*, a .* network; use --format diffusers"):
            convert.export_folder(part, out, style)
    shutil.rmtree(tmp_path / "reward")
    with pytest.raises(UserError, match="rewards that read words; .* is a network of the kind autoencoder"):
        convert.import_folder(pipeline / "vae", out, tokenizer=pipeline / "tokenizer")
    assert sorted(os.listdir(tmp_path)) == ["mixed", "pipe"]


def edit_shard(part, change):
    """Rewrites the one shard that holds the tensor named in ``change`` (or the last), by ``change(arrays)``."""
    file = sorted(part.glob("*.safetensors"))[-1]
    arrays = safetensors.numpy.load_file(file)
    change(arrays)
    safetensors.numpy.save_file(arrays, file, {"format": "pt"})
    index = part / "diffusion_pytorch_model.safetensors.index.json"
    names = {name: f.name for f in part.glob("*.safetensors") for name in SafetensorsFile(f).specs}
    index.write_text(json.dumps({"weight_map": names}))


@pytest.mark.parametrize(
    "fault", ["missing", "unused", "shape", "truncated", "pointer", "lost shard", "interrupt", "disk full"]
)
def test_a_fault_in_a_late_component_leaves_nothing(pipeline, tmp_path, fault, monkeypatch):
    source, target = tmp_path / "in", tmp_path / "sub" / "out"
    shutil.copytree(pipeline, source)
    part = source / "vae"
    last = sorted(part.glob("*.safetensors"))[-1]
    error, words = UserError, ""
    if fault == "missing":
        edit_shard(part, lambda arrays: arrays.pop(sorted(arrays)[0]))
        words = "autoencoder network: 1 missing: "
    elif fault == "unused":
        edit_shard(part, lambda arrays: arrays.update(extra=np.zeros(2, np.float32)))
        words = "autoencoder network: 1 not used: extra"
    elif fault == "shape":
        edit_shard(part, lambda arrays: arrays.update({sorted(arrays)[0]: np.zeros((2, 9), np.float32)}))
        words = r"1 wrong shape: .* \[2, 9\] instead of "
    elif fault == "truncated":
        last.write_bytes(last.read_bytes()[:-7])
        words = "cut short .* download it, or convert it, again"
    elif fault == "pointer":
        last.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
        words = "git-lfs pointer"
    elif fault == "lost shard":
        last.unlink()
        words = "names files that are not there"
    elif fault == "disk full":
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
        words = "0.0 GB free; the pipeline needs"
    else:
        write, count, error = files.SafetensorsWriter.write, [], KeyboardInterrupt

        def interrupted(self, *arguments):
            count.append(1)
            if len(count) > 60:
                raise KeyboardInterrupt
            write(self, *arguments)

        monkeypatch.setattr(files.SafetensorsWriter, "write", interrupted)
    with pytest.raises(error, match=words or None) as caught:
        convert.import_folder(source, target)
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path / "sub") == []


def test_nothing_is_overwritten(pipeline, ours, tmp_path):
    (tmp_path / "mine").write_text("precious")
    for target in (tmp_path, tmp_path / "mine"):
        with pytest.raises(UserError, match="exists already"):
            convert.import_folder(pipeline / "vae", target)
        with pytest.raises(UserError, match="exists already"):
            convert.export_folder(ours / "vae", target, "diffusers")
    assert os.listdir(tmp_path) == ["mine"] and (tmp_path / "mine").read_text() == "precious"


# --- inspect ---


def test_inspect_says_what_a_path_is(pipeline, ours, clip, tmp_path, capsys):
    def inspect(path):
        convert.main(["inspect", str(path)])
        return capsys.readouterr().out

    text = inspect(pipeline)
    assert "FLUX.1 pipeline, diffusers folder" in text and text.count("complete: every tensor fits") == 4
    for words in ("flux (diffusers)", "autoencoder (diffusers)", "clip_text (hf)", "t5 (hf)"):
        assert words in text
    parameters = sum(p.numel() for p in references.flux_transformer().parameters())
    assert f"{parameters:,} parameters" in text and "x bfloat16" in text
    assert "   2 x transformer_blocks.*.attn.to_q.weight [32, 32] bfloat16" in text
    text = inspect(ours / "transformer")
    assert "flux, our format" in text and f"{parameters:,} parameters" in text and "num_single_layers=3" in text
    assert "our format" in inspect(ours).splitlines()[0]
    arrays = safetensors.numpy.load_file(clip / "model.safetensors")
    del arrays["logit_scale"]
    safetensors.numpy.save_file(arrays, tmp_path / "model.safetensors")
    shutil.copy(clip / "config.json", tmp_path)
    assert "does not convert as it is" in inspect(tmp_path) and "1 missing: logit_scale" in inspect(tmp_path)
