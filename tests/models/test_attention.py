"""The backends against one another and against the formula. cuDNN needs a GPU: its padding is tested around XLA."""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from srpo_jax.models import attention as module
from srpo_jax.models.attention import attention


def inputs(batch=2, length=21, source=21, heads=3, dim=8, seed=0):
    """Random query, key, value."""
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = [(batch, n, heads, dim) for n in (length, source, source)]
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


def formula(query, key, value, scale, bias=None, causal=False):
    """Attention in numpy, float64."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    logits = np.einsum("bthd,bshd->bhts", query, key) * scale
    if bias is not None:
        logits = logits + np.asarray(bias)
    if causal:
        logits = np.where(np.tril(np.ones(logits.shape[-2:], bool)), logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return np.einsum("bhts,bshd->bthd", weights / weights.sum(-1, keepdims=True), value)


def assert_same_with_gradients(function, reference, arrays, tolerance):
    """Outputs, and gradients of a weighted sum of them, agree to a part of the largest entry."""
    weights = jax.random.normal(jax.random.key(9), reference(*arrays).shape)
    for get in (lambda f: (f(*arrays),), lambda f: jax.grad(lambda *a: jnp.sum(weights * f(*a)), (0, 1, 2))(*arrays)):
        for ours, theirs in zip(get(function), get(reference), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=tolerance * np.abs(theirs).max(), rtol=0)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_xla_is_the_formula(causal, scale):
    arrays = inputs()
    bias = None if causal else jax.random.normal(jax.random.key(1), (1, 3, 21, 21))
    ours = attention(*arrays, backend="xla", scale=scale, bias=bias, causal=causal)
    np.testing.assert_allclose(ours, formula(*arrays, scale or 8**-0.5, bias, causal), atol=2e-6)


@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 2e-6), (jnp.bfloat16, 2e-2)])
@pytest.mark.parametrize("bias", [None, (1, 3, 21, 21), (2, 1, 1, 21)])
def test_xla_and_its_gradients_are_those_of_jax(bias, dtype, tolerance):
    """Of queries, keys and values, and of a bias that samples, heads or queries share."""
    mask = np.stack([np.arange(21) < 9, np.arange(21) > 0])
    arrays = [x.astype(dtype) for x in inputs()]
    if bias is not None:
        arrays.append(jax.random.normal(jax.random.key(1), bias))

    def ours(query, key, value, bias=None):
        return attention(query, key, value, backend="xla", scale=0.5, bias=bias, causal=True, key_mask=mask)

    def theirs(query, key, value, bias=None):
        seen = mask[:, None, None, :]
        return jax.nn.dot_product_attention(query, key, value, bias, seen, scale=0.5, is_causal=True)

    # Of the second sample, the first query sees nothing: what comes of it is not compared.
    cotangent = jax.random.normal(jax.random.key(2), arrays[0].shape).at[1, 0].set(0).astype(dtype)
    (found, back), (wanted, wanted_back) = (jax.vjp(function, *arrays) for function in (ours, theirs))
    gradients = zip(back(cotangent), wanted_back(cotangent), strict=True)
    for one, other in ((found.at[1, 0].set(0), wanted.at[1, 0].set(0)), *gradients):
        assert one.dtype == other.dtype
        one, other = (np.asarray(array, np.float32) for array in (one, other))
        np.testing.assert_allclose(one, other, atol=tolerance * np.abs(other).max(), rtol=0)


@pytest.mark.parametrize("place", [0, 7, 20])
def test_xla_passes_on_what_is_not_a_number(place):
    """The maximum of logits that a CPU takes may overlook it."""
    query, key, value = inputs()
    out = attention(query, key.at[0, place, 1, 0].set(jnp.nan), value, backend="xla")
    assert np.isnan(out[0, :, 1]).all() and np.isfinite(out[0, :, [0, 2]]).all() and np.isfinite(out[1]).all()


@pytest.mark.parametrize("platform, reductions", [("cpu", 1), ("cuda", 0), ("tpu", 0)])
def test_only_cpus_take_the_maximum_that_overlooks_nan(platform, reductions):
    lowered = jax.jit(lambda *arrays: attention(*arrays, backend="xla")).trace(*inputs())
    text = lowered.lower(lowering_platforms=(platform,)).as_text()
    assert text.count("stablehlo.compare GT") == reductions and text.count("stablehlo.maximum") == 1 - reductions


@pytest.mark.parametrize("backend", ["xla", "cudnn", "splash"])
def test_keys_that_are_not_seen(backend):
    """As if they were not there: of two samples, one sees the first 9 keys and one all but the first."""
    arrays = inputs(heads=2, dim=128) if backend == "splash" else inputs()
    mask = np.stack([np.arange(21) < 9, np.arange(21) > 0])
    run = {
        "xla": functools.partial(attention, backend="xla", key_mask=mask),
        "cudnn": functools.partial(module._padded, scale=8**-0.5, bias=None, causal=False, key_mask=mask,
                                   implementation="xla"),
        "splash": functools.partial(module._splash, scale=128**-0.5, causal=False, key_mask=jnp.asarray(mask),
                                    interpret=True),
    }[backend]  # fmt: skip
    assert_same_with_gradients(run, lambda *a: few(mask, *a), arrays, 1e-5)


def few(mask, query, key, value):
    """Plain attention of each sample to the keys that it sees."""
    made = []
    for row, seen in enumerate(mask):
        places = np.flatnonzero(seen)
        own = query[row : row + 1], key[row : row + 1, places], value[row : row + 1, places]
        made.append(attention(*own, backend="xla"))
    return jnp.concatenate(made)


@pytest.mark.parametrize("length", [21, 64, 65])
@pytest.mark.parametrize("case", ["plain", "causal", "bias"])
def test_padding_for_cudnn_changes_nothing(length, case):
    arrays = inputs(length=length, source=length)
    bias = jax.random.normal(jax.random.key(1), (1, 3, length, length)) if case == "bias" else None
    options = {"scale": 0.3, "bias": bias, "causal": case == "causal"}
    padded = functools.partial(module._padded, **options, implementation="xla")
    assert_same_with_gradients(padded, functools.partial(attention, backend="xla", **options), arrays, 3e-6)


def test_cudnn_gets_multiples_of_64(monkeypatch):
    seen = {}

    def fake(query, key, value, bias, mask, **options):
        seen.update(options, shape=query.shape)
        return query

    monkeypatch.setattr(jax.nn, "dot_product_attention", fake)
    out = attention(*inputs(length=21), backend="cudnn")
    assert out.shape == (2, 21, 3, 8)
    assert seen["shape"] == (2, 64, 3, 8) and seen["implementation"] == "cudnn"
    assert seen["query_seq_lengths"].tolist() == seen["key_value_seq_lengths"].tolist() == [21, 21]


@pytest.mark.parametrize("causal", [False, True])
def test_splash_interpreted_is_xla(causal, monkeypatch):
    """Two blocks of 128, the second of them padded."""
    monkeypatch.setattr(module, "SPLASH_BLOCKS", ((256, 128), (128, 128)))
    assert module.splash_blocks(350) == (384, 128, 128) and module.splash_blocks(150) == (256, 256, 128)
    monkeypatch.setattr(module, "SPLASH_BLOCKS", ((128, 128),))
    arrays = inputs(batch=1, length=150, source=150, heads=2, dim=16)
    splash = functools.partial(module._splash, scale=0.25, causal=causal, interpret=True)
    reference = functools.partial(attention, backend="xla", scale=0.25, causal=causal)
    assert_same_with_gradients(splash, reference, arrays, 1e-5)


def test_blocks_of_splash():
    """FLUX at 1024x1024 and 720x720 with 512 words, and at 512x512; other lengths; what is shorter than a block."""
    chosen = {4608: (4608, 1152, 384), 2537: (2560, 1280, 256), 1536: (1536, 768, 768), 3584: (3584, 896, 896)}
    assert {length: module.splash_blocks(length) for length in chosen} == chosen
    assert module.splash_blocks(77) == (128, 128, 128) and module.splash_blocks(257) == (384, 384, 384)
    for length in range(1, 9000, 97):
        padded, block, keys = module.splash_blocks(length)
        assert padded >= length and not padded % block and not block % keys and not keys % 128
        assert padded - length < 128 or (block >= 512 and padded < 1.2 * length)


SHARDED = """
import functools, jax, numpy as np
from jax.sharding import AxisType
from srpo_jax.models import attention as module
arrays = [jax.random.normal(key, (4, 40, 2, 16)) for key in jax.random.split(jax.random.key(0), 3)]
mesh = jax.make_mesh((2, 1, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
out = jax.jit(functools.partial(module._splash, scale=0.25, causal=False, mesh=mesh, interpret=True))(*arrays)
assert out.sharding.shard_shape(out.shape) == (2, 40, 1, 16), out.sharding
np.testing.assert_allclose(out, module.attention(*arrays, backend="xla", scale=0.25), atol=2e-6)
"""


def test_splash_divides_batch_and_heads_over_a_mesh():
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", SHARDED], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_errors_name_the_remedy():
    arrays = inputs()
    with pytest.raises(ValueError, match="choose one of xla, cudnn, splash"):
        attention(*arrays, backend="flash")
    with pytest.raises(ValueError, match="takes no bias"):
        attention(*arrays, backend="splash", bias=jnp.zeros((1, 1, 21, 21)))
    with pytest.raises(ValueError, match="equal lengths"):
        attention(*inputs(source=30), backend="splash")
