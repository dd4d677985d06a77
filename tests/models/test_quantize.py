"""Weights in 8 and 4 bits: the error of a weight and of a product, exactness where there is any, and loading."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tiny

from srpo_jax import sharding
from srpo_jax.models import lora, quantize
from srpo_jax.models.compute import Compute, bind, join
from srpo_jax.models.flux import Flux
from srpo_jax.weights import engine, folder, quantized

# As in the appendix of QLoRA (arXiv 2305.14314), to four digits.
PUBLISHED_NF4 = [
    *(-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0),
    *(0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1.0),
]


def test_the_table_is_the_published_one():
    np.testing.assert_allclose(quantize.NF4, PUBLISHED_NF4, atol=6e-5)


@pytest.mark.parametrize("kind", quantize.KINDS)
@pytest.mark.parametrize(("shape", "axis"), [((256, 6), 0), ((3, 192, 2, 5), 1), ((2, 40), 1)])
def test_every_weight_is_within_half_a_step(kind, shape, axis):
    w = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    codes, scales = quantize.quantize(jnp.asarray(w), kind, axis)
    block = quantize.block_size(kind, shape[axis])
    assert shape[axis] % block == 0
    assert scales.shape[axis] == shape[axis] // block and scales.dtype == jnp.bfloat16
    assert codes.nbytes == w.size // (1 if kind == "int8" else 2)
    back = np.asarray(quantize.dequantize(codes, scales, kind, axis))
    scale = np.repeat(np.asarray(scales, np.float32), block, axis)
    step = scale if kind == "int8" else scale * np.diff(quantize.NF4).max()
    assert (np.abs(back - w) <= 0.51 * step).all()  # the scale's own rounding can cut the largest by 1/512
    if kind == "nf4":
        nearest = np.abs(w[..., None] / scale[..., None] - quantize.NF4).argmin(-1)
        np.testing.assert_allclose(back, quantize.NF4[nearest] * scale, rtol=1e-6)


def test_the_errors_of_normal_weights():
    """Root mean squared, relative: 0.65 % and 9.2 %, as docs/lora.md says."""
    w = jax.random.normal(jax.random.key(0), (3072, 256)) * 0.02
    for kind, least, most in (("int8", 0.0060, 0.0070), ("nf4", 0.090, 0.094)):
        back = quantize.dequantize(*quantize.quantize(w, kind), kind)
        assert least < float(jnp.linalg.norm(back - w) / jnp.linalg.norm(w)) < most


@pytest.mark.parametrize("kind", quantize.KINDS)
def test_what_was_quantised_stays_as_it_is(kind):
    """Zeros are exact, and a second time changes nothing."""
    w = jax.random.normal(jax.random.key(1), (128, 7)).at[:, 0].set(0)
    once = quantize.dequantize(*quantize.quantize(w, kind), kind)
    assert not once[:, 0].any()
    np.testing.assert_array_equal(quantize.dequantize(*quantize.quantize(once, kind), kind), once)


def test_an_axis_that_cannot_be_packed():
    with pytest.raises(ValueError, match="an axis of 5 cannot be packed in pairs"):
        quantize.quantize(jnp.ones((5, 2)), "nf4")


# --- a network --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("flux")
    tiny.save_random(path, "flux", tiny.FLUX, 1)
    return path


@pytest.fixture(scope="module")
def mesh():
    class Sizes:
        data, fsdp, tensor = 1, 1, 1

    return sharding.make_mesh(Sizes, jax.devices()[:1])


@pytest.mark.parametrize("kind", quantize.KINDS)
def test_loading_gives_the_stacks_that_quantising_them_whole_gives(path, mesh, kind):
    compute = Compute(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    found = engine.flatten(quantized.load(path, "flux", kind, compute, sharding.of(mesh, "flux")))
    plain = engine.flatten(folder.load(path, "flux", compute)[2])
    settings = lora.Lora(2, 2.0, (".*",), kind)
    expected = engine.flatten(lora.split(lora.abstract(folder.constructor("flux", tiny.FLUX, compute), settings)[1])[1])
    assert {n: (x.shape, x.dtype) for n, x in found.items()} == {n: (x.shape, x.dtype) for n, x in expected.items()}
    kernels = {name for name in plain if name.startswith(Flux.STACKS) and name.endswith(".kernel")}
    assert len(kernels) == 14
    for name, leaf in plain.items():
        if name in kernels:
            codes, scales = quantize.quantize(leaf, kind, 1)
            np.testing.assert_array_equal(found[f"{name}.codes"], codes)
            np.testing.assert_array_equal(found[f"{name}.scales"], scales)
        else:
            np.testing.assert_array_equal(found[name], leaf)


def test_loading_holds_one_layer_beside_what_stays(path, mesh, monkeypatch):
    """What JAX holds at any moment: the result so far, and a layer of the kernel that is being read."""
    most, before = 0, set(map(id, jax.live_arrays()))
    make = quantized._writer

    def watched(*arguments):
        put = make(*arguments)

        def watching(*arguments):
            nonlocal most
            most = max(most, sum(x.nbytes for x in jax.live_arrays() if id(x) not in before))
            return put(*arguments)

        return watching

    monkeypatch.setattr(quantized, "_writer", watched)
    compute = Compute(param_dtype=jnp.float32)
    result = quantized.load(path, "flux", "int8", compute, sharding.of(mesh, "flux"))
    stays = sum(x.nbytes for x in jax.tree.leaves(result))
    largest = 4 * 64 * 384  # float32 modulation of a double block
    assert 0 < most <= stays + largest + 4 and stays < most + largest


@pytest.mark.parametrize(("kind", "most"), [("int8", 0.02), ("nf4", 0.25)])
def test_the_network_and_its_gradients_stay_near(path, mesh, kind, most):
    """A quantised base against the same in full: the velocity, and the gradients of all factors together."""
    compute = Compute()
    keys = iter(jax.random.split(jax.random.key(0), 8))
    inputs = (
        jax.random.normal(next(keys), (2, 6, 64)), jax.random.normal(next(keys), (2, 5, 32)),
        jax.random.normal(next(keys), (2, 16)), jnp.array([0.3, 0.9]), jnp.array([3.5, 1.0]),
        jnp.zeros((6, 3)).at[:, 1].set(jnp.arange(6)), jnp.zeros((5, 3)),
    )  # fmt: skip
    cotangent = jax.random.normal(next(keys), (2, 6, 64))
    results = {}
    for stored in ("none", kind):
        settings = lora.Lora(2, 2.0, (".*",), stored)
        graphdef, like = lora.abstract(folder.constructor("flux", tiny.FLUX, compute), settings)
        place = sharding.of(mesh, "flux")
        load = functools.partial(quantized.load, path, "flux", kind)
        base = folder.load(path, "flux", compute)[2] if stored == "none" else load(compute, place)
        factors = lora.initial(lora.split(like)[0], seed=0)
        factors = jax.tree.map(lambda leaf: leaf + 0.01, factors)

        def product(factors, base=base, graphdef=graphdef):
            velocity = bind(graphdef, join(factors, base))(*inputs)
            return jnp.vdot(cotangent, velocity), velocity

        (_, velocity), grads = jax.jit(jax.value_and_grad(product, has_aux=True))(factors)
        results[stored] = velocity, jnp.concatenate([g.ravel() for g in jax.tree.leaves(grads)])
    for full, rough in zip(results["none"], results[kind], strict=True):
        assert 1e-4 < float(jnp.linalg.norm(rough - full) / jnp.linalg.norm(full)) < most
