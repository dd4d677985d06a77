"""Group normalisation with a gradient of our own: PyTorch's numbers, and on CPUs no reduction over rows and columns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from srpo_jax.models import group_norm
from srpo_jax.models.compute import Compute


def pictures(mean: float = 0.0) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((2, 6, 5, 12), np.float32) + np.float32(mean)


@pytest.mark.parametrize("groups", [1, 3, 12])
@pytest.mark.parametrize("mean", [0.0, 100.0])
def test_result_and_gradient_are_those_of_torch(groups, mean):
    x, cotangent = pictures(mean), np.random.default_rng(1).standard_normal((2, 6, 5, 12), np.float32)
    leaf = torch.from_numpy(x.transpose(0, 3, 1, 2)).requires_grad_(True)
    expected = torch.nn.functional.group_norm(leaf.double(), groups, eps=1e-6)
    (gradient,) = torch.autograd.grad(expected, leaf, torch.from_numpy(cotangent.transpose(0, 3, 1, 2)).double())
    found, back = jax.vjp(lambda x: group_norm.normalize(x, groups), x)
    tolerance = 2e-6 if mean == 0 else 5e-5  # float32 keeps 7 digits of 100
    np.testing.assert_allclose(found, expected.detach().numpy().transpose(0, 2, 3, 1), atol=tolerance)
    np.testing.assert_allclose(back(cotangent)[0], gradient.numpy().transpose(0, 2, 3, 1), atol=tolerance)


def test_all_statistics_are_in_float32():
    """Those of bfloat16 pictures too; what comes out, and the gradient, have the dtypes that are asked for."""
    x = jnp.asarray(pictures(), jnp.bfloat16)
    norm = group_norm.GroupNorm(12, 3, Compute(dtype=jnp.bfloat16))
    found, back = jax.vjp(norm, x)
    assert found.dtype == jnp.bfloat16 and back(found)[0].dtype == jnp.bfloat16
    exact = group_norm.normalize(x.astype(jnp.float32), 3)
    np.testing.assert_array_equal(found, exact.astype(jnp.bfloat16))


def test_affine_parameters_have_gradients():
    x = pictures()
    graph, params = nnx.split(group_norm.GroupNorm(12, 3, Compute(dtype=jnp.float32)))
    params["scale"][...], params["bias"][...] = jnp.arange(12.0), jnp.full(12, 2.0)
    normal = group_norm.normalize(x, 3)
    found, back = jax.vjp(lambda params: nnx.merge(graph, params)(x), params)
    np.testing.assert_allclose(found, normal * np.arange(12) + 2, atol=1e-5)
    (gradient,) = back(jnp.ones_like(x))
    np.testing.assert_allclose(gradient["scale"][...], normal.sum((0, 1, 2)), atol=1e-4)
    np.testing.assert_allclose(gradient["bias"][...], np.full(12, 60))


@pytest.mark.parametrize("platform, products", [("cpu", 4), ("cuda", 0), ("tpu", 0)])
def test_sums_are_products_on_cpus(platform, products):
    """Two of the statistics, two of the gradient; other backends fuse reductions with what is summed."""

    def both(x, cotangent):
        return jax.vjp(lambda x: group_norm.normalize(x, 3), x)[1](cotangent)[0]

    x = pictures()
    text = jax.jit(both).trace(x, x).lower(lowering_platforms=(platform,)).as_text()
    assert text.count("stablehlo.dot_general") == products
    assert text.count("dimensions = [1, 2]") == 4 - products
