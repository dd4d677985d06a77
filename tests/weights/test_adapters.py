"""LoRA files that people have, read as factors: peft's, kohya's, BFL's names; and what is refused in them."""

import dataclasses
import json
import math
import re

import ml_dtypes
import numpy as np
import peft
import pytest
import safetensors.numpy
import torch
from helpers import references, tiny

from srpo_jax import convert
from srpo_jax.errors import UserError
from srpo_jax.models import lora
from srpo_jax.models.flux import Flux
from srpo_jax.weights import adapters, engine, flux, folder
from srpo_jax.weights import lora as weights_lora

RANK, ALPHA = 2, 7.0
EVERYTHING = (".*",)


def random_factors(config, settings):
    """Factors of which none is 0, by path."""
    generator = np.random.default_rng(0)
    like = engine.flatten(lora.split(lora.abstract(folder.constructor("flux", config), settings)[1])[0])
    return {name: generator.normal(size=leaf.shape).astype(np.float32) for name, leaf in like.items()}


def write_file(path, tensors, **metadata):
    safetensors.numpy.save_file({name: np.array(t, order="C") for name, t in tensors.items()}, path, metadata)
    return path


def products(config, factors, settings):
    """What factors add to the weights, by BFL's names: from the file for ComfyUI, alpha / R * up @ down."""
    tensors = dict(weights_lora.exported(config, factors, settings, weights_lora.COMFYUI))
    stems = {name.removesuffix(".alpha") for name in tensors if name.endswith(".alpha")}
    return {
        stem: tensors[f"{stem}.alpha"] / len(tensors[f"{stem}.lora_down.weight"])
        * tensors[f"{stem}.lora_up.weight"] @ tensors[f"{stem}.lora_down.weight"]
        for stem in stems
    }  # fmt: skip


# --- peft ---


@pytest.fixture(scope="module")
def transformer(tmp_path_factory):
    """(diffusers' transformer, our config of it)."""
    path, network = tmp_path_factory.mktemp("transformer"), references.flux_transformer()
    network.save_pretrained(path / "theirs")
    convert.import_folder(path / "theirs", path / "ours")
    return network, folder.read_config(path / "ours")[1]


# peft's patterns of the layers of tiny double blocks' MLPs and all attention, and ours.
MODULES = r".*(to_q|to_k|to_v|ff\.net\.0\.proj|ff_context\.net\.2)"
TARGETS = (r"double_blocks\.img_attn\.qkv", r"double_blocks\.img_mlp\.in_layer", r"double_blocks\.txt_mlp\.out_layer",
           r"single_blocks\.qkv")  # fmt: skip


@pytest.fixture
def adapted(transformer, tmp_path):
    """Makes an adapter with peft and saves it: ``(folder, what it adds to diffusers' weights, our settings)``."""

    def make(**changes):
        network = references.flux_transformer()
        config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=MODULES, **changes)
        model = peft.get_peft_model(network, config)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator))
        path = tmp_path / "peft"
        model.save_pretrained(path)
        added = {
            name.removeprefix("base_model.model."): module.get_delta_weight("default").detach().numpy()
            for name, module in model.named_modules()
            if hasattr(module, "get_delta_weight")
        }
        return path, added, lora.Lora(RANK, 3.0, TARGETS)

    return make


