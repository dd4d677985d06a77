"""Whether a checkpoint that was just written can be opened again: known now, and not when a run wants to go on from it.

Of each of its parts the metadata and the smallest array are read, which takes milliseconds; what is in the arrays,
checksums watch over (``integrity``).
"""

from collections.abc import Iterable

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath


def trouble(checkpoint: epath.Path, parts: Iterable[str]) -> str:
    """Why one of those parts of a checkpoint that are there cannot be opened, in words; "" if all can.

    To be called by one process; it waits for no other.
    """
    for folder in [checkpoint / part for part in parts if (checkpoint / part).exists()]:
        try:
            _read_smallest(folder)
        except Exception as error:  # of several libraries, which take what is missing for many things
            return f"{folder}: {' '.join(f'{type(error).__name__}: {error}'.split())[:200]}"
    return ""


def _read_smallest(folder: epath.Path) -> None:
    handler = ocp.PyTreeCheckpointHandler()
    tree = handler.metadata(folder).tree
    leaves, structure = jax.tree.flatten(tree)
    if not leaves:  # plain gradient descent remembers nothing
        return
    smallest = min(range(len(leaves)), key=lambda place: np.prod(leaves[place].shape))
    chosen = [place == smallest for place in range(len(leaves))]
    item = structure.unflatten([
        jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if wanted else ocp.PLACEHOLDER
        for leaf, wanted in zip(leaves, chosen, strict=True)
    ])  # fmt: skip
    how = structure.unflatten([ocp.RestoreArgs(restore_type=np.ndarray)] * len(leaves))
    found = handler.restore(folder, args=ocp.args.PyTreeRestore(item=item, restore_args=how))
    if np.shape(jax.tree.leaves(found)[smallest]) != tuple(leaves[smallest].shape):
        raise ValueError("an array has another shape than was written")
