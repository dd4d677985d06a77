"""Loads a transformer with the kernels of its blocks quantised, from the files of ``folder``.

A layer of a kernel at a time is read, placed as the kernel would be, quantised where it lies, and put into the stack:
beside what stays, memory holds one layer of one kernel.
"""

import functools
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from srpo_jax.models.compute import Compute, Params, path_name
from srpo_jax.models.quantize import quantize
from srpo_jax.weights import folder

PARTS = ("codes", "scales")  # of a ``quantize.QuantizedKernel``, in the order of what ``quantize`` returns


def load(
    path: str | os.PathLike,
    network: str,
    kind: str,
    compute: Compute,
    sharding: Callable[[str, tuple[int, ...]], NamedSharding],
) -> Params:
    """The frozen part of a transformer as ``models.lora.abstract`` has it, from a folder in our format.

    Args:
      path: the folder.
      network: the transformer's name in ``folder.NETWORKS``.
      kind: of ``quantize.KINDS``.
      compute: execution options; what is not quantised is cast to ``compute.param_dtype``.
      sharding: as ``folder.load`` takes it; called for kernels, their codes and their scales.

    Raises UserError as ``folder.open_weights`` does.
    """
    _, config, source = folder.open_weights(path, network)
    dtype, stacks = np.dtype(compute.param_dtype), folder.classes(network)[1].STACKS

    def read(key_path: tuple, leaf: jax.ShapeDtypeStruct) -> Any:
        name = path_name(key_path)
        if name.startswith(stacks) and name.endswith(".kernel"):
            return _quantized(source, name, leaf.shape, kind, dtype, sharding)
        return jax.make_array_from_callback(
            leaf.shape, sharding(name, leaf.shape), lambda index: np.asarray(source.read(name)[index], dtype)
        )

    return jax.tree_util.tree_map_with_path(read, folder.abstract(network, config, compute)[1])


def _quantized(source: Any, name: str, shape: tuple[int, ...], kind: str, dtype: Any, sharding: Callable) -> Params:
    whole = sharding(name, shape)
    one = NamedSharding(whole.mesh, P(*whole.spec[1:]))
    like = jax.eval_shape(functools.partial(quantize, kind=kind, axis=1), jax.ShapeDtypeStruct(shape, dtype))
    places = tuple(sharding(f"{name}.{part}", array.shape) for part, array in zip(PARTS, like, strict=True))
    stacks = jax.jit(lambda: tuple(jnp.zeros(a.shape, a.dtype) for a in like), out_shardings=places)()
    put = _writer(kind, places)
    for layer in range(shape[0]):
        kernel = jax.make_array_from_callback(
            shape[1:], one, lambda index, layer=layer: np.asarray(source.read_layer(name, layer)[index], dtype)
        )
        # Waited for: what is asked for ahead is allocated ahead.
        stacks = jax.block_until_ready(put(stacks, kernel, jax.device_put(np.int32(layer))))
    return dict(zip(PARTS, stacks, strict=True))


@functools.cache
def _writer(kind: str, places: tuple[NamedSharding, NamedSharding]) -> Callable:
    """A compiled ``put(stacks, kernel, layer) -> stacks``, in the memory of the stacks."""

    def put(stacks: tuple[jax.Array, jax.Array], kernel: jax.Array, layer: jax.Array) -> tuple[jax.Array, jax.Array]:
        return tuple(stack.at[layer].set(part) for stack, part in zip(stacks, quantize(kernel, kind), strict=True))

    return jax.jit(put, donate_argnums=0, out_shardings=places)
