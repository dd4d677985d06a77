"""ImageReward's network against its authors' numbers and transformers' BLIP: scores, gradients, files."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from helpers import parity
from transformers.models.blip.modeling_blip import BlipVisionModel
from transformers.models.blip.modeling_blip_text import BlipTextModel

from srpo_jax.models.blip import Blip, BlipConfig, BlipTextConfig, BlipVisionConfig
from srpo_jax.models.compute import Compute, abstract, bind
from srpo_jax.models.tower import HEAD_WIDTHS
from srpo_jax.rewards.image_reward import MEAN, STD, ImageReward
from srpo_jax.weights import blip as tables
from srpo_jax.weights import engine

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "scores" / "image_reward.npz"
TINY = BlipConfig(BlipTextConfig(50, 24, 48, 2, 4, 40), BlipVisionConfig(32, 128, 2, 4, 32, 16), HEAD_WIDTHS)
PREFIXES = {"vit/": "blip.visual_encoder.", "text/": "blip.text_encoder.", "mlp/": "mlp."}


def loaded(config, tensors, compute=Compute()):  # noqa: B008 (frozen)
    """(graph definition, parameters) from tensors of ImageReward's file."""
    graphdef, like = abstract(lambda rngs: Blip(config, compute, rngs=rngs))
    params = engine.to_params(tables.image_reward_rules(config), tensors, like)
    return graphdef, jax.tree.map(jnp.asarray, params)


def golden():
    """The arrays, and of them the weights by the names of ImageReward's file."""
    arrays = dict(np.load(GOLDEN))
    named = {p + name.removeprefix(ours): a for name, a in arrays.items() for ours, p in PREFIXES.items()
             if name.startswith(ours)}  # fmt: skip
    return arrays, named


def score(graphdef, params, pixels, ids, mask):
    """As the reward does, from pixels that are preprocessed already."""
    reward, network = ImageReward(None, graphdef), bind(graphdef, params)
    return reward.score(params, network.vision(pixels), reward.prepare(params, {"ids": ids, "mask": mask}))


def test_golden():
    """The original modules' picture tokens, rewards, and gradient to the pixels."""
    arrays, tensors = golden()
    graphdef, params = loaded(TINY, tensors)
    pixels = jnp.asarray(arrays["image"].transpose(0, 2, 3, 1))

    def total(pixels):
        found = score(graphdef, params, pixels, arrays["ids"], arrays["mask"])
        return found.sum(), found

    (_, found), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(pixels)
    tokens = jax.jit(lambda pixels: bind(graphdef, params).vision(pixels))(pixels)
    assert parity.relative_error(tokens, arrays["image_embeds"]) < parity.TOLERANCE
    assert parity.relative_error(found, arrays["reward"]) < parity.TOLERANCE
    assert parity.relative_error(gradient, arrays["image_grad"].transpose(0, 2, 3, 1)) < parity.TOLERANCE


HF_VISION = (
    ("embeddings.class_embedding", "cls_token"), ("embeddings.position_embedding", "pos_embed"),
    ("embeddings.patch_embedding.", "patch_embed.proj."), ("encoder.layers.", "blocks."),
    ("self_attn.projection.", "attn.proj."), ("self_attn.", "attn."), ("layer_norm", "norm"),
    ("post_layernorm.", "norm."),
)  # fmt: skip


