"""Whether a checkpoint that was just written can be opened again: known now, and not when a run wants to go on from it.

Of each of its parts the smallest array is read, which takes milliseconds; what is in the others, checksums watch over
(``integrity``), which are written then.
"""

import threading
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from srpo_jax import errors, integrity, storage, terminal


class Sealer:
    """Waits in a thread until a checkpoint is complete, sees then whether it opens (in process 0), and writes this
    process's share of its checksums.

    Args:
      path: of the checkpoint.
      parts: the trees of arrays that it holds, by name; they are not kept.
      complete: whether a folder is a complete checkpoint.
    """

    def __init__(self, path: epath.Path, parts: Mapping[str, Any], complete: Callable[[epath.Path], bool]):
        self._path, self._complete, self._told, self._trouble = path, complete, threading.Event(), ""
        self._parts = {name: jax.tree.map(_like, tree) for name, tree in parts.items()}
        self._every = 2.0 if storage.in_bucket(path) else 0.2  # seconds between two looks
        self._thread = threading.Thread(target=self._run, name="sealer", daemon=True)
        self._thread.start()

    def finish(self) -> str:
        """Returns when it is done; to be called when the checkpoint is complete or will never be.

        Returns why it cannot be opened, "" if it can.
        """
        self._told.set()
        self._thread.join()
        return self._trouble

    def _run(self) -> None:
        while not (done := self._complete(self._path)) and not self._told.wait(self._every):
            pass
        try:
            if done or self._complete(self._path):
                if jax.process_index() == 0:
                    self._trouble = trouble(self._path, self._parts)
                integrity.seal(self._path)
        except Exception as error:  # a checkpoint without them is one still
            terminal.warn(f"checksums of {self._path} cannot be written ({error})")


def trouble(checkpoint: epath.Path, parts: Mapping[str, Any]) -> str:
    """Why one of those parts of a checkpoint cannot be opened, in words; "" if all can.

    ``parts``: trees of what was written, arrays or ``ShapeDtypeStruct``, by name. To be called by one process; it waits
    for no other.
    """
    for name, tree in parts.items():
        try:
            _read_smallest(checkpoint / name, tree)
        except Exception as error:  # of several libraries, which take what is missing for many things
            return f"{checkpoint / name}: {errors.brief(error, 200)}"
    return ""


def _like(array: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype)


def _read_smallest(folder: epath.Path, tree: Any) -> None:
    leaves, structure = jax.tree.flatten(tree)
    if not leaves:  # plain gradient descent remembers nothing
        return
    smallest = min(range(len(leaves)), key=lambda place: np.prod(leaves[place].shape))
    # Shapes are those that were written: to ask Orbax for them leaks a description of each array in tensorstore.
    item = structure.unflatten([_like(leaf) if n == smallest else ocp.PLACEHOLDER for n, leaf in enumerate(leaves)])
    how = structure.unflatten([ocp.RestoreArgs(restore_type=np.ndarray)] * len(leaves))
    found = ocp.PyTreeCheckpointHandler().restore(folder, args=ocp.args.PyTreeRestore(item=item, restore_args=how))
    if np.shape(jax.tree.leaves(found)[smallest]) != tuple(leaves[smallest].shape):
        raise ValueError("an array has another shape than was written")
