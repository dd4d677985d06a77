"""Files that hold none of our networks are called by their names."""

import json

import diffusers
import numpy as np
import pytest
import safetensors.numpy
import torch
from helpers import references, tiny

from srpo_jax import convert, generate
from srpo_jax.errors import UserError
from srpo_jax.weights import folder, sources
from srpo_jax.weights.files import SafetensorsFile

SMALL = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2}
# diffusers' own networks, so the names are those that it writes.
NETWORKS = {
    "Flux2Transformer2DModel": ("a FLUX.2 transformer", SMALL | {"axes_dims_rope": (4, 4, 4, 4)}),
    "ChromaTransformer2DModel": (
        "a Chroma transformer",
        SMALL | {"approximator_num_channels": 8, "approximator_hidden_dim": 8, "approximator_layers": 1},
    ),
    "QwenImageTransformer2DModel": (
        "a Qwen-Image transformer",
        {"num_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2, "axes_dims_rope": (4, 6, 6)},
    ),
    "HunyuanVideoTransformer3DModel": ("a HunyuanVideo transformer", SMALL | {"num_refiner_layers": 1}),
    "OvisImageTransformer2DModel": ("an Ovis-Image transformer", SMALL),
    "HiDreamImageTransformer2DModel": ("a HiDream transformer", SMALL | {"caption_channels": (8, 8), "patch_size": 2}),
    "Lumina2Transformer2DModel": ("a Lumina 2 or Z-Image transformer", {"num_layers": 1}),
    "ZImageTransformer2DModel": ("a Lumina 2 or Z-Image transformer", {"n_layers": 1, "n_refiner_layers": 1}),
    "SD3Transformer2DModel": ("a Stable Diffusion 3 transformer", {"num_layers": 1}),
    "WanTransformer3DModel": ("a Wan transformer", {"num_layers": 1}),
}  # fmt: skip
# The models' own files. Where a name is from: [1] black-forest-labs/flux2's model.py, [2] the marks that ComfyUI's
# model_detection.py looks for, [3] black-forest-labs/flux's modules/image_embedders.py.
OWN_FILES = {
    "a FLUX.2 transformer": ["double_stream_modulation_img.lin.weight", "double_blocks.0.img_attn.qkv.weight"],  # [1]
    "a Chroma transformer": ["distilled_guidance_layer.norms.0.scale", "double_blocks.0.img_attn.qkv.weight"],  # [2]
    "a Qwen-Image transformer": ["txt_norm.weight", "transformer_blocks.0.img_mod.1.weight", "img_in.weight"],  # [2]
    "a HunyuanVideo transformer": [
        "txt_in.individual_token_refiner.blocks.0.norm1.weight",
        "double_blocks.0.img_attn.qkv.weight",
    ],  # [2]
    "an Ovis-Image transformer": [
        "double_blocks.0.img_mlp.gate_proj.weight",
        "double_blocks.0.img_attn.qkv.weight",
    ],  # [2]
    "FLUX.1 Redux's image encoder": ["redux_up.weight", "redux_down.weight"],  # [3]
    "a ControlNet": ["controlnet_x_embedder.weight", "transformer_blocks.0.attn.to_q.weight"],  # diffusers
    "a U-Net of Stable Diffusion": ["down_blocks.0.resnets.0.conv1.weight"],
    "a Stable Diffusion 3 transformer": ["joint_blocks.0.context_block.attn.qkv.weight"],  # [2]
}  # fmt: skip


def write(path, names):
    safetensors.numpy.save_file({name: np.zeros(2, np.float32) for name in names}, path)
    return path


def refusal(path, out):
    """The message of import, which is that of inspect."""
    with pytest.raises(UserError) as imported:
        convert.import_folder(path, out)
    with pytest.raises(UserError) as inspected:
        list(convert.describe(path))
    assert str(imported.value) == str(inspected.value) and not out.exists()
    return str(imported.value)


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_diffusers(tmp_path, name):
    words, sizes = NETWORKS[name]
    with torch.device("meta"):
        names = getattr(diffusers, name)(**sizes).state_dict()
    path = write(tmp_path / "diffusion_pytorch_model.safetensors", names)
    assert refusal(path, tmp_path / "out") == f"{path} is {words}, which is not supported"
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": name}))
    assert refusal(tmp_path, tmp_path / "out") == f"{path} is {words}, which is not supported"


@pytest.mark.parametrize("words", OWN_FILES)
def test_the_models_own_files(tmp_path, words):
    path = write(tmp_path / "a.safetensors", OWN_FILES[words])
    assert refusal(path, tmp_path / "out") == f"{path} is {words}, which is not supported"


@pytest.mark.parametrize("suffix", ["comfy_quant", "weight_scale", "weight_scale_2", "scale_weight", "SCB", "qweight"])
def test_quantised_files(tmp_path, suffix):
    """ComfyUI's marks (quant_ops.py), bitsandbytes' and GPTQ's, beside all names of the network."""
    names = references.flux_transformer().state_dict()
    path = write(tmp_path / "a.safetensors", [*names, f"transformer_blocks.0.attn.to_q.{suffix}"])
    assert "looks like a quantised checkpoint: use the original weights" in refusal(path, tmp_path / "out")


def test_a_part_of_flux_holds_names_of_flux_alone(tmp_path):
    names = [n for n in references.flux_transformer().state_dict() if n.startswith("single_transformer_blocks.")]
    assert "a part of a FLUX transformer" in refusal(write(tmp_path / "a.safetensors", names), tmp_path / "out")
    path = write(tmp_path / "b.safetensors", [*names, "single_transformer_blocks.0.extra.weight"])
    assert "looks like no network that is known here" in refusal(path, tmp_path / "out")
    # What the config says of a network that no name tells.
    path = write(tmp_path / "model.safetensors", ["layers.0.weight"])
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "NewTransformer2DModel"}))
    assert "is what its config.json says, a NewTransformer2DModel, which is not" in refusal(tmp_path, tmp_path / "out")