def hf_pair(head_seed=3):
    """transformers' vision and text model, and their tensors with a random head under ImageReward's names."""
    vision = transformers.BlipVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=24, patch_size=8,
        layer_norm_eps=1e-6,
    )  # fmt: skip
    text = transformers.BlipTextConfig(
        vocab_size=50, hidden_size=24, encoder_hidden_size=32, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=3, max_position_embeddings=16, bos_token_id=1, sep_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    models = BlipVisionModel(vision), BlipTextModel(text, add_pooling_layer=False)
    models = [parity.perturb(model, seed) for seed, model in enumerate(models)]
    tensors = {}
    for name, tensor in models[0].state_dict().items():
        for theirs, original in HF_VISION:
            name = name.replace(theirs, original)
        tensors[f"blip.visual_encoder.{name}"] = tensor.numpy()
    tensors |= {f"blip.text_encoder.{name}": tensor.numpy() for name, tensor in models[1].state_dict().items()}
    rng, widths = np.random.default_rng(head_seed), (24, *HEAD_WIDTHS)
    for number, n_in, n_out in zip((0, 2, 4, 6, 7), widths, HEAD_WIDTHS, strict=False):
        tensors[f"mlp.layers.{number}.weight"] = rng.normal(size=(n_out, n_in), scale=n_in**-0.5).astype(np.float32)
        tensors[f"mlp.layers.{number}.bias"] = rng.normal(size=n_out).astype(np.float32)
    return models, tensors


CONFIG = BlipConfig(BlipTextConfig(50, 24, 40, 2, 3, 16), BlipVisionConfig(32, 48, 3, 4, 24, 8))


def test_transformers():
    """Scores and gradients by pixels and by every parameter; captions of several lengths, one of them whole."""
    (vision, text), tensors = hf_pair()
    rng = np.random.default_rng(1)
    pixels = rng.normal(size=(3, 24, 24, 3)).astype(np.float32)
    ids = rng.integers(3, 50, (3, 7))
    mask = np.arange(7)[None] < np.array([4, 7, 2])[:, None]
    ids = np.where(mask, ids, 0)
    their_pixels = torch.tensor(pixels.transpose(0, 3, 1, 2), requires_grad=True)
    their_tokens = vision(pixel_values=their_pixels).last_hidden_state
    their_words = text(
        input_ids=torch.tensor(ids),
        attention_mask=torch.tensor(mask.astype(np.int64)),
        encoder_hidden_states=their_tokens,
        encoder_attention_mask=torch.ones(their_tokens.shape[:2], dtype=torch.long),
        is_decoder=False,
    ).last_hidden_state
    feature = their_words[:, 0]
    for number in (0, 2, 4, 6, 7):
        weight, bias = (torch.tensor(tensors[f"mlp.layers.{number}.{part}"]) for part in ("weight", "bias"))
        feature = feature @ weight.T + bias
    theirs = (feature[:, 0] - MEAN) / STD
    weights = np.array([1.0, -2.0, 0.7], np.float32)
    (theirs * torch.tensor(weights)).sum().backward()

    graphdef, params = loaded(CONFIG, tensors)

    def total(params, pixels):
        found = score(graphdef, params, pixels, ids, mask.astype(np.int32))
        return jnp.sum(found * weights), found

    run = jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))
    (grads, pixel_grads), found = run(params, pixels)
    assert parity.relative_error(found, theirs.detach()) < parity.TOLERANCE
    assert parity.relative_error(pixel_grads, their_pixels.grad.numpy().transpose(0, 2, 3, 1)) < parity.TOLERANCE
    # By the parameters of both towers: the table brings the reference's gradients to ours.
    their_grads = {f"mlp.layers.{n}.{part}": np.zeros_like(tensors[f"mlp.layers.{n}.{part}"])
                   for n in (0, 2, 4, 6, 7) for part in ("weight", "bias")}  # fmt: skip
    for name, parameter in vision.named_parameters():
        for a, b in HF_VISION:
            name = name.replace(a, b)
        their_grads[f"blip.visual_encoder.{name}"] = parameter.grad.numpy()
    their_grads |= {f"blip.text_encoder.{name}": p.grad.numpy() for name, p in text.named_parameters()}
    expected = engine.flatten(engine.to_params(tables.image_reward_rules(CONFIG), their_grads, grads))
    typical = np.sqrt(np.mean([np.sum(np.square(leaf)) for name, leaf in expected.items() if "head" not in name]))
    for name, leaf in engine.flatten(grads).items():
        if not name.startswith("head."):
            error = np.linalg.norm(np.asarray(leaf) - expected[name])
            scale = typical if ".k.bias" in name else np.linalg.norm(expected[name])
            assert error < 2 * parity.TOLERANCE * scale, (name, error / scale)


