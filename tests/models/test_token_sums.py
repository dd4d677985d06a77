"""Gradients that are summed over tokens: in float32, whatever dtype the tokens have."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from srpo_jax.models.compute import Compute, bind, build
from srpo_jax.models.flux import Flux, FluxConfig
from srpo_jax.models.flux_layers import add_bias, add_gated

CONFIG = FluxConfig(
    in_channels=64, out_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
    joint_attention_dim=24, pooled_projection_dim=20, guidance_embeds=True, axes_dims_rope=(4, 6, 6),
)  # fmt: skip
TEXT, IMAGE = 21, 35  # tokens: sizes that no other axis has
BFLOAT16 = jnp.dtype(jnp.bfloat16)


def lowered_gradient(dtype):
    """The StableHLO of the gradient of all parameters of a double and a single block."""
    graphdef, params = build(lambda rngs: Flux(CONFIG, Compute(dtype=dtype), rngs=rngs))
    ids = jnp.zeros((IMAGE, 3)), jnp.zeros((TEXT, 3))

    def loss(params):
        vectors = jnp.ones((2, 20)), jnp.ones(2), jnp.ones(2)
        out = bind(graphdef, params)(jnp.ones((2, IMAGE, 64)), jnp.ones((2, TEXT, 24)), *vectors, *ids)
        return out.astype(jnp.float32).sum()

    return jax.jit(jax.grad(loss)).lower(params).as_text()


def sums_over_tokens(text):
    """The dtypes in which a program sums over tokens, one a sum."""
    pattern = (
        r"stablehlo\.reduce\(.*?applies stablehlo\.add across dimensions = \[([\d, ]+)\] : \(tensor<([\dx]+)x(\w+)>"
    )
    found = []
    for axes, shape, dtype in re.findall(pattern, text):
        sizes = [int(shape.split("x")[int(axis)]) for axis in axes.split(",")]
        if {TEXT, IMAGE, TEXT + IMAGE} & set(sizes):
            found.append(dtype)
    return found


def test_no_gradient_is_summed_over_tokens_in_bfloat16():
    found = sums_over_tokens(lowered_gradient(BFLOAT16))
    # Biases: 2 before the blocks, 4 in each stream of the double block, 3 in the single one, 1 behind them. Shifts and
    # scales: 2 of each in a stream, 1 in the single block, 1 behind. Gates: 2 in a stream, 1 in the single block.
    # Scales of queries' and keys' norms: 2 in a stream, 2 in the single block.
    assert len(found) >= (2 + 8 + 3 + 1) + (8 + 2 + 2) + (4 + 1) + (4 + 2)
    assert set(found) == {"f32"}


def test_the_plain_formulas_are_summed_in_bfloat16():
    """What is counted above is there to be found."""

    def plain(x, gate, bias):
        return (x + gate * (x + bias)).astype(jnp.float32).sum()

    shapes = (2, IMAGE, 8), (2, 1, 8), (8,)
    arguments = [jnp.ones(shape, BFLOAT16) for shape in shapes]
    assert sums_over_tokens(jax.jit(jax.grad(plain, (0, 1, 2))).lower(*arguments).as_text()) == ["bf16", "bf16"]


@pytest.fixture
def tokens():
    """x, gate, change, bias and cotangent in bfloat16: 4,608 tokens, as 1024x1024 pixels and their text have."""
    rng = np.random.default_rng(0)
    shapes = (1, 4608, 16), (1, 1, 16), (1, 4608, 16), (16,), (1, 4608, 16)
    return [jnp.asarray(0.1 + rng.normal(size=shape), BFLOAT16) for shape in shapes]


def error(found, exact):
    return np.abs(np.asarray(found, np.float64) - exact).max() / np.abs(exact).max()


def test_sums_are_those_of_float64_rounded_once(tokens):
    x, gate, change, bias, cotangent = tokens
    wide = [np.asarray(array, np.float64) for array in tokens]
    exact = {"bias": wide[4].sum((0, 1)), "gate": (wide[4] * wide[2]).sum(1, keepdims=True)}
    found = {
        "bias": jax.vjp(add_bias, x, bias)[1](cotangent)[1],
        "gate": jax.vjp(add_gated, x, gate, change)[1](cotangent)[1],
    }
    rounding = float(jnp.finfo(BFLOAT16).eps) / 2
    for name, sums in found.items():
        assert sums.dtype == BFLOAT16 and error(sums, exact[name]) <= rounding, name
    # A float32 master gets all digits.
    master = jax.vjp(add_bias, x, bias.astype(jnp.float32))[1](cotangent)[1]
    assert master.dtype == jnp.float32 and error(master, exact["bias"]) < 1e-6
    # A sum that is rounded to bfloat16 at every step, as a GPU may do it.
    steps = jax.lax.scan(lambda total, row: (total + row, None), jnp.zeros(16, BFLOAT16), cotangent[0])[0]
    assert error(steps, exact["bias"]) > 10 * rounding


@pytest.mark.parametrize("dtype", [jnp.float32, BFLOAT16])
def test_all_else_is_the_plain_formula_bit_for_bit(tokens, dtype):
    x, gate, change, bias, cotangent = (array.astype(dtype) for array in tokens)
    pairs = (
        (add_bias, lambda x, bias: x + bias.astype(x.dtype), (x, bias.astype(jnp.float32)), (0,)),
        (add_gated, lambda x, gate, change: x + gate * change, (x, gate, change), (0, 2)),
    )
    for ours, plain, arguments, places in pairs:
        found, wanted = (jax.vjp(function, *arguments) for function in (ours, plain))
        np.testing.assert_array_equal(found[0], wanted[0])
        for place in places:
            np.testing.assert_array_equal(found[1](cotangent)[place], wanted[1](cotangent)[place])
