"""Aesthetic predictors against transformers and open_clip: scores, gradients to the pixels, files, sizes."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import open_clip
import pytest
import torch
import transformers
from helpers import parity

from srpo_jax.models.aesthetic import ClipAesthetic, ClipAestheticConfig, SiglipAesthetic, SiglipAestheticConfig
from srpo_jax.models.compute import Compute, abstract, bind
from srpo_jax.models.siglip import SO400M_14_384
from srpo_jax.models.tower import HEAD_WIDTHS
from srpo_jax.rewards.clip import unit
from srpo_jax.weights import aesthetic as tables
from srpo_jax.weights import engine

VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
WORDS = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
         "max_position_embeddings": 8, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}  # fmt: skip


def head(features, numbers, name, seed=0):
    """Random layers of a head under its file's names, and the affine map that they are."""
    rng, tensors, weight, bias = np.random.default_rng(seed), {}, np.eye(features), np.zeros(features)
    for number, n_in, n_out in zip(numbers, (features, *HEAD_WIDTHS), HEAD_WIDTHS, strict=False):
        kernel, shift = rng.normal(size=(n_out, n_in), scale=n_in**-0.5), rng.normal(size=n_out)
        weight, bias = kernel @ weight, kernel @ bias + shift
        tensors |= {f"{name}.{number}.weight": kernel, f"{name}.{number}.bias": shift}
    return {key: tensor.astype(np.float32) for key, tensor in tensors.items()}, weight[0], bias[0]


def compare(network, config, table, tensors, pixels, their_feature, weight, bias):
    """Scores, gradients by pixels, and the way back into the files. The reference's score is its unit-norm feature by
    the affine map."""
    graphdef, like = abstract(lambda rngs: network(config, Compute(), rngs=rngs))
    params = jax.tree.map(jnp.asarray, engine.to_params(table, tensors, like))
    their_pixels = torch.tensor(pixels.transpose(0, 3, 1, 2), requires_grad=True)
    feature = their_feature(their_pixels)
    theirs = (feature / feature.norm(dim=-1, keepdim=True)).double() @ torch.tensor(weight) + bias
    (theirs * torch.tensor([1.0, -0.5])).sum().backward()

    def total(pixels):
        ours = bind(graphdef, params)
        found = ours.head(unit(ours.vision(pixels)))
        return found @ jnp.array([1.0, -0.5]), found

    (_, found), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(pixels)
    assert parity.relative_error(found, theirs.detach()) < parity.TOLERANCE
    assert parity.relative_error(gradient, their_pixels.grad.numpy().transpose(0, 2, 3, 1)) < parity.TOLERANCE
    read = {name: a for name, a in tensors.items() if not name.startswith(table.unread) and name not in table.ignored}
    assert len(read) < len(tensors)
    parity.assert_exact_round_trip(table, read, like)


