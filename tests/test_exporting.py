"""The dtypes that exports are stored in: what is rounded, what is not, what does not fit."""

import os

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
import torch
from helpers import tiny

from srpo_jax import convert
from srpo_jax.errors import UserError
from srpo_jax.models import lora
from srpo_jax.weights import engine, folder
from srpo_jax.weights import lora as weights_lora
from srpo_jax.weights.files import SafetensorsFile


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """A pipeline of ours, float32."""
    return tiny.write_pipeline(tmp_path_factory.mktemp("models") / "pipeline")


def export(source, out, *words):
    convert.main(["export", "--source", str(source), "--target", str(out), *words])
    return {str(file.relative_to(out)): safetensors.torch.load_file(file) for file in out.rglob("*.safetensors")}


def test_float8_is_for_the_matrices_of_the_transformer_and_t5(pipeline, tmp_path):
    """As torch rounds them; vectors, and the two small networks, are bfloat16. It comes back as it was stored."""
    expected = export(pipeline, tmp_path / "full", "--format", "comfyui")
    found = export(pipeline, tmp_path / "eight", "--format", "comfyui", "--dtype", "float8")
    assert found.keys() == expected.keys() and len(found) == 4
    for file, tensors in expected.items():
        for name, tensor in tensors.items():
            small = tensor.ndim > 1 and ("flux1" in file or "t5xxl" in file)
            dtype = torch.float8_e4m3fn if small else torch.bfloat16
            assert found[file][name].dtype == dtype, name
            assert torch.equal(found[file][name].float(), tensor.to(dtype).float()), name
    # ComfyUI takes the dtype that most of a transformer's numbers have for that of all (utils.weight_dtype).
    counts = {}
    for tensor in found["diffusion_models/flux1.safetensors"].values():
        counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.numel()
    assert max(counts, key=counts.get) == torch.float8_e4m3fn
    config = pipeline / "transformer" / folder.CONFIG
    file = tmp_path / "eight" / "diffusion_models" / "flux1.safetensors"
    convert.import_folder(file, tmp_path / "back", config=config)
    back = SafetensorsFile(tmp_path / "back" / folder.WEIGHTS)
    plain = SafetensorsFile(pipeline / "transformer" / folder.WEIGHTS)
    kernel = "double_blocks.img_attn.qkv.kernel"
    assert np.array_equal(back.read(kernel), plain.read(kernel).astype(ml_dtypes.float8_e4m3fn))


@pytest.mark.parametrize("style", ["diffusers", "bfl", "comfyui"])
def test_float16_is_for_everything(pipeline, tmp_path, style):
    expected = export(pipeline, tmp_path / "full", "--format", style)
    found = export(pipeline, tmp_path / "half", "--format", style, "--dtype", "float16")
    assert found.keys() == expected.keys()
    for file, tensors in expected.items():
        assert {name: t.dtype for name, t in found[file].items()} == dict.fromkeys(tensors, torch.float16)
        assert all(torch.equal(found[file][name], tensor.half()) for name, tensor in tensors.items())


@pytest.mark.parametrize("stored", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize(("dtype", "value", "fits"), [("float16", 70000, 65504), ("float8", -500, 448)])
def test_numbers_beyond_a_dtype_are_refused(pipeline, tmp_path, stored, dtype, value, fits):
    """float16 would make them infinite, float8 no number at all. The largest number passes, and so does bfloat16."""
    _, config, source = folder.open_weights(pipeline / "transformer")
    arrays = {name: source.read(name).astype(stored) for name in source.specs}
    like = folder.abstract("flux", config)[1]

    def write(path, number):
        kernel = arrays["single_blocks.out.kernel"].copy()
        kernel[1, 2, 3] = number
        folder.save(path, "flux", config, engine.unflatten(arrays | {"single_blocks.out.kernel": kernel}, like))
        return path

    words = ("--format", "bfl", "--dtype", dtype)
    if stored == np.float32:
        export(write(tmp_path / "fits", fits), tmp_path / "out", *words)
    large = write(tmp_path / "large", value)
    limit = (
        rf"single_blocks\.1\.linear2\.weight holds {abs(value)}.*{dtype}.* ends at {fits}; choose bfloat16 or float32"
    )
    if stored != np.float32:
        limit = limit.replace(str(abs(value)), r"\d+")
    with pytest.raises(UserError, match=limit):
        export(large, tmp_path / "no", *words)
    assert not (tmp_path / "no").exists() and not [name for name in os.listdir(tmp_path) if "partial" in name]
    export(large, tmp_path / "wide", "--format", "bfl", "--dtype", "bfloat16")


def test_what_float8_is_not_for(pipeline, tmp_path):
    with pytest.raises(UserError, match="--dtype float8 is for --format comfyui and bfl"):
        export(pipeline, tmp_path / "no", "--format", "diffusers", "--dtype", "float8")
    settings = lora.Lora(2, 2.0, (".*",))
    with pytest.raises(UserError, match="--dtype float8 is for whole weights; --format lora-comfyui takes"):
        convert.export_lora(pipeline, tmp_path / "no", "lora-comfyui", {}, settings, convert.EXPORT_DTYPES["float8"])
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_alphas_are_not_rounded(pipeline, tmp_path, dtype):
    """bfloat16 makes 260 of 261, and a reader would scale the product by it."""
    settings = lora.Lora(2, 261.0, (r"double_blocks\.img_mlp\.in_layer",))
    config = folder.read_config(pipeline / "transformer")[1]
    like = lora.split(lora.abstract(folder.constructor("flux", config), settings)[1])[0]
    factors = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), like)
    convert.export_lora(
        pipeline, tmp_path / "out", weights_lora.COMFYUI, factors, settings, convert.EXPORT_DTYPES[dtype]
    )
    tensors = safetensors.torch.load_file(tmp_path / "out" / "loras" / "flux1-lora.safetensors")
    alphas = [tensor for name, tensor in tensors.items() if name.endswith(".alpha")]
    assert [alpha.item() for alpha in alphas] == [261.0] * tiny.FLUX.num_layers
    assert {str(tensor.dtype) for tensor in tensors.values() if tensor.ndim} == {f"torch.{dtype}"}
