"""GELU, SiLU and their gradients are PyTorch's, in float32 and in bfloat16."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from srpo_jax.models.activation import gelu, silu

VALUES = np.concatenate([np.linspace(-12, 12, 4001), [0.0, -100.0, 100.0]]).astype(np.float32)


THEIRS = {gelu: functools.partial(torch.nn.functional.gelu, approximate="tanh"), silu: torch.nn.functional.silu}

both = pytest.mark.parametrize("ours", [gelu, silu], ids=["gelu", "silu"])


def gradient(ours, x):
    return jax.vjp(ours, x)[1](jnp.ones_like(x))[0]


def theirs(ours, dtype):
    x = torch.tensor(VALUES).to(dtype).requires_grad_(True)
    y = THEIRS[ours](x)
    y.backward(torch.ones_like(y))
    return y.detach().float().numpy(), x.grad.float().numpy()


@both
def test_in_float32(ours):
    value, slope = theirs(ours, torch.float32)
    np.testing.assert_allclose(ours(VALUES), value, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(gradient(ours, VALUES), slope, rtol=1e-6, atol=1e-5)


@both
@pytest.mark.parametrize("index", [0, 1], ids=["value", "gradient"])
def test_in_bfloat16_it_is_rounded_once(ours, index):
    """The same numbers but for one in 500, a neighbour; those of jax.nn.gelu are others in 46 of 100. Far to the left,
    where PyTorch's 1 + tanh has no digits left, both are nearly 0."""
    x = jnp.asarray(VALUES, jnp.bfloat16)
    found, wanted = (ours, functools.partial(gradient, ours))[index](x), theirs(ours, torch.bfloat16)[index]
    assert found.dtype == jnp.bfloat16
    found, near = np.asarray(found, np.float32), np.abs(VALUES) < 3
    np.testing.assert_allclose(found, wanted, rtol=2**-7, atol=2e-5)
    assert np.mean(found[near] != wanted[near]) < 0.01