def test_padding_changes_nothing():
    """What fills a caption is not read."""
    _, tensors = hf_pair()
    graphdef, params = loaded(CONFIG, tensors)
    pixels = np.random.default_rng(2).normal(size=(1, 24, 24, 3)).astype(np.float32)
    run = jax.jit(lambda ids, mask: score(graphdef, params, pixels, ids, mask))
    ids, mask = np.array([[5, 7, 9, 0, 0, 0]]), np.array([[1, 1, 1, 0, 0, 0]])
    padded = run(ids, mask)
    np.testing.assert_allclose(run(np.array([[5, 7, 9, 30, 31, 32]]), mask), padded, rtol=1e-6)
    np.testing.assert_allclose(run(ids[:, :3], mask[:, :3]), padded, rtol=1e-5)
    assert abs(run(np.array([[5, 7, 9, 30, 31, 32]]), np.ones_like(mask)) - padded) > 1e-3


def test_file_round_trip():
    """Bit for bit, the fused qkv included; what the score has no use for is passed over, anything else is not."""
    _, tensors = golden()
    _, like = abstract(lambda rngs: Blip(TINY, Compute(), rngs=rngs))
    table = tables.image_reward_rules(TINY)
    named = {name: tensor for name, tensor in tensors.items() if name not in table.ignored}
    parity.assert_exact_round_trip(table, named, like)
    extra = {"blip.text_proj.weight": np.zeros((4, 4), np.float32), "blip.itm_head.weight": np.zeros(2, np.float32)}
    with pytest.raises(engine.UserError, match="1 not used: blip.itm_head.weight"):
        engine.to_params(table, tensors | extra, like)


def test_options_change_no_score():
    """Rematerialisation and unrolling; bfloat16 stays close and gives float32."""
    arrays, tensors = golden()
    pixels = jnp.asarray(arrays["image"].transpose(0, 2, 3, 1))
    found = []
    for options in ({}, {"remat": "full"}, {"remat": "dots", "scan_unroll": 2}, {"dtype": jnp.bfloat16}):
        graphdef, params = loaded(TINY, tensors, Compute(**options))
        run = jax.jit(
            jax.value_and_grad(lambda x, g=graphdef, p=params: score(g, p, x, arrays["ids"], arrays["mask"]).sum())
        )
        found.append(run(pixels))
    for total, gradient in found[1:3]:
        np.testing.assert_allclose(total, found[0][0], rtol=1e-5)
        assert parity.relative_error(gradient, found[0][1]) < parity.TOLERANCE
    assert found[3][0].dtype == jnp.float32
    assert 1e-5 < abs(found[3][0] - found[0][0]) < 0.05


def test_configs():
    """ImageReward's med_config.json is a BERT's; its encoder_width is not believed."""
    med = {
        "architectures": ["BertModel"], "hidden_act": "gelu", "hidden_size": 768, "intermediate_size": 3072,
        "layer_norm_eps": 1e-12, "max_position_embeddings": 512, "model_type": "bert", "num_attention_heads": 12,
        "num_hidden_layers": 12, "pad_token_id": 0, "add_type_embeddings": False, "vocab_size": 30524,
        "encoder_width": 768, "add_cross_attention": True,
    }  # fmt: skip
    assert BlipConfig.from_dict(med) == BlipConfig()
    with pytest.raises(ValueError, match="expected ImageReward's med_config.json"):
        BlipConfig.from_dict({"model_type": "blip"})
    with pytest.raises(ValueError, match="hidden_act='silu' is not supported"):
        BlipConfig.from_dict(med | {"hidden_act": "silu"})
