"""Checkpoints of a run, by Orbax, and the workdir that holds them.

    WORKDIR/config.json                the run's configuration; WORKDIR is a local folder or gs://BUCKET/PATH
           /models.json                fingerprints of its models, see resume
    WORKDIR/checkpoints/STEP/params    the transformer's weights; with LoRA, its low-rank factors alone
                            /opt_state, /ema and /rollout (if there are)
                            /run       JSON: step, random seed, position in the data, configuration
                            /weights_only   in older ones, which have no opt_state and no rollout any more

Arrays are written by every process, each its shards, while training goes on; a checkpoint appears under its final name
when all of it is there. They can be restored onto any mesh.
"""

import contextlib
import itertools
import json
import math
import os
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from ml_collections import ConfigDict

from srpo_jax import config as config_lib
from srpo_jax import distributed, pulse, resume, storage, terminal
from srpo_jax.algorithm.step import TrainState
from srpo_jax.errors import UserError
from srpo_jax.models.compute import Params
from srpo_jax.models.lora import Lora

CONFIG, MODELS, CHECKPOINTS = "config.json", "models.json", "checkpoints"
COMMITTED = "_CHECKPOINT_METADATA"  # the file that Orbax puts into a checkpoint
# The last file of a checkpoint in a bucket. On a disk, a checkpoint is complete when its folder has its final name.
COMMITTED_IN_BUCKET = "commit_success.txt"
ARRAYS = ("params", "opt_state", "ema", "rollout")
# What only a run that goes on needs: it is deleted from older checkpoints, which have this file then.
FOR_RESUMING, WEIGHTS_ONLY = ("opt_state", "rollout"), "weights_only"
# Storage that takes less than so many bytes a second of a job counts as broken, after so many seconds at the least.
SLOWEST, LEAST_DEADLINE = 20e6, 1200.0


# --- the workdir ------------------------------------------------------------------------------------------------------


def check_workdir(workdir: str | os.PathLike, config: ConfigDict, models: dict[str, str]) -> None:
    """Checks that a run of ``config`` may start or go on in ``workdir``, which need not exist yet. Writes nothing.

    ``models`` are the fingerprints of its models (``resume.fingerprints``).

    Raises UserError if it is not a folder, or a bucket that does not answer, or holds a run of another configuration
    (the message names what differs).
    """
    workdir = storage.path(workdir)
    storage.check(workdir)
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"--workdir={workdir} is a file; name a folder")
    file = workdir / CONFIG
    if not file.exists():
        if (workdir / CHECKPOINTS).exists():
            raise UserError(f"{workdir} holds checkpoints but no {CONFIG}; choose another --workdir")
        return
    try:
        there = config_lib.flatten(json.loads(file.read_text(encoding="utf-8")))
        known = workdir / MODELS
        models_there = json.loads(known.read_text(encoding="utf-8")) if known.exists() else {}
    except (ValueError, OSError) as error:
        raise UserError(f"{file} or {MODELS} beside it cannot be read as JSON: {error}") from error
    found = resume.differences(config_lib.flatten(config), there, models, models_there)
    if found:
        more = f"; and {len(found) - 6} more" if len(found) > 6 else ""
        raise UserError(f"{workdir} holds a run of another config: {'; '.join(found[:6])}{more}. "
                        "Choose another --workdir")  # fmt: skip


def write_config(workdir: str | os.PathLike, config: ConfigDict, models: dict[str, str]) -> None:
    """Writes ``config.json`` and ``models.json``, each at once or not at all; process 0 does it for a job."""
    if jax.process_index() != 0:
        return
    storage.write(storage.path(workdir) / CONFIG, f"{config_lib.to_json(config)}\n".encode())
    storage.write(storage.path(workdir) / MODELS, f"{json.dumps(models, indent=2)}\n".encode())


def steps(workdir: str | os.PathLike) -> list[int]:
    """The complete checkpoints of a workdir, ascending. What an interrupted save or copy left is not among them."""
    folder = storage.path(workdir) / CHECKPOINTS
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(name) for name in names if name.isdecimal() and _complete(folder / name))


def newest(workdir: str | os.PathLike) -> int | None:
    """The newest checkpoint of a workdir, which a run goes on from. Raises UserError if it holds the weights alone."""
    found = max(steps(workdir), default=None)
    if found is not None and not resumable(path := storage.path(workdir) / CHECKPOINTS / str(found)):
        raise UserError(
            f"{path} holds weights for `generate` and `convert export`, and no optimizer state to train on with (those "
            "that had it are gone, see config.checkpoint.resumable); choose another --workdir"
        )
    return found


def _complete(path: epath.Path) -> bool:
    """Whether a checkpoint was written as a whole; of an older one, the optimiser's state may have been deleted."""
    items = ("params/_METADATA", "run/metadata", COMMITTED)
    if storage.in_bucket(path):
        items = (COMMITTED_IN_BUCKET, *items)
    return all((path / item).exists() for item in items) and (resumable(path) or (path / WEIGHTS_ONLY).exists())


