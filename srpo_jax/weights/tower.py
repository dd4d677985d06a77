"""The tables' common parts for vision and text towers: a dense layer, a norm, fused attention, a score's head."""

from collections.abc import Sequence

from srpo_jax.weights.rules import Rule
from srpo_jax.weights.transforms import each, identity, linear, split


def norm(ours: str, theirs: str, layers: int | None = None) -> list[Rule]:
    """Scale and bias."""
    return [
        Rule(f"{ours}.scale", f"{theirs}.weight", identity, layers),
        Rule(f"{ours}.bias", f"{theirs}.bias", identity, layers),
    ]


def dense(ours: str, theirs: str, layers: int | None = None) -> list[Rule]:
    """Kernel and bias."""
    return [
        Rule(f"{ours}.kernel", f"{theirs}.weight", linear, layers),
        Rule(f"{ours}.bias", f"{theirs}.bias", identity, layers),
    ]


def fused_attention(ours: str, weight: str, bias: str, width: int, layers: int | None = None) -> list[Rule]:
    """q, k and v of ours from one matrix and one bias, whose rows are in this order."""
    kernels, biases = ([f"{ours}.{x}.{part}" for x in "qkv"] for part in ("kernel", "bias"))
    rows = split(width, width, width)
    return [
        Rule(kernels, weight, rows >> each(linear, linear, linear), layers),
        Rule(biases, bias, rows, layers),
    ]


def head(theirs: str, numbers: Sequence[int]) -> list[Rule]:
    """A score's head: the dense layers of a torch ``Sequential`` that have these numbers in it; dropout has others."""
    return [rule for i, number in enumerate(numbers) for rule in dense(f"head.layers.{i}", f"{theirs}.{number}")]