def pixels(size):
    return np.random.default_rng(3).normal(size=(2, size, size, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def clip():
    vision = VISION | {"image_size": 28, "patch_size": 14, "hidden_act": "quick_gelu"}
    torch.manual_seed(1)
    config = transformers.CLIPConfig(text_config=WORDS, vision_config=vision, projection_dim=20)
    return parity.perturb(transformers.CLIPModel(config), 1)


def test_laion_on_transformers(clip):
    config = ClipAestheticConfig.from_dict(json.loads(clip.config.to_json_string(use_diff=False)))
    scorer, weight, bias = head(20, (0, 2, 4, 6, 7), "head.layers")
    tensors = {name: tensor.numpy() for name, tensor in clip.state_dict().items()} | scorer

    def feature(pixels):
        return clip.get_image_features(pixel_values=pixels).pooler_output

    compare(ClipAesthetic, config, tables.hf_clip_rules(config), tensors, pixels(28), feature, weight, bias)


def test_laion_on_open_clip():
    sizes = {
        "embed_dim": 20, "quick_gelu": True,
        "vision_cfg": {"image_size": 24, "layers": 2, "width": 32, "head_width": 8, "patch_size": 6},
        "text_cfg": {"context_length": 8, "vocab_size": 30, "width": 16, "heads": 2, "layers": 1},
    }  # fmt: skip
    torch.manual_seed(4)
    model = parity.perturb(open_clip.CLIP(**sizes), 4)
    vision = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
              "image_size": 24, "patch_size": 6}  # fmt: skip
    config = ClipAestheticConfig.from_dict({"vision_config": vision, "projection_dim": 20})
    scorer, weight, bias = head(20, (0, 2, 4, 6, 7), "head.layers")
    tensors = {name: tensor.numpy() for name, tensor in model.state_dict().items()} | scorer
    table = tables.open_clip_rules(config)
    compare(ClipAesthetic, config, table, tensors, pixels(24), model.encode_image, weight, bias)


def test_v25_on_transformers():
    """Of 30 pixels by 8, six fill no patch, as of 384 by 14."""
    vision = VISION | {"image_size": 30, "patch_size": 8}
    torch.manual_seed(2)
    config = transformers.SiglipConfig(text_config=WORDS, vision_config=vision)
    model = parity.perturb(transformers.SiglipModel(config), 2)
    ours = SiglipAestheticConfig.from_dict(json.loads(model.config.to_json_string(use_diff=False)))
    scorer, weight, bias = head(32, (0, 2, 4, 6, 8), "head.scoring_head")
    tensors = {name: tensor.numpy() for name, tensor in model.state_dict().items()} | scorer
    table = tables.siglip_rules(ours)

    def feature(pixels):
        return model.vision_model(pixel_values=pixels).pooler_output

    compare(SiglipAesthetic, ours, table, tensors, pixels(30), feature, weight, bias)


def test_published_sizes():
    """Shapes of the published towers, by the reference packages; 1152 and 4304 are nobody's defaults."""
    with torch.device("meta"):
        sizes = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
        vision = transformers.SiglipVisionConfig(**sizes, image_size=384, patch_size=14)
        siglip = transformers.SiglipModel(transformers.SiglipConfig(vision_config=vision.to_dict()))
        clip = open_clip.CLIP(**open_clip.get_model_config("ViT-L-14-quickgelu"))
    default = transformers.SiglipVisionConfig()
    assert all(getattr(default, key) == value for key, value in vars(type(SO400M_14_384)()).items())
    for network, config, table, model, head_name, numbers in (
        (SiglipAesthetic, SiglipAestheticConfig(), tables.siglip_rules, siglip, "head.scoring_head", (0, 2, 4, 6, 8)),
        (ClipAesthetic, ClipAestheticConfig(), tables.open_clip_rules, clip, "head.layers", (0, 2, 4, 6, 7)),
    ):
        like = abstract(lambda rngs, n=network, c=config: n(c, Compute(), rngs=rngs))[1]
        expected = engine.source_shapes(table(config), {n: leaf.shape for n, leaf in engine.flatten(like).items()})
        there = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        assert {name: shape for name, shape in expected.items() if not name.startswith("head.")} == {
            name: shape for name, shape in there.items() if not name.startswith(table(config).unread)
        }
        features = 1152 if network is SiglipAesthetic else 768
        scorer = head(features, numbers, head_name)[0]
        assert {n: s for n, s in expected.items() if n.startswith("head.")} == {n: a.shape for n, a in scorer.items()}


def test_another_clip_is_refused():
    """laion's CLIP-L/14 has the same shapes and another activation."""
    config = {"vision_config": {"hidden_act": "gelu"}, "text_config": {}}
    with pytest.raises(ValueError, match="hidden_act='gelu': LAION's aesthetic predictor reads OpenAI's CLIP"):
        ClipAestheticConfig.from_dict(config)
    with pytest.raises(ValueError, match="'vision_config' is missing"):
        SiglipAestheticConfig.from_dict({"model_type": "siglip"})
