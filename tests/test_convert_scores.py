"""Scores with a head of their own, from the files that people have: what comes in, what is said, what is refused."""

import json
import os
import pathlib

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from helpers import references, scores

from srpo_jax import convert
from srpo_jax.errors import UserError
from srpo_jax.models.tower import HEAD_WIDTHS
from srpo_jax.weights import engine, folder, formats
from srpo_jax.weights.files import SafetensorsFile

GOLDEN = pathlib.Path(__file__).parent / "golden" / "scores" / "image_reward.npz"
TINY_BLIP = {
    "vision_config": {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
                      "image_size": 32, "patch_size": 16},
    "text_config": {"vocab_size": 50, "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2,
                    "num_attention_heads": 4, "max_position_embeddings": 40},
}  # fmt: skip
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "max_position_embeddings": 8, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}  # fmt: skip
MED = {"model_type": "bert", "vocab_size": 50, "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2,
       "num_attention_heads": 4, "max_position_embeddings": 40, "encoder_width": 768}  # fmt: skip


def parameters(path):
    """Of a folder in our format."""
    source = SafetensorsFile(path / folder.WEIGHTS)
    return {name: source.read(name) for name in source.specs}


# --- ImageReward ------------------------------------------------------------------------------------------------------


@pytest.fixture
def image_reward(tmp_path):
    """ImageReward.pt with its med_config.json, and a tokenizer for its 50 ids."""
    arrays, tensors = np.load(GOLDEN), {}
    for ours, theirs in (("vit/", "blip.visual_encoder."), ("text/", "blip.text_encoder."), ("mlp/", "mlp.")):
        for name in arrays.files:
            if name.startswith(ours):
                tensors[theirs + name.removeprefix(ours)] = torch.tensor(arrays[name])
    for part in ("vision_proj", "text_proj"):
        tensors |= {f"blip.{part}.weight": torch.zeros(4, 4), f"blip.{part}.bias": torch.zeros(4)}
    path = tmp_path / "hub"
    path.mkdir()
    torch.save(tensors, path / "ImageReward.pt")
    (path / "med_config.json").write_text(json.dumps(MED))
    (tmp_path / "tiny.json").write_text(json.dumps(TINY_BLIP))
    words = scores.write_bert_tokenizer(tmp_path / "bert")
    vocabulary = scores.bert_words()
    vocabulary += [f"word{number}" for number in range(48 - len(vocabulary))]
    (words / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    return path, tensors


def test_image_reward(image_reward, tmp_path, capsys):
    """From the folder of the hub; the tokenizer goes along, and what is not read is named."""
    path, tensors = image_reward
    arguments = ["import", f"--source={path}", f"--target={tmp_path / 'ours'}", f"--config={tmp_path / 'tiny.json'}"]
    convert.main([*arguments, f"--tokenizer={tmp_path / 'bert'}"])
    assert "left out, which the score does not read: 2 tensors of blip.vision_proj, 2 tensors of blip.text_proj" in (
        capsys.readouterr().out
    )
    assert sorted(os.listdir(tmp_path / "ours" / "tokenizer")) == ["tokenizer_config.json", "vocab.txt"]
    network, config = folder.read_config(tmp_path / "ours")
    assert network == "blip" and config.text_config.vocab_size == 50 and config.head == HEAD_WIDTHS
    arrays = engine.unflatten(parameters(tmp_path / "ours"), folder.abstract("blip", config)[1])
    back = engine.from_params(formats.find("blip", "image_reward").table(config), arrays)
    assert len(back) == len(tensors) - 5  # the projections and position_ids
    for name, array in back.items():
        np.testing.assert_array_equal(array, tensors[name].numpy())
    lines = list(convert.describe(tmp_path / "ours"))
    assert lines[0].endswith("blip, our format")


def test_image_reward_by_its_own_config(image_reward, tmp_path):
    """med_config.json gives the text encoder; the vision tower is ViT-L/16, which this small one is not."""
    path, _ = image_reward
    for source in (path, path / "ImageReward.pt"):
        with pytest.raises(UserError, match=r"does not hold this blip network: .*wrong shape") as error:
            convert.import_folder(source, tmp_path / "no")
        assert "blip.visual_encoder.cls_token [1, 1, 32] instead of [1, 1, 1024]" in str(error.value)
        assert "word_embeddings" not in str(error.value)
    assert not (tmp_path / "no").exists()


def test_image_reward_without_or_with_a_wrong_tokenizer(image_reward, tmp_path, capsys):
    path, _ = image_reward
    config = tmp_path / "tiny.json"
    convert.import_folder(path, tmp_path / "ours", config=config)
    assert "ImageReward has that of google-bert/bert-base-uncased" in capsys.readouterr().out
    words = scores.write_bert_tokenizer(tmp_path / "other")
    with pytest.raises(UserError, match="other is not this network's tokenizer"):
        convert.import_folder(path, tmp_path / "no", config=config, tokenizer=words)
    for style in ("diffusers", "comfyui"):
        with pytest.raises(UserError, match=f"{style} has no place for .*, a blip network; keep what it was made of"):
            convert.export_folder(tmp_path / "ours", tmp_path / "no", style)
    assert not (tmp_path / "no").exists()


# --- aesthetic predictors ---------------------------------------------------------------------------------------------


def save_head(path, features, name, numbers, dtype=torch.float32):
    rng, tensors = np.random.default_rng(0), {}
    for number, n_in, n_out in zip(numbers, (features, *HEAD_WIDTHS), HEAD_WIDTHS, strict=False):
        tensors[f"{name}.{number}.weight"] = torch.tensor(rng.normal(size=(n_out, n_in))).to(dtype)
        tensors[f"{name}.{number}.bias"] = torch.tensor(rng.normal(size=n_out)).to(dtype)
    torch.save(tensors, path)
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A CLIP, a SigLIP, a CLIP of laion's, and both heads."""
    path = tmp_path_factory.mktemp("towers")
    for name, act in (("openai", "quick_gelu"), ("laion", "gelu")):
        vision = VISION | {"image_size": 32, "patch_size": 16, "hidden_act": act}
        config = transformers.CLIPConfig(text_config=TEXT, vision_config=vision, projection_dim=20)
        references.randomise(transformers.CLIPModel(config), 1).save_pretrained(path / name)
    config = transformers.SiglipConfig(text_config=TEXT, vision_config=VISION | {"image_size": 30, "patch_size": 8})
    references.randomise(transformers.SiglipModel(config), 2).save_pretrained(path / "siglip")
    save_head(path / "sac+logos+ava1-l14-linearMSE.pth", 20, "layers", (0, 2, 4, 6, 7))
    save_head(path / "v2_5.pth", 32, "scoring_head", (0, 2, 4, 6, 8), torch.bfloat16)
    return path


def test_laion(files, tmp_path, capsys):
    arguments = ["import", f"--source={files / 'openai'}", f"--head={files / 'sac+logos+ava1-l14-linearMSE.pth'}"]
    convert.main([*arguments, f"--target={tmp_path / 'ours'}"])
    said = capsys.readouterr().out
    assert "of text_model, text_projection" in said and "tokenizer" not in said
    found, config = parameters(tmp_path / "ours"), folder.read_config(tmp_path / "ours", "aesthetic")[1]
    assert config.projection_dim == 20 and not any("text" in name for name in found)
    head = torch.load(files / "sac+logos+ava1-l14-linearMSE.pth")
    np.testing.assert_array_equal(found["head.layers.4.kernel"], head["layers.7.weight"].numpy().T)
    graphdef, params = folder.load(tmp_path / "ours", "aesthetic")[1:]
    assert jax.tree.leaves(params) and graphdef


def test_v25_keeps_its_heads_dtype(files, tmp_path):
    """bfloat16 on disk, as published; the network takes it in float32."""
    convert.import_folder(files / "siglip", tmp_path / "ours", head=files / "v2_5.pth")
    found = parameters(tmp_path / "ours")
    assert found["head.layers.0.kernel"].dtype == ml_dtypes.bfloat16
    assert found["vision.pooling.probe"].shape == (32,) and found["vision.pooling.probe"].dtype == np.float32
    params = folder.load(tmp_path / "ours", "aesthetic_v25")[2]
    assert params["head"]["layers"][0]["kernel"].dtype == np.float32


def test_what_does_not_belong_together(files, models, pipelines, tmp_path):
    laion, v25, out = files / "sac+logos+ava1-l14-linearMSE.pth", files / "v2_5.pth", tmp_path / "out"
    for source, head, words in (
        (files / "siglip", None, "looks like a SigLIP: as the tower of an aesthetic score it takes .* by --head"),
        (laion, None, "looks like an aesthetic score's head: give it by --head"),
        (v25, None, "looks like an aesthetic score's head: give it by --head"),
        (files / "openai", v25, "openai and .*v2_5.pth make no score: LAION's head .* belongs to a CLIP"),
        (files / "siglip", laion, r"siglip and .*linearMSE.pth make no score"),
        (files / "laion", laion, r"hidden_act='gelu': LAION's aesthetic predictor reads OpenAI's CLIP"),
        (files / "openai", tmp_path / "none.pth", "none.pth cannot be read"),
        (pipelines[0], laion, "whole pipeline, for which --head has no meaning"),
        (pipelines[0] / "vae", laion, "vae and .* make no score"),
    ):
        with pytest.raises(UserError, match=words):
            convert.import_folder(source, out, head=head)
    with pytest.raises(UserError, match="--tokenizer is for rewards that read words"):
        convert.import_folder(files / "openai", out, head=laion, tokenizer=models / "clip" / "tokenizer")
    assert not os.listdir(tmp_path)