def diffusers_products(config, factors, settings):
    tensors = dict(weights_lora.exported(config, factors, settings, weights_lora.DIFFUSERS))
    stems = {name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")}
    return {
        stem.removeprefix("transformer."): tensors[f"{stem}.lora_B.weight"] @ tensors[f"{stem}.lora_A.weight"]
        for stem in stems
    }


@pytest.mark.parametrize("changes", [{}, {"use_rslora": True}], ids=["plain", "rank-stabilised"])
def test_pefts_adapters_add_what_they_add_in_peft(transformer, adapted, changes):
    """As saved, as a file, with the adapter's name in the names, and renamed by hand with the config beside it."""
    path, added, settings = adapted(**changes)
    tensors = safetensors.numpy.load_file(path / "adapter_model.safetensors")
    assert all(name.startswith("base_model.model.") for name in tensors) and len(tensors) == 2 * len(added)
    named = path / "named.safetensors"
    safetensors.numpy.save_file({n.replace(".weight", ".default.weight"): t for n, t in tensors.items()}, named)
    renamed = path / "renamed.safetensors"
    changed = {n.replace("base_model.model.", "transformer."): t for n, t in tensors.items()}
    safetensors.numpy.save_file(changed, renamed)
    for file in (path, path / "adapter_model.safetensors", named, renamed):
        factors = adapters.read(file, transformer[1], settings)
        found = diffusers_products(transformer[1], factors, settings)
        assert found.keys() == added.keys()
        for name, value in added.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-5, err_msg=name)
    # Without the config nothing names an alpha, and the products count as they are.
    (path / adapters.PEFT_CONFIG).unlink()
    found = diffusers_products(transformer[1], adapters.read(renamed, transformer[1], settings), settings)
    scale = ALPHA / (math.sqrt(RANK) if changes else RANK)
    for name, value in added.items():
        np.testing.assert_allclose(found[name] * scale, value, rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize(("changes", "message"), [
    ({"use_dora": True}, r"holds DoRA's magnitudes, which are not supported \(\d+ tensors, as base_model"),
    ({"lora_bias": True}, "holds trained biases, which are not supported"),
    ({"bias": "all"}, "holds trained biases, which are not supported"),
    ({"alpha_pattern": {"to_q": 5}}, "adapter_config.json asks for peft's alpha_pattern, which is not supported"),
    ({"rank_pattern": {"to_q": 3}}, "adapter_config.json asks for peft's rank_pattern, which is not supported"),
])  # fmt: skip
def test_what_peft_can_and_we_cannot_is_named(transformer, adapted, changes, message):
    path, _, settings = adapted(**changes)
    with pytest.raises(UserError, match=message):
        adapters.read(path, transformer[1], settings)


# --- kohya's and BFL's names ---


def bfl_file(config, rank, *, seed=0):
    """Factors for every layer of the blocks in BFL's names, fused layers with one pair: ``{module: (down, up)}``."""
    generator, pairs = np.random.default_rng(seed), {}
    for name, shape in engine.source_shapes(flux.bfl_rules(config), folder.shapes("flux", config)).items():
        if name.startswith(Flux.STACKS) and len(shape) == 2:
            down, up = (generator.normal(size=size).astype(np.float32) for size in ((rank, shape[1]), (shape[0], rank)))
            pairs[name.removesuffix(".weight")] = down, up
    return pairs


@pytest.mark.parametrize("style", ["kohya", "comfyui", "bare", "half"])
def test_pairs_of_fused_layers_are_taken_apart(tmp_path, style):
    """kohya's files (one A for q, k and v and the MLP's first layer) and BFL-named ones add what they say."""
    settings, pairs = lora.Lora(RANK, 3.0, EVERYTHING), bfl_file(tiny.FLUX, RANK)
    tensors = {}
    for module, (down, up) in pairs.items():
        plain = module.replace(".", "_")
        prefix, (a, b) = {
            "kohya": (f"lora_unet_{plain}", ("lora_down", "lora_up")),
            "comfyui": (f"diffusion_model.{module}", ("lora_A", "lora_B")),
            "bare": (module, ("lora_A", "lora_B")),
            "half": (f"lora_unet_{plain}", ("lora_down", "lora_up")),
        }[style]
        tensors |= {f"{prefix}.{a}.weight": down, f"{prefix}.{b}.weight": up}
        if style in ("kohya", "half"):
            tensors[f"{prefix}.alpha"] = np.full((1,) if style == "half" else (), ALPHA, np.float32)
    if style == "half":
        tensors = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in tensors.items()}
    scale = ALPHA / RANK if style in ("kohya", "half") else 1.0
    factors = adapters.read(write_file(tmp_path / "a.safetensors", tensors), tiny.FLUX, settings)
    found = products(tiny.FLUX, factors, settings)
    assert found.keys() == {"lora_unet_" + module.replace(".", "_") for module in pairs}
    for module, (down, up) in pairs.items():
        expected = scale * up @ down
        close = {"atol": 0.2} if style == "half" else {"rtol": 1e-4, "atol": 1e-4}
        np.testing.assert_allclose(found["lora_unet_" + module.replace(".", "_")], expected, err_msg=module, **close)


@pytest.mark.parametrize("targets", [EVERYTHING, ("double_blocks.*",), (r"single_blocks\.qkv",), (r".*\.mlp_in",)])
def test_our_own_files_come_back(tmp_path, targets):
    """Both formats, the block-diagonal pairs of ComfyUI's among them, bit for bit where alpha / r is a power of 2."""
    settings = lora.Lora(4, 8.0, targets)
    factors = random_factors(tiny.FLUX, settings)
    for style in weights_lora.FORMATS:
        tensors = dict(weights_lora.exported(tiny.FLUX, factors, settings, style))
        found = adapters.read(write_file(tmp_path / f"{style}.safetensors", tensors), tiny.FLUX, settings)
        assert found.keys() == factors.keys()
        assert all(np.array_equal(found[name], factors[name]) for name in found), style


