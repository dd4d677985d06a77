"""T5's encoder against transformers: outputs, gradients, buckets of distances, files."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from helpers import parity
from safetensors.numpy import load_file

from srpo_jax.models.compute import Compute, abstract, bind
from srpo_jax.models.t5 import T5Config, T5Encoder, distance_buckets
from srpo_jax.weights import engine, t5

SIZES = {
    "vocab_size": 40, "d_model": 24, "d_kv": 8, "d_ff": 40, "num_layers": 3, "num_heads": 2,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 16, "feed_forward_proj": "gated-gelu",
}  # fmt: skip


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """A random T5EncoderModel whose heads are narrower than its width, its config.json and its file's tensors."""
    torch.manual_seed(1)
    model = parity.perturb(transformers.T5EncoderModel(transformers.T5Config(**SIZES)), 1)
    path = tmp_path_factory.mktemp("t5")
    model.save_pretrained(path)
    return model, json.loads((path / "config.json").read_text()), load_file(path / "model.safetensors")


def loaded(config, tensors, compute=Compute()):  # noqa: B008 (frozen)
    """(graph definition, parameters) of our encoder from the reference's tensors."""
    graphdef, like = abstract(lambda rngs: T5Encoder(config, compute, rngs=rngs))
    return graphdef, jax.tree.map(jnp.asarray, engine.to_params(t5.hf_rules(config), tensors, like))


@pytest.mark.parametrize("shape", [(2, 7), (3, 40)])
def test_encoder(reference, shape):
    """Outputs and gradients by all parameters, for texts shorter and longer than the farthest bucket."""
    model, config, tensors = reference
    config = T5Config.from_dict(config)
    graphdef, params = loaded(config, tensors)
    rng = np.random.default_rng(2)
    ids = rng.integers(1, 40, shape)
    ids[0, shape[1] // 2 :] = 0  # padding is text like any other
    cotangent = rng.normal(size=(*shape, 24)).astype(np.float32)
    model.zero_grad()
    theirs = model(input_ids=torch.tensor(ids)).last_hidden_state
    torch.sum(theirs * torch.tensor(cotangent)).backward()

    def weigh(params):
        ours = bind(graphdef, params)(jnp.asarray(ids))
        return jnp.sum(ours * cotangent), ours

    grads, ours = jax.jit(jax.grad(weigh, has_aux=True))(params)
    assert parity.relative_error(ours, theirs.detach()) < parity.TOLERANCE
    parity.assert_same_gradients(grads, model, t5.hf_rules(config))


def test_files(reference):
    """The way back is exact; the embedding under its second name, alone or beside the first, is the same."""
    _, config, tensors = reference
    config = T5Config.from_dict(config)
    _, params = loaded(config, tensors)
    parity.assert_exact_round_trip(t5.hf_rules(config), tensors, params)
    second = {**tensors, "encoder.embed_tokens.weight": tensors["shared.weight"]}
    for names in (second.keys(), second.keys() - {"shared.weight"}):
        _, other = loaded(config, {name: second[name] for name in names})
        np.testing.assert_array_equal(other["token_embedding"], params["token_embedding"])


@pytest.mark.parametrize(("buckets", "farthest"), [(32, 128), (8, 16), (32, 64)])
def test_distance_buckets(buckets, farthest):
    """Every pair of 512 positions falls into transformers' bucket."""
    position = torch.arange(512)
    theirs = transformers.models.t5.modeling_t5.T5Attention._relative_position_bucket(
        position[None, :] - position[:, None], bidirectional=True, num_buckets=buckets, max_distance=farthest
    )
    np.testing.assert_array_equal(distance_buckets(512, buckets, farthest), theirs)


def test_bfloat16(reference):
    """Under bfloat16 the result is bfloat16 and close; norms and softmax in float32 keep it so."""
    _, config, tensors = reference
    config = T5Config.from_dict(config)
    ids = np.random.default_rng(3).integers(0, 40, (2, 9))
    results = []
    for dtype in (jnp.float32, jnp.bfloat16):
        graphdef, params = loaded(config, tensors, Compute(dtype=dtype, param_dtype=dtype))
        params = jax.tree.map(lambda leaf, d=dtype: leaf.astype(d), params)
        results.append(jax.jit(lambda p, i, g=graphdef: bind(g, p)(i))(params, ids))
    assert results[1].dtype == jnp.bfloat16
    assert 1e-5 < parity.relative_error(results[1].astype(jnp.float32), results[0]) < 0.05


def test_bad_config():
    """A config of T5 1.0, or of something else, is refused with the reason."""
    with pytest.raises(ValueError, match="feed_forward_proj='relu' is not supported"):
        T5Config.from_dict({**SIZES, "feed_forward_proj": "relu"})
    with pytest.raises(ValueError, match="T5 config: 'd_kv', 'd_ff' are missing"):
        T5Config.from_dict({key: value for key, value in SIZES.items() if key not in ("d_kv", "d_ff")})