def resumable(path: epath.Path) -> bool:
    """Whether a run can go on from a complete checkpoint, the folder ``path``: it has the optimiser's state."""
    return (path / "opt_state/_METADATA").exists() and not (path / WEIGHTS_ONLY).exists()


def size_of(tree: Any) -> int:
    """Bytes of all arrays of a tree (``ShapeDtypeStruct`` leaves will do)."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


# --- training ---------------------------------------------------------------------------------------------------------


def deadline_of(state: TrainState) -> float:
    """Seconds in which a checkpoint of a state (``ShapeDtypeStruct`` leaves will do) has to be written."""
    return LEAST_DEADLINE + size_of(state) / SLOWEST


def _free_name(path: epath.Path) -> epath.Path:
    """Where a checkpoint that is not complete goes: ``STEP.incomplete``, or with a number behind it."""
    names = itertools.chain(["incomplete"], (f"incomplete.{number}" for number in itertools.count(2)))
    return next(place for name in names if not (place := path.with_name(f"{path.name}.{name}")).exists())


class Checkpoints:
    """The checkpoints of a run that is being trained.

    Args:
      workdir: of the run; its folder of checkpoints is made.
      keep: how many of the newest stay.
      deadline: seconds in which one has to be written or read, see ``deadline_of``.
      resumable: of those that stay, how many of the newest keep the optimiser's state.
    """

    def __init__(self, workdir: str | os.PathLike, keep: int, deadline: float = LEAST_DEADLINE, resumable: int = 1):
        folder = storage.absolute(storage.path(workdir)) / CHECKPOINTS
        if not storage.in_bucket(folder):
            folder.mkdir(parents=True, exist_ok=True)
        if jax.process_index() == 0 and not storage.in_bucket(folder):
            for path in folder.iterdir():
                # Orbax would count a bare numbered folder as a checkpoint, and refuse to write that step. In a bucket
                # it removes what is not complete.
                if path.name.isdecimal() and not _complete(path):
                    path.rename(_free_name(path))
        self._folder = folder
        self._workdir, self._deadline, self._resumable = workdir, deadline, resumable
        self._saving = (0, 0, 0.0)  # step, bytes, and when it began
        self._manager = ocp.CheckpointManager(
            folder,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                cleanup_tmp_directories=True,
                async_options=ocp.options.AsyncOptions(
                    timeout_secs=math.ceil(deadline), post_finalization_callback=self._tell
                ),
            ),
            item_handlers={name: ocp.StandardCheckpointHandler() for name in ARRAYS}
            | {"run": ocp.JsonCheckpointHandler()},
        )

    def latest(self) -> int | None:
        """The step of the newest checkpoint; waits until what is being written is complete. Raises as ``save``."""
        with self._in_time():
            self._manager.wait_until_finished()
        return max(steps(self._workdir), default=None)

    def restore(self, step: int, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Reads a checkpoint into the shapes, dtypes and shardings of ``like`` (``ShapeDtypeStruct`` leaves).

        Returns:
          The state, and the dictionary that ``save`` was given.

        Raises UserError if the checkpoint is not of such a state or cannot be read.
        """
        path = self._folder / str(step)
        wanted = {name: getattr(like, name) for name in ARRAYS if getattr(like, name) is not None}
        try:
            stored = self._manager.item_metadata(step)
            for name, tree in wanted.items():
                # Orbax casts to the dtype that is asked for and says nothing.
                _check_same(path / name, stored[name].tree, tree)
            args = {name: ocp.args.StandardRestore(tree) for name, tree in wanted.items()}
            with pulse.bounded(self._deadline + distributed.PATIENCE, f"reading {path}"):
                found = self._manager.restore(step, args=ocp.args.Composite(**args, run=ocp.args.JsonRestore()))
        except (ValueError, KeyError, OSError, AttributeError) as error:
            earlier = [s for s in steps(self._workdir) if s < step and resumable(self._folder / str(s))]
            remedy = "delete it to go on from an earlier checkpoint" if earlier else (
                "no earlier one has the optimizer state; choose another --workdir"
            )  # fmt: skip
            raise UserError(f"{path} cannot be read ({str(error).splitlines()[0]}); {remedy}") from error
        counter = jax.device_put(np.int32(step), like.step.sharding)
        return TrainState(step=counter, **{name: found[name] for name in wanted}), found["run"]

    def save(self, step: int, state: TrainState, run: dict[str, Any]) -> None:
        """Starts to write the state and a JSON-able dictionary; returns when training may change the state.

        ``run["step"]`` is set to ``step``. A step that is already saved is left as it is. Waits for the save before
        this one; raises UserError if storage is too slow for it.
        """
        if step in self._manager.all_steps():
            return
        arrays = {name: getattr(state, name) for name in ARRAYS if getattr(state, name) is not None}
        args = {name: ocp.args.StandardSave(tree) for name, tree in arrays.items()}
        run = ocp.args.JsonSave(run | {"step": step})
        # Orbax copies to the host, and tells the processes apart, in ways that a transfer guard would not let pass on
        # accelerators.
        with jax.transfer_guard("allow"), self._in_time():
            self._manager.wait_until_finished()
            self._leave_weights()
            self._saving = step, size_of(arrays), time.monotonic()
            saved = self._manager.save(step, args=ocp.args.Composite(**args, run=run), force=True)
        if not saved:
            raise RuntimeError(f"the checkpoint of step {step} was not written")

    def close(self) -> None:
        """Waits until everything is written. Raises as ``save``."""
        with self._in_time():
            self._manager.wait_until_finished()
            self._leave_weights()
            self._manager.close()

    def _tell(self) -> None:
        """Called by Orbax, in a thread of its own, when all is written and gets its name."""
        step, size, started = self._saving
        terminal.say(f"saved checkpoint {step}: {terminal.in_bytes(size)} in {time.monotonic() - started:.1f} s")

    def _leave_weights(self) -> None:
        """Deletes of older checkpoints what only a run that goes on needs. None may be being written."""
        if jax.process_index() != 0:
            return
        for step in steps(self._workdir)[: -self._resumable]:
            path = self._folder / str(step)
            try:
                # First of all this: what is interrupted after it goes on at the next save.
                if not (path / WEIGHTS_ONLY).exists():
                    storage.write(path / WEIGHTS_ONLY, b"")
                for item in FOR_RESUMING:
                    if (path / item).exists():
                        (path / item).rmtree()
            except Exception as error:  # of several libraries; it costs room, and no run should end for that
                terminal.say(f"the optimizer state of {path} could not be deleted: {' '.join(str(error).split())}")

    @contextlib.contextmanager
    def _in_time(self) -> Iterator[None]:
        """For a block that waits until a checkpoint is written. Raises UserError if that takes too long.

        A process that is lost is noticed by other means and sooner (``pulse``): who gets here has slow storage.
        """
        try:
            with pulse.bounded(self._deadline + distributed.PATIENCE, f"saving into {self._folder}"):
                yield
        except (TimeoutError, jax.errors.JaxRuntimeError) as error:
            if not isinstance(error, TimeoutError) and "DEADLINE_EXCEEDED" not in str(error):
                raise
            raise UserError(
                f"a checkpoint was not written into {self._folder} within {self._deadline / 60:.0f} minutes, with no "
                "process of the job lost: the storage is too slow or does not answer; choose a faster one for --workdir"
            ) from error


