"""Both forms of rotary embeddings against complex numbers, with gradients."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from srpo_jax.models import rotary

AXES = (4, 6, 6)
IDS = np.stack([np.arange(5) % 2, np.arange(5), 60 * np.arange(5)], axis=-1)


def turned(x, sign=1):
    """Each pair of channels is a complex number, turned by its token's angle: float64."""
    x = np.asarray(x, np.float64)
    steps = [1e4 ** -(np.arange(0, dim, 2) / dim) for dim in AXES]
    angles = np.concatenate([ids[:, None] * step for ids, step in zip(IDS.T, steps, strict=True)], axis=-1)
    pairs = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(sign * 1j * angles)[:, None]
    return np.stack([pairs.real, pairs.imag], axis=-1).reshape(x.shape)


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-4), ("bfloat16", 2**-8)])
@pytest.mark.parametrize("form", rotary.FORMS)
def test_complex_numbers(form, dtype, tolerance):
    """What comes out, and the gradient, which is turned back; each number is rounded once."""
    x, weights = (jax.random.normal(key, (2, 5, 3, 16), dtype) for key in jax.random.split(jax.random.key(0)))
    table = rotary.rotary_table(IDS, AXES, form)
    found, back = jax.vjp(lambda x: rotary.rotate(x, table, form), x)
    (gradient,) = back(weights)
    assert found.dtype == gradient.dtype == x.dtype
    for ours, exact in ((found, turned(x)), (gradient, turned(weights, -1))):
        # Angles to 240 in float32; a bfloat16 number is rounded by at most 2^-9 of itself.
        error = np.abs(np.asarray(ours, np.float64) - exact)
        assert (error <= tolerance * np.maximum(np.abs(exact), 0.1)).all()


def test_forms_of_devices():
    forms = {name: rotary.choose(types.SimpleNamespace(platform=name)) for name in ("cpu", "gpu", "cuda", "tpu")}
    assert forms == {"cpu": "pairs", "gpu": "pairs", "cuda": "pairs", "tpu": "product"}
    with pytest.raises(ValueError, match="choose one of pairs, product"):
        rotary.rotate(jnp.zeros((1, 1, 1, 2)), (jnp.zeros((1, 1)),) * 2, "matrix")
