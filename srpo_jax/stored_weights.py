"""What a run has trained: its checkpoints' arrays for sampling and export, read when they are asked for."""

import os
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from srpo_jax import checkpoint, integrity, storage, terminal
from srpo_jax.errors import UserError
from srpo_jax.models.compute import Params


class StoredArray:
    """An array of a checkpoint, read when ``numpy.asarray`` asks for it; ``shape`` and ``dtype`` are known before."""

    def __init__(self, folder: epath.Path, path: tuple[str, ...], shape: tuple[int, ...], dtype: Any):
        self._folder, self._path = folder, path
        self.shape, self.dtype = tuple(shape), np.dtype(dtype)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        array = self.read(ocp.RestoreArgs(restore_type=np.ndarray))
        return array if dtype is None else array.astype(dtype, copy=False)

    def read(self, how: ocp.RestoreArgs) -> Any:
        """The array as ``how`` asks: on the host, or as a jax array on a sharding."""
        item, restore = jax.ShapeDtypeStruct(self.shape, self.dtype), how
        for key in reversed(self._path):
            item, restore = {key: item}, {key: restore}
        args = ocp.args.PyTreeRestore(item=item, restore_args=restore, partial_restore=True)
        try:
            found = ocp.PyTreeCheckpointer().restore(self._folder, args=args)
        except Exception as error:  # as in ``checkpoint.Checkpoints.restore``
            raise checkpoint.misread(self._folder, error) from error
        for key in self._path:
            found = found[key]
        return found


def load_params(workdir: str | os.PathLike, step: int | None = None, ema: bool = False) -> Params:
    """What was trained of the transformer (see ``lora``), nested, as ``StoredArray`` leaves: nothing is read yet.

    Args:
      workdir: of the run.
      step: of the checkpoint; None takes the newest.
      ema: the moving average instead of the weights themselves.

    Raises UserError if there is no such checkpoint.
    """
    workdir = storage.path(workdir)
    storage.check(workdir)
    if not workdir.is_dir():
        raise UserError(f"{workdir} is not a folder; expected the --workdir of a training run")
    found = checkpoint.steps(workdir)
    if not found:
        raise UserError(f"{workdir} holds no complete checkpoint; expected the --workdir of a training run")
    if step is not None and step not in found:
        raise UserError(f"{workdir} holds no checkpoint of step {step}; there are {', '.join(map(str, found))}")
    folder = storage.absolute(workdir) / checkpoint.CHECKPOINTS / str(found[-1] if step is None else step)
    left_out = [int(path.name) for path in folder.parent.iterdir() if path.name.isdecimal()]
    if step is None and max(left_out) > found[-1]:
        terminal.warn(f"{folder.parent / str(max(left_out))} is not complete; update {found[-1]} is used")
    item = folder / ("ema" if ema else "params")
    if not item.is_dir():
        raise UserError(f"{folder} holds no moving average; it was trained with optim.ema_decay=0")
    before = [number for number in found if number < int(folder.name)]
    other = f"; --step={before[-1]} is the checkpoint before it" if before else ""
    if words := integrity.damage(folder, [item.name]):
        raise UserError(words + other)
    try:
        tree = ocp.StandardCheckpointer().metadata(item).item_metadata.tree
        shapes = jax.tree.map(lambda meta: (tuple(meta.shape), np.dtype(meta.dtype)), tree)
    except Exception as error:  # as in ``checkpoint.Checkpoints.restore``
        raise UserError(f"{checkpoint.misread(item, error)}{other}") from error
    if not shapes:
        raise UserError(f"{item} cannot be read: it names no array{other}")

    def leaf(path: tuple, meta: Any) -> StoredArray:
        return StoredArray(item, tuple(entry.key for entry in path), meta.shape, meta.dtype)

    return jax.tree_util.tree_map_with_path(leaf, tree)
