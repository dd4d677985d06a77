"""What we export at the published sizes against a list of facts: the names and shapes of FLUX.1-dev's files.

Loading the exports in ComfyUI's and Black Forest Labs' own code was done elsewhere; this holds what they read.
"""

import itertools
import math
import pathlib
import re

import diffusers
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from diffusers.loaders import single_file_utils

from srpo_jax import exporting
from srpo_jax.families.flux import DEV
from srpo_jax.weights import engine, folder, formats
from srpo_jax.weights.files import Spec

FACTS = pathlib.Path(__file__).parent / "flux1_dev.txt"
CONFIGS = {
    "flux": DEV.transformer, "autoencoder": DEV.autoencoder, "clip_text": DEV.text["text_encoder"],
    "t5": DEV.text["text_encoder_2"],
}  # fmt: skip


def expanded(name):
    """The names that {a,b} and {0-18} stand for."""
    parts = re.split(r"\{([^}]*)\}", name)
    for place in range(1, len(parts), 2):
        span = re.fullmatch(r"(\d+)-(\d+)", parts[place])
        parts[place] = range(int(span[1]), int(span[2]) + 1) if span else parts[place].split(",")
    choices = [part if index % 2 else [part] for index, part in enumerate(parts)]
    return ["".join(map(str, choice)) for choice in itertools.product(*choices)]


def read_facts():
    """``{(network, format): {name: shape}}``; the list's own sums are checked."""
    facts = {}
    for section in FACTS.read_text().split("\n[")[1:]:
        head, *lines = section.strip().splitlines()
        network, name, tensors, numbers = re.fullmatch(r"(\w+) (\w+)\] (\d+) (\d+)", head).groups()
        found = facts[network, name] = {}
        for line in lines:
            pattern, sizes = line.split()
            shape = tuple(map(int, sizes.split("x")))
            for full in expanded(pattern):
                added = (
                    {f"{full[:-1]}weight": shape, f"{full[:-1]}bias": shape[:1]} if full[-1] == "*" else {full: shape}
                )
                assert not found.keys() & added.keys()
                found |= added
        assert len(found) == int(tensors) and sum(map(math.prod, found.values())) == int(numbers)
    return facts


FACT = read_facts()


@pytest.mark.parametrize(("network", "name"), FACT)
def test_exports_have_the_names_and_shapes_of_the_published_files(network, name):
    config = CONFIGS[network]
    specs = {path: Spec(shape, np.dtype(ml_dtypes.bfloat16)) for path, shape in folder.shapes(network, config).items()}
    found = engine.exported_specs(formats.find(network, name).table(config), specs, None)
    assert {tensor: spec.shape for tensor, spec in found.items()} == FACT[network, name]
    # And each style writes the format of this list.
    styles = {style: formats.written_as(network, style) for style in exporting.STYLES}
    expected = {"bfl": {"bfl", "comfyui"}, "diffusers": {"diffusers"}, "hf": {"diffusers", "comfyui"}}[name]
    assert {style for style in styles if styles[style] and styles[style].name == name} == expected


def test_the_facts_are_those_of_the_packages():
    """diffusers' and transformers' classes at the sizes of the hub's configs, without weights."""
    levels = 4
    with torch.device("meta"):
        theirs = {
            ("flux", "diffusers"): diffusers.FluxTransformer2DModel(guidance_embeds=True),
            ("autoencoder", "diffusers"): diffusers.AutoencoderKL(
                latent_channels=16, block_out_channels=(128, 256, 512, 512), layers_per_block=2,
                down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels,
                use_quant_conv=False, use_post_quant_conv=False,
            ),
            ("clip_text", "hf"): transformers.CLIPTextModel(transformers.CLIPTextConfig(
                hidden_size=768, intermediate_size=3072, num_attention_heads=12,
            )),
            ("t5", "hf"): transformers.T5EncoderModel(transformers.T5Config(
                vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64,
                feed_forward_proj="gated-gelu",
            )),
        }  # fmt: skip
    for key, model in theirs.items():
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        shapes.pop("encoder.embed_tokens.weight", None)
        if key[0] == "clip_text":
            shapes = {f"text_model.{name}": shape for name, shape in shapes.items()}
        assert FACT[key] == shapes, key


def test_bfls_names_are_those_that_diffusers_converts():
    """Its conversion of single files takes every tensor of the list and makes every one of its own."""
    blocks = {"down_block_types": [None] * 4, "up_block_types": [None] * 4}
    with torch.device("meta"):
        for network, convert in (
            ("flux", single_file_utils.convert_flux_transformer_checkpoint_to_diffusers),
            ("autoencoder", lambda c: single_file_utils.convert_ldm_vae_checkpoint(c, blocks)),
        ):
            given = {name: torch.empty(shape) for name, shape in FACT[network, "bfl"].items()}
            made = convert(given)
            shapes = {name: tuple(tensor.shape) for name, tensor in made.items()}
            assert shapes == FACT[network, "diffusers"], network
