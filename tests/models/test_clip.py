"""CLIP against transformers and open_clip: outputs, gradients, files, rules for the end of a text, golden numbers."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import open_clip
import pytest
import torch
import transformers
from helpers import parity
from safetensors.numpy import load_file
from safetensors.torch import save_file

from srpo_jax import text
from srpo_jax.models.clip import VIT_H_14, Clip, ClipConfig, ClipText, ClipTextConfig, end_positions
from srpo_jax.models.compute import Compute, abstract, bind
from srpo_jax.rewards import clip as clip_rewards
from srpo_jax.weights import clip as tables
from srpo_jax.weights import engine

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
VOCABULARY, LENGTH = 50, 9
# name: (activation, image size, patch size, end-of-text id of the config)
CASES = {"legacy end": ("quick_gelu", 24, 8, 2), "end by id": ("gelu", 30, 15, 40)}


def token_ids(end: int) -> np.ndarray:
    """Three texts of different lengths. Unless the rule is the legacy one (2), larger ids surround the end."""
    ids = np.random.default_rng(0).integers(3, 39, (3, LENGTH))
    for row, position in zip(ids, (4, LENGTH - 1, 1), strict=True):
        if end == 2:
            row[position:] = VOCABULARY - 1  # padded with the end, as OpenAI's
        else:
            row[position] = end
            row[position + 1 :] = VOCABULARY - 1
            row[0] = VOCABULARY - 2
    return ids


def loaded(network, config, tensors, table, compute=Compute()):  # noqa: B008 (frozen)
    """(graph definition, parameters) of our network from a reference's tensors."""
    graphdef, like = abstract(lambda rngs: network(config, compute, rngs=rngs))
    params = engine.to_params(table, tensors, like)
    return graphdef, jax.tree.map(jnp.asarray, params)


@pytest.fixture(scope="module", params=CASES)
def hf(request, tmp_path_factory):
    """A random CLIPModel, its config.json and its file's tensors, and token ids."""
    act, size, patch, end = CASES[request.param]
    config = transformers.CLIPConfig(
        text_config={
            "vocab_size": VOCABULARY, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
            "num_attention_heads": 3, "max_position_embeddings": LENGTH, "hidden_act": act, "eos_token_id": end,
            "bos_token_id": 0, "pad_token_id": 1,
        },
        vision_config={
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
            "image_size": size, "patch_size": patch, "hidden_act": act,
        },
        projection_dim=20,
    )  # fmt: skip
    torch.manual_seed(1)
    model = parity.perturb(transformers.CLIPModel(config), 1)
    path = tmp_path_factory.mktemp("hf")
    model.save_pretrained(path)
    return model, json.loads((path / "config.json").read_text()), load_file(path / "model.safetensors"), token_ids(end)


def compare(network, params, table, tensors, model, pixels, ids, their_features):
    """Features, gradients by pixels and all parameters, and the way back into the file.

    Args:
      network: graph definition of ours, with ``params`` by ``table`` from the file's ``tensors``.
      model: the reference, whose ``their_features(torch pixels NCHW, torch ids)`` gives its image and text features.
      pixels: [B, S, S, 3].
      ids: [N, T].
    """
    rng = np.random.default_rng(2)
    their_pixels = torch.tensor(pixels.transpose(0, 3, 1, 2), requires_grad=True)
    their_image, their_text = their_features(their_pixels, torch.tensor(ids))
    # Of the features' own signs, so that the loss (also the scale's gradient) is no small difference of large sums.
    cotangents = [
        np.abs(rng.normal(size=features.shape).astype(np.float32)) * np.sign(features.detach().numpy())
        for features in (their_image, their_text)
    ]
    loss = sum(torch.sum(f * torch.tensor(c)) for f, c in zip((their_image, their_text), cotangents, strict=True))
    (loss * model.logit_scale.exp()).backward()

    def weigh(params, pixels):
        clip = bind(network, params)
        features = clip.encode_image(pixels), clip.encode_text(jnp.asarray(ids))
        loss = sum(jnp.sum(f * c) for f, c in zip(features, cotangents, strict=True))
        return loss * jnp.exp(params["logit_scale"]), features

    (grads, pixel_grads), (image, texts) = jax.jit(jax.grad(weigh, argnums=(0, 1), has_aux=True))(params, pixels)
    assert parity.relative_error(image, their_image.detach()) < parity.TOLERANCE
    assert parity.relative_error(texts, their_text.detach()) < parity.TOLERANCE
    assert parity.relative_error(pixel_grads, their_pixels.grad.numpy().transpose(0, 2, 3, 1)) < parity.TOLERANCE
    parity.assert_same_gradients(grads, model, table)
    parity.assert_exact_round_trip(table, tensors, params)


