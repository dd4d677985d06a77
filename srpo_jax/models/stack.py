"""Repeated blocks as one stacked module: parameters carry a leading layer axis, and a scan runs them.

A stack of 38 blocks then compiles as one; see also ``Compute.remat`` and ``Compute.scan_unroll``. Every turn of the
scan copies a layer's parameters out of the stack; ``unstack`` makes these copies beforehand.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from srpo_jax.models.compute import Compute


def stack(constructor: Callable[[nnx.Rngs], nnx.Module], layers: int, rngs: nnx.Rngs) -> nnx.Module:
    """``layers`` blocks of one kind, each with its own random parameters, stacked along a first axis of every leaf."""

    @nnx.split_rngs(splits=layers)
    @nnx.vmap(in_axes=(0,), transform_metadata={nnx.PARTITION_NAME: "layers"})
    def construct(rngs: nnx.Rngs) -> nnx.Module:
        return constructor(rngs)

    return construct(rngs)


def unstack(blocks: nnx.Module) -> nnx.List:
    """The blocks of a stack one by one, each with parameters of its own, as ``scan_blocks`` takes them too."""
    graphdef, state = nnx.split(blocks)
    layers = len(jax.tree.leaves(state)[0])
    return nnx.List([nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf[i], state)) for i in range(layers)])  # noqa: B023


def scan_blocks(
    blocks: nnx.Module,
    carry: Any,
    compute: Compute,
    call: Callable[[nnx.Module, Any], Any] | None = None,
    some: range | None = None,
) -> Any:
    """Runs stacked blocks one after another: ``carry = call(block, carry)``, by default ``block(carry)``.

    The carry is a tree of arrays whose shapes and dtypes every block keeps. ``some`` are the numbers of the blocks that
    run, None for all. A pass through some, or through unstacked blocks, rematerialises nothing: it takes no gradient.
    """
    if isinstance(blocks, nnx.List):
        for block in blocks if some is None else (blocks[number] for number in some):
            carry = block(carry) if call is None else call(block, carry)
        return carry
    graphdef, state = nnx.split(blocks)

    def body(carry: Any, layer: nnx.State) -> tuple[Any, None]:
        block = nnx.merge(graphdef, layer)
        return (block(carry) if call is None else call(block, carry)), None

    def numbered(carry: Any, number: jax.Array) -> tuple[Any, None]:
        # Picked one by one: a slice of the stack would be a second copy of its weights.
        return body(carry, jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, number, keepdims=False), state))

    if some is not None:
        return jax.lax.scan(numbered, carry, jnp.asarray(some, jnp.int32), unroll=compute.scan_unroll)[0]
    return jax.lax.scan(compute.checkpoint(body), carry, state, unroll=compute.scan_unroll)[0]
