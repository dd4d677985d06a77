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


def without(blocks: nnx.Module, *names: str) -> nnx.Module:
    """The blocks without some of their parts: those that do not run where the blocks do."""
    if isinstance(blocks, nnx.List):
        return nnx.List([without(block, *names) for block in blocks])
    rest = nnx.merge(*nnx.split(blocks))
    for name in names:
        delattr(rest, name)
    return rest


def map_part(blocks: nnx.Module, name: str, call: Callable[[nnx.Module], jax.Array], compute: Compute) -> jax.Array:
    """``call(part)`` of the part ``name`` of every block: [layers, ...]."""
    if isinstance(blocks, nnx.List):
        return jnp.stack([call(getattr(block, name)) for block in blocks])
    graphdef, state = nnx.split(getattr(blocks, name))

    def body(_: None, layer: nnx.State) -> tuple[None, jax.Array]:
        return None, call(nnx.merge(graphdef, layer))

    return jax.lax.scan(body, None, state, unroll=compute.scan_unroll)[1]


def scan_blocks(
    blocks: nnx.Module,
    carry: Any,
    compute: Compute,
    call: Callable[[nnx.Module, Any, Any], Any] = lambda block, carry, _: block(carry),
    given: Any = None,
    some: range | None = None,
) -> Any:
    """Runs stacked blocks one after another: ``carry = call(block, carry, given)``.

    The carry is a tree of arrays whose shapes and dtypes every block keeps; of ``given``, a tree of arrays [layers,
    ...], each block gets its own. ``some`` are the numbers of the blocks that run, None for all. A pass through some,
    or through unstacked blocks, rematerialises nothing: it takes no gradient.
    """
    if isinstance(blocks, nnx.List):
        for number in range(len(blocks)) if some is None else some:
            carry = call(blocks[number], carry, jax.tree.map(lambda leaf: leaf[number], given))  # noqa: B023
        return carry
    graphdef, state = nnx.split(blocks)

    def body(carry: Any, layer: tuple[nnx.State, Any]) -> tuple[Any, None]:
        return call(nnx.merge(graphdef, layer[0]), carry, layer[1]), None

    def numbered(carry: Any, number: jax.Array) -> tuple[Any, None]:
        # Picked one by one: a slice of the stack would be a second copy of its weights.
        def pick(leaf: jax.Array) -> jax.Array:
            return jax.lax.dynamic_index_in_dim(leaf, number, keepdims=False)

        return body(carry, jax.tree.map(pick, (state, given)))

    if some is not None:
        return jax.lax.scan(numbered, carry, jnp.asarray(some, jnp.int32), unroll=compute.scan_unroll)[0]
    return jax.lax.scan(compute.checkpoint(body), carry, (state, given), unroll=compute.scan_unroll)[0]