def test_clip_model(hf):
    """All that transformers' CLIPModel computes, with either activation and rule."""
    model, config, tensors, ids = hf
    config = ClipConfig.from_dict(config)
    table = tables.hf_rules(config)
    size = config.vision_config.image_size
    pixels = np.random.default_rng(3).normal(size=(2, size, size, 3)).astype(np.float32)

    def features(pixels, ids):
        image = model.get_image_features(pixel_values=pixels).pooler_output
        return image, model.get_text_features(input_ids=ids).pooler_output

    compare(*loaded(Clip, config, tensors, table), table, tensors, model, pixels, ids, features)


@pytest.mark.parametrize("prefixed", [False, True])
def test_clip_text_model(hf, prefixed, tmp_path):
    """The pooled text of transformers' CLIPTextModel, from the names of transformers 5 and from those on the hub."""
    whole, _, _, ids = hf
    model = transformers.CLIPTextModel(whole.config.text_config)
    parity.perturb(model, 3).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    if prefixed:
        tensors = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in tensors.items()}
        tensors["text_model.embeddings.position_ids"] = np.arange(LENGTH)[None]  # a buffer in older files
    config = ClipTextConfig.from_dict(json.loads((tmp_path / "config.json").read_text()))
    table = tables.hf_text_rules(config)
    graphdef, params = loaded(ClipText, config, tensors, table)
    theirs = model(input_ids=torch.tensor(ids))
    ours = jax.jit(lambda params: bind(graphdef, params)(jnp.asarray(ids)))(params)
    assert parity.relative_error(ours, theirs.pooler_output.detach()) < parity.TOLERANCE
    hidden = jax.jit(lambda params: bind(graphdef, params).text.hidden(jnp.asarray(ids)))(params)
    assert parity.relative_error(hidden, theirs.last_hidden_state.detach()) < parity.TOLERANCE


@pytest.mark.parametrize("quick", [False, True])
def test_open_clip(quick, tmp_path):
    """All that open_clip's model computes, through its own file and config."""
    sizes = {
        "embed_dim": 20,
        "quick_gelu": quick,
        "vision_cfg": {"image_size": 24, "layers": 2, "width": 32, "head_width": 8, "patch_size": 6},
        "text_cfg": {"context_length": LENGTH, "vocab_size": VOCABULARY, "width": 24, "heads": 3, "layers": 3},
    }
    torch.manual_seed(4)
    model = parity.perturb(open_clip.CLIP(**sizes), 4)
    save_file(model.state_dict(), tmp_path / "open_clip_model.safetensors")
    config = ClipConfig.from_open_clip({"model_cfg": sizes, "preprocess_cfg": {}})
    table = tables.open_clip_rules(config)
    tensors = load_file(tmp_path / "open_clip_model.safetensors")
    pixels = np.random.default_rng(5).normal(size=(2, 24, 24, 3)).astype(np.float32)
    ids = token_ids(2)
    ids[0, 6:] = 0  # open_clip's own padding

    def features(pixels, ids):
        return model.encode_image(pixels), model.encode_text(ids)

    compare(*loaded(Clip, config, tensors, table), table, tensors, model, pixels, ids, features)