def _check_same(path: epath.Path, stored: Any, wanted: Any) -> None:
    there, here = _leaves(stored), _leaves(wanted)
    for name in sorted(there.keys() | here.keys()):
        if there.get(name) != here.get(name):
            words = f"{name} is {_words(there, name)} there, {_words(here, name)} here"
            raise UserError(f"{path} is not of this model: {words}")


def _leaves(tree: Any) -> dict[str, tuple[tuple[int, ...], str]]:
    def name(entry: Any) -> str:
        return str(next(getattr(entry, kind) for kind in ("key", "idx", "name") if hasattr(entry, kind)))

    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {".".join(map(name, path)): (tuple(leaf.shape), str(jnp.dtype(leaf.dtype))) for path, leaf in flat}


def _words(leaves: dict[str, tuple[tuple[int, ...], str]], name: str) -> str:
    return "not" if name not in leaves else f"{leaves[name][1]}{list(leaves[name][0])}"


# --- sampling and export ----------------------------------------------------------------------------------------------


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
        found = ocp.PyTreeCheckpointer().restore(self._folder, args=args)
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
    found = steps(workdir)
    if not found:
        raise UserError(f"{workdir} holds no complete checkpoint; expected the --workdir of a training run")
    if step is not None and step not in found:
        raise UserError(f"{workdir} holds no checkpoint of step {step}; there are {', '.join(map(str, found))}")
    checkpoint = storage.absolute(workdir) / CHECKPOINTS / str(found[-1] if step is None else step)
    folder = checkpoint / ("ema" if ema else "params")
    if not folder.is_dir():
        raise UserError(f"{folder.parent} holds no moving average; it was trained with optim.ema_decay=0")
    tree = ocp.StandardCheckpointer().metadata(folder).item_metadata.tree

    def leaf(path: tuple, meta: Any) -> StoredArray:
        return StoredArray(folder, tuple(entry.key for entry in path), meta.shape, meta.dtype)

    return jax.tree_util.tree_map_with_path(leaf, tree)


def lora(workdir: str | os.PathLike) -> Lora | None:
    """How the low-rank factors of a run with checkpoints adapt their base; None if it trained the transformer itself.

    Raises UserError if the run's configuration cannot be read.
    """
    file = storage.path(workdir) / CONFIG
    if not file.exists():  # not a run's, but a folder of checkpoints
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8")).get("lora", {"rank": 0})
        return Lora.from_config(ConfigDict(content))
    except (ValueError, OSError, AttributeError) as error:
        raise UserError(f"{file} cannot be read: {error}") from error