@pytest.mark.parametrize(("inputs", "words"), [(384, "FLUX.1 Fill"), (128, "FLUX.1 Canny or Depth")])
def test_variants_of_flux_with_more_inputs(tmp_path, inputs, words):
    """Where it is imported, and before `generate` starts where it was imported by an older version."""
    sizes = {"attention_head_dim": 128, "num_attention_heads": 1, "axes_dims_rope": (16, 56, 56), "num_layers": 1}
    reference = references.flux_transformer(in_channels=inputs, out_channels=64, num_single_layers=1, **sizes)
    reference.save_pretrained(tmp_path / "theirs")
    message = f"in_channels {inputs} and out_channels 64 are {words}'s, which is not supported"
    with pytest.raises(UserError, match=message):
        convert.import_folder(tmp_path / "theirs", tmp_path / "out")
    (tmp_path / "theirs" / "config.json").unlink()
    with pytest.raises(UserError, match=message):
        convert.import_folder(tmp_path / "theirs", tmp_path / "out")
    tiny.write_pipeline(tmp_path / "ours")
    config = tmp_path / "ours" / "transformer" / folder.CONFIG
    content = json.loads(config.read_text())
    content["config"]["in_channels"] = inputs
    config.write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        generate.main(
            [f"--model={tmp_path / 'ours'}", "--prompt=a", f"--out={tmp_path / 'o'}", "--height=32", "--width=32"]
        )


# --- names of files ---


@pytest.mark.parametrize("shard", ["10GB", "60KB"], ids=["one file", "shards"])
def test_variants_of_diffusers_files(tmp_path, shard):
    """``variant="fp16"``, as diffusers writes it; the plain files go first where both are there."""
    reference = references.flux_transformer()
    reference.save_pretrained(tmp_path / "plain")
    reference.save_pretrained(tmp_path / "fp16", variant="fp16", max_shard_size=shard)
    assert all("fp16" in file.name for file in (tmp_path / "fp16").iterdir() if file.name != "config.json")
    convert.import_folder(tmp_path / "plain", tmp_path / "expected")
    convert.import_folder(tmp_path / "fp16", tmp_path / "found")
    expected, found = ((tmp_path / name / folder.WEIGHTS).read_bytes() for name in ("expected", "found"))
    assert found == expected
    half = tmp_path / "both"
    reference.half().save_pretrained(half, variant="fp16", max_shard_size=shard)
    references.flux_transformer().save_pretrained(half)
    convert.import_folder(half, tmp_path / "again")
    assert (tmp_path / "again" / folder.WEIGHTS).read_bytes() == expected


def test_names_in_a_folder(tmp_path):
    for name in ("model.fp16.safetensors", "open_clip_pytorch_model.safetensors", "pytorch_model.bf16.bin"):
        place = tmp_path / name.replace(".", "_")
        place.mkdir()
        write(place / name, ["a"])
        assert sources.open_source(place).path == place / name
    write(tmp_path / "model_fp16_safetensors" / "model.bf16.safetensors", ["a"])
    with pytest.raises(UserError, match=r"several variants: model\.bf16\.safetensors, model\.fp16\.safetensors; give"):
        sources.open_source(tmp_path / "model_fp16_safetensors")
    (tmp_path / "hub").mkdir()
    write(tmp_path / "hub" / "HPS_v2.1.safetensors", ["a"])
    with pytest.raises(UserError, match=r"under a usual name, .*; give the file itself, as .*/hub/HPS_v2\.1\.safetens"):
        sources.open_source(tmp_path / "hub")


def test_metadata_that_is_no_object(tmp_path):
    text = b'{"__metadata__": [1], "a": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}'
    (tmp_path / "a.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(UserError, match="its __metadata__ is no object"):
        SafetensorsFile(tmp_path / "a.safetensors")
