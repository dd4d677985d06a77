"""Tokenizers and both text encoders, from folders to features."""

import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from helpers import encoders

from srpo_jax import text
from srpo_jax.emoji import tokenizers
from srpo_jax.errors import UserError
from srpo_jax.families.flux_text import FluxTextEncoders
from srpo_jax.models.clip import ClipText, ClipTextConfig
from srpo_jax.models.compute import Compute, build
from srpo_jax.models.t5 import T5Config, T5Encoder
from srpo_jax.weights import clip, engine, folder, t5

GOLDEN = pathlib.Path(__file__).parent / "golden"
PROMPTS = ["a red fox", "the old house on a hill by the sea", "fox"]


@pytest.mark.parametrize(("case", "pad"), [("hps_gas2_T1000_m437", 0), ("ps_gas2_T100_m80_h64w128", "own")])
def test_golden_ids(case, pad):
    """The released trainer's token ids: of short captions padded with 0, and of one that is cut at 77 tokens."""
    tokenizer = text.load_tokenizer(GOLDEN / "models" / "ps")
    record = json.loads((GOLDEN / "cases" / f"{case}.json").read_text())
    for branch in record["branches"]:
        for prompt, ids in (("prompt", "prompt_ids"), ("neg_prompt", "neg_prompt_ids")):
            (ours,) = text.tokenize(tokenizer, [branch[prompt]], 77, pad)
            padding = 0 if pad == 0 else tokenizer.pad_token_id
            np.testing.assert_array_equal(ours, branch[ids] + [padding] * (77 - len(branch[ids])))


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """The text part of a converted pipeline folder, with random weights."""
    path = tmp_path_factory.mktemp("pipeline")
    clip_size = tokenizers.train_clip_tokenizer(PROMPTS, path / "tokenizer", 12)
    t5_size = tokenizers.train_t5_tokenizer(PROMPTS, path / "tokenizer_2", 16)
    clip_config = ClipTextConfig(clip_size, 16, 32, 2, 2, 12, eos_token_id=clip_size - 1)
    t5_config = T5Config(t5_size, 16, 8, 24, 2, 2)
    for name, network, constructor, config in (
        ("text_encoder", "clip_text", ClipText, clip_config),
        ("text_encoder_2", "t5", T5Encoder, t5_config),
    ):
        _, params = build(lambda rngs, c=constructor, config=config: c(config, Compute(), rngs=rngs), 3)
        folder.save(path / name, network, config, params)
    return path


def test_padding_and_truncation(pipeline):
    """Rows have one length; the end token survives cutting; padding is what was asked for."""
    tokenizer = text.load_tokenizer(pipeline / "tokenizer_2")
    ids = text.tokenize(tokenizer, PROMPTS, 5)
    assert ids.shape == (3, 5) and ids.dtype == np.int32
    assert list(ids[1]).index(1) == 4  # T5's end of text
    assert list(ids[2, 1:]) == [1, 0, 0, 0]
    assert list(text.tokenize(tokenizer, ["fox"], 5, pad=7)[0, 1:]) == [1, 7, 7, 7]
    assert text.tokenize(tokenizer, [], 5).shape == (0, 5)


def test_encoders_match_transformers(pipeline):
    """Features of prompts equal those of transformers' encoders with the same weights and tokenizers."""
    given = FluxTextEncoders(pipeline)
    found = encoders.features(given, PROMPTS, 10, batch=2)  # the last batch is not full
    features, pooled = found["text"], found["pooled"]
    assert features.shape == (3, 10, 16) and pooled.shape == (3, 16)
    config = folder.read_config(pipeline / "text_encoder")[1]
    theirs = transformers.CLIPTextModel(transformers.CLIPTextConfig(**vars(config)))
    table = clip.hf_text_rules(config)
    load(theirs, {k.removeprefix("text_model."): v for k, v in engine.from_params(table, given.params[0]).items()})
    ids = transformers.AutoTokenizer.from_pretrained(pipeline / "tokenizer")(
        PROMPTS, padding="max_length", max_length=12, return_tensors="pt"
    ).input_ids
    np.testing.assert_allclose(pooled, theirs(input_ids=ids).pooler_output.detach(), atol=1e-5)

    config = folder.read_config(pipeline / "text_encoder_2")[1]
    theirs = transformers.T5EncoderModel(transformers.T5Config(**vars(config), feed_forward_proj="gated-gelu"))
    load(theirs, engine.from_params(t5.hf_rules(config), given.params[1]))
    ids = transformers.AutoTokenizer.from_pretrained(pipeline / "tokenizer_2")(
        PROMPTS, padding="max_length", max_length=10, return_tensors="pt"
    ).input_ids
    np.testing.assert_allclose(features, theirs(input_ids=ids).last_hidden_state.detach(), atol=1e-4)


def load(model, tensors):
    """Fills a torch model; the embedding's second name is tied to the first."""
    missing, unexpected = model.load_state_dict({k: torch.tensor(v) for k, v in tensors.items()}, strict=False)
    assert not unexpected and set(missing) <= {"encoder.embed_tokens.weight"}
    model.eval()


def test_batches_do_not_matter(pipeline):
    """A prompt's features do not depend on what it is encoded with."""
    given = FluxTextEncoders(pipeline)
    together, alone = (encoders.features(given, prompts, 8, 3) for prompts in (PROMPTS, PROMPTS[1:2]))
    for name, array in together.items():
        np.testing.assert_allclose(array[1], alone[name][0], atol=1e-6)


def test_bfloat16_encoders(pipeline):
    """The features have the compute dtype."""
    given = FluxTextEncoders(pipeline, Compute(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16))
    found = encoders.features(given, PROMPTS, 8, 3)
    assert {array.dtype for array in found.values()} == {jnp.dtype(jnp.bfloat16)}


def test_errors(pipeline, tmp_path):
    """Missing folders, missing vocabularies, broken files and empty lists are named."""
    with pytest.raises(UserError, match="nowhere is not a folder"):
        text.load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(UserError, match="tokenizer_config.json is missing"):
        text.load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "CLIPTokenizer"}')
    with pytest.raises(UserError, match="vocab.json"):
        text.load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read as a tokenizer"):
        text.load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="tokenizer is not a folder"):
        FluxTextEncoders(tmp_path / "empty")