def test_files_that_are_no_start(tmp_path):
    settings = lora.Lora(2, 2.0, ("double_blocks.img_mlp.*",))
    factors = random_factors(tiny.FLUX, settings)
    good = dict(weights_lora.exported(tiny.FLUX, factors, settings, weights_lora.DIFFUSERS))
    fused = lora.Lora(2, 2.0, ("single_blocks.*",))
    kohya = dict(weights_lora.exported(
        tiny.FLUX, random_factors(tiny.FLUX, fused), fused, weights_lora.COMFYUI
    ))  # fmt: skip
    first = next(iter(good))
    one = np.zeros((2, 2), np.float32)
    half = dataclasses.replace(settings, targets=("double_blocks.img_mlp.in_layer",))
    note = {"lora_adapter_metadata": "{}"}
    cases = [
        ({name: t for name, t in good.items() if name != first}, settings, {}, "lacks lora_A of transformer_blocks.0"),
        (good, dataclasses.replace(settings, rank=3), {}, r"have rank 2; lora\.rank=3 needs that"),
        (kohya, dataclasses.replace(fused, rank=4), {}, r"have rank 2; lora\.rank=4 needs that or a block"),
        (kohya, lora.Lora(2, 2.0, (r"single_blocks\.qkv",)), {}, r"holds factors of single_blocks\.mlp_in, which"),
        (good | {first: good[first][:, 1:]}, settings, {}, r"have shapes \(2, 63\) and \(256, 2\); this transformer"),
        (good, half, {}, "holds 2 tensors that lora.targets does not name"),
        (good | {first.replace("transformer.", "diffusion_model."): one}, settings, {}, "several adapters for a layer"),
        (good | {first.replace("lora_A.weight", "alpha"): one}, settings, {}, "has 4 numbers; expected one"),
        (good | {"x.dora_scale": one}, settings, {}, r"DoRA's magnitudes, which are not supported \(1 ten"),
        (good | {"lora_te1_text_model_encoder_mlp_fc1.lora_up.weight": one}, settings, {}, "of a text encoder"),
        (good | {"text_encoder.text_model.encoder.lora_A.weight": one}, settings, {}, "of a text encoder"),
        (good | {"lora_unet_x.hada_w1_a": one}, settings, {}, "not LoRA"),
        (good | {"lora_unet_x.lokr_w1": one}, settings, {}, "not LoRA"),
        (good | {"diffusion_model.x.diff": one}, settings, {}, "whole weights beside factors"),
        (good | {"double_blocks.0.img_attn.norm.key_norm.scale": one}, settings, {}, "whole weights beside factors"),
        (good | {"x.lora_B.bias": one}, settings, {}, "trained biases"),
        (good, settings, {"transformer.use_dora": True}, "asks for peft's use_dora, which is not supported"),
        (good, settings, {"transformer.lora_alpha": "two"}, "lora_alpha='two' must be a number from"),
        (good, settings, {"transformer.init_lora_weights": "pissa_niter_4"}, "pissa_niter_4 changes the base as well"),
        (good, settings, {"transformer.peft_type": "LOHA"}, "describes LOHA, which is not supported"),
        (good, settings, "nonsense", "lora_adapter_metadata is no JSON: .*; remove it from the file"),
        (good, settings, "[1]", "lora_adapter_metadata is no JSON object"),
    ]  # fmt: skip
    for number, (tensors, wanted, note, message) in enumerate(cases):
        path = tmp_path / f"{number}.safetensors"
        write_file(path, tensors, lora_adapter_metadata=note if isinstance(note, str) else json.dumps(note))
        with pytest.raises(UserError, match=message) as caught:
            adapters.read(path, tiny.FLUX, wanted)
        assert re.match(rf"{tmp_path}/{number}\.safetensors", str(caught.value)) and "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"holds no weights under a usual name, as adapter_model\.safetensors"):
        adapters.read(tmp_path, tiny.FLUX, settings)
    (tmp_path / "sub").mkdir()
    write_file(tmp_path / "sub" / "a.safetensors", good)
    (tmp_path / "sub" / adapters.PEFT_CONFIG).write_text("{")
    with pytest.raises(UserError, match=r"adapter_config\.json cannot be read as JSON"):
        adapters.read(tmp_path / "sub" / "a.safetensors", tiny.FLUX, settings)