def test_vit_h_14():
    """The architecture of HPS-v2.1 is what open_clip builds under that name."""
    assert ClipConfig.from_open_clip(open_clip.get_model_config("ViT-H-14")) == VIT_H_14
    with torch.device("meta"):
        model = open_clip.CLIP(**open_clip.get_model_config("ViT-H-14"))
    _, like = abstract(lambda rngs: Clip(VIT_H_14, Compute(), rngs=rngs))
    shapes = {path: leaf.shape for path, leaf in engine.flatten(like).items()}
    expected = engine.source_shapes(tables.open_clip_rules(VIT_H_14), shapes)
    assert expected == {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@functools.partial(jax.jit, static_argnums=0)
def embed(graphdef, params, pixels, ids):
    """Image and text features."""
    network = bind(graphdef, params)
    return network.encode_image(pixels), network.encode_text(ids)


def test_options_do_not_change_gradients(hf):
    """Rematerialisation and unrolling change memory and speed alone."""
    _, config, tensors, ids = hf
    config = ClipConfig.from_dict(config)
    table, results = tables.hf_rules(config), []
    for options in (Compute(), Compute(remat="full"), Compute(remat="dots", scan_unroll=2)):
        graphdef, params = loaded(Clip, config, tensors, table, options)
        loss = jax.grad(lambda p, g=graphdef: jnp.sum(bind(g, p).encode_text(jnp.asarray(ids)) ** 2))
        results.append(engine.flatten(jax.jit(loss)(params)["text"]))
    # Gradients that are zero but for rounding, as that of the keys' bias, are compared in the size of the others.
    typical = np.sqrt(np.mean([np.sum(np.square(leaf)) for leaf in results[0].values()]))
    for other in results[1:]:
        for name, leaf in results[0].items():
            error = np.linalg.norm(other[name] - leaf)
            assert error < parity.TOLERANCE * max(np.linalg.norm(leaf), typical), name


def test_bfloat16_features_are_float32_and_close(hf):
    """Under bfloat16 compute and parameters the features stay float32 and within bfloat16's precision."""
    _, config, tensors, ids = hf
    config = ClipConfig.from_dict(config)
    table = tables.hf_rules(config)
    size = config.vision_config.image_size
    pixels = np.random.default_rng(6).normal(size=(2, size, size, 3)).astype(np.float32)
    features = []
    for dtype in (jnp.float32, jnp.bfloat16):
        compute = Compute(dtype=dtype, param_dtype=dtype)
        graphdef, params = loaded(Clip, config, tensors, table, compute)
        params = jax.tree.map(lambda leaf, d=dtype: leaf.astype(d), params)
        features.append(embed(graphdef, params, pixels, ids))
    for exact, rough in zip(*features, strict=True):
        assert rough.dtype == jnp.float32
        assert 1e-5 < parity.relative_error(rough, exact) < 0.05


def test_end_positions():
    """The largest id, or the first occurrence of the end id, whatever follows."""
    ids = jnp.array([[7, 3, 9, 5, 9], [8, 5, 5, 0, 0]])
    np.testing.assert_array_equal(end_positions(ids, "argmax", 5), [2, 0])
    np.testing.assert_array_equal(end_positions(ids, "eos", 5), [3, 1])
    with pytest.raises(ValueError, match="end_rule='last' is unknown"):
        end_positions(ids, "last", 5)


def test_config_defaults_and_old_files():
    """Values that a file leaves out are transformers' defaults; ``*_config_dict`` of old files decides."""
    config = ClipConfig.from_dict({"text_config": {}, "vision_config": {}})
    theirs = transformers.CLIPConfig()
    for tower in ("text_config", "vision_config"):
        for name, value in vars(getattr(config, tower)).items():
            assert getattr(getattr(theirs, tower), name) == value, name
    assert config.projection_dim == theirs.projection_dim
    assert config.text_config.end_rule == "eos"
    old = {"text_config": {"hidden_size": 8}, "text_config_dict": {"hidden_size": 16}, "vision_config": {}}
    assert ClipConfig.from_dict(old).text_config.hidden_size == 16
    assert ClipTextConfig.from_dict({"eos_token_id": 2}).end_rule == "argmax"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"vision_config": {}}, "'text_config' is missing"),
        ({"text_config": {"hidden_act": "relu"}, "vision_config": {}}, "hidden_act='relu' is not supported"),
        ({"text_config": {}, "vision_config": {"num_channels": 1}}, "num_channels=1 is not supported"),
        ({"text_config": {}, "vision_config": {"image_size": 30}}, "image_size=30 is not a multiple of patch_size=32"),
    ],
)
def test_bad_config(config, message):
    """What this module does not compute is refused by name."""
    with pytest.raises(ValueError, match=message):
        ClipConfig.from_dict(config)


def test_bad_open_clip_config():
    """Other families of open_clip are refused by the key that makes them so."""
    vision = {"image_size": 224, "layers": 2, "width": 64, "patch_size": 16}
    with pytest.raises(ValueError, match="timm_model_name='vit' is not supported"):
        ClipConfig.from_open_clip({"embed_dim": 8, "vision_cfg": {**vision, "timm_model_name": "vit"}, "text_cfg": {}})
    with pytest.raises(ValueError, match="'embed_dim' is missing"):
        ClipConfig.from_open_clip({"vision_cfg": vision, "text_cfg": {}})


def test_bad_shapes(hf):
    """A picture of another size and a text beyond the position table are refused, with both sizes."""
    _, config, tensors, _ = hf
    config = ClipConfig.from_dict(config)
    network = bind(*loaded(Clip, config, tensors, tables.hf_rules(config)))
    with pytest.raises(ValueError, match=r"got \(1, 20, 20, 3\)"):
        network.encode_image(jnp.zeros((1, 20, 20, 3)))
    with pytest.raises(ValueError, match=f"10 tokens exceed max_position_embeddings={LENGTH}"):
        network.encode_text(jnp.zeros((1, LENGTH + 1), jnp.int32))


@pytest.mark.parametrize(("model", "case"), [("ps", "ps_gas2_T100_m80_h64w128"), ("hps", "hps_gas2_T1000_m437")])
def test_golden_embeddings(model, case):
    """From caption and decoded picture to the features of the released trainer's run, in both file formats."""
    path = GOLDEN / "models" / model
    if model == "ps":
        config = ClipConfig.from_dict(json.loads((path / "config.json").read_text()))
        table, tensors = tables.hf_rules(config), load_file(path / "model.safetensors")
    else:
        config = ClipConfig.from_open_clip(json.loads((path / "open_clip_config.json").read_text()))
        table, tensors = tables.open_clip_rules(config), load_file(path / "open_clip_model.safetensors")
    network = bind(*loaded(Clip, config, tensors, table))
    tokenizer = text.load_tokenizer(GOLDEN / "models" / "ps")  # one vocabulary for both
    record = json.loads((GOLDEN / "cases" / f"{case}.json").read_text())
    arrays = np.load(GOLDEN / "cases" / f"{case}.npz")
    for index, branch in enumerate(record["branches"]):
        prompts = [branch["prompt"], branch["neg_prompt"]]
        ids = text.tokenize(tokenizer, prompts, 77, 0 if model == "hps" else "own")
        for row, theirs in zip(ids, (branch["prompt_ids"], branch["neg_prompt_ids"]), strict=True):
            np.testing.assert_array_equal(row[: len(theirs)], theirs)
        theirs = arrays[f"b{index}_text_emb"].reshape(2, -1)
        ours = clip_rewards.unit(jax.jit(network.encode_text)(ids))
        np.testing.assert_allclose(ours, theirs / np.linalg.norm(theirs, axis=-1, keepdims=True), atol=2e-6)
        if f"b{index}_decoded" not in arrays:
            continue  # of the second case only a part of the pictures is kept
        decoded = arrays[f"b{index}_decoded"]
        pixels = jnp.clip(jnp.moveaxis(decoded.reshape(-1, *decoded.shape[-3:]), 1, -1) / 2 + 0.5, 0, 1)
        theirs = arrays[f"b{index}_image_emb"]
        ours = clip_rewards.unit(
            jax.jit(network.encode_image)(clip_rewards.preprocess(pixels, config.vision_config.image_size))
        )
        np.testing.assert_allclose(ours, theirs / np.linalg.norm(theirs, axis=-1, keepdims=True), atol=2e-6)
