"""Checkpoints of a run, by Orbax.

    WORKDIR/checkpoints/STEP/params    the transformer's weights; with LoRA, its low-rank factors alone
                            /opt_state, /ema and /rollout (if there are)
                            /run       JSON: step, random seed, position in the data, configuration
                            /checksums-P-of-N.json   of its files, see integrity; written when these are complete
                            /weights_only   in older ones, which have no opt_state and no rollout any more

Arrays are written by every process, each its shards, while training goes on; a checkpoint appears under its final name
when all of it is there. They can be restored onto any mesh.
"""

import contextlib
import dataclasses
import errno
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.checkpoint_managers import preservation_policy as preservation

from srpo_jax import distributed, integrity, leftovers, opening, pulse, storage, terminal
from srpo_jax.algorithm.step import TrainState
from srpo_jax.errors import StorageError, UserError, brief

CHECKPOINTS = "checkpoints"  # of a workdir: a local folder or gs://BUCKET/PATH
COMMITTED = "_CHECKPOINT_METADATA"  # the file that Orbax puts into a checkpoint
# The last file of a checkpoint in a bucket. On a disk, a checkpoint is complete when its folder has its final name.
COMMITTED_IN_BUCKET = "commit_success.txt"
ARRAYS = ("params", "opt_state", "ema", "rollout")
# What only a run that goes on needs: it is deleted from older checkpoints, which have this file then.
FOR_RESUMING, WEIGHTS_ONLY = ("opt_state", "rollout"), "weights_only"
# Storage that takes less than so many bytes a second of a job counts as broken, after so many seconds at the least.
SLOWEST, LEAST_DEADLINE = 20e6, 1200.0


# --- what is there ----------------------------------------------------------------------------------------------------


def steps(workdir: str | os.PathLike) -> list[int]:
    """The complete checkpoints of a workdir, ascending. What an interrupted save or copy left is not among them."""
    folder = storage.path(workdir) / CHECKPOINTS
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(name) for name in names if name.isdecimal() and complete(folder / name))


def newest(workdir: str | os.PathLike) -> int | None:
    """The newest checkpoint of a workdir, which a run goes on from. Raises UserError if it holds the weights alone."""
    found = max(steps(workdir), default=None)
    if found is not None and not resumable(path := storage.path(workdir) / CHECKPOINTS / str(found)):
        raise UserError(
            f"{path} holds weights for `generate` and `convert export`, and no optimizer state to train on with (those "
            "that had it are gone, see config.checkpoint.resumable); choose another --workdir"
        )
    return found


def complete(path: epath.Path) -> bool:
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


class Unreadable(UserError):
    """A checkpoint is damaged; the message names what of it."""


# What errors say that is not the checkpoint's fault: it may be read when the storage answers again, or memory is free.
NOT_ITS_FAULT = (
    r"\b(RESOURCE_EXHAUSTED|UNAVAILABLE|DEADLINE_EXCEEDED|PERMISSION_DENIED|UNAUTHENTICATED|ABORTED|CANCELLED)\b"
)


def misread(path: epath.Path, error: Exception) -> Exception:
    """What to raise for an error in reading a checkpoint."""
    if isinstance(error, UserError | MemoryError | jax.errors.JaxRuntimeError):
        return error
    words = brief(error)
    if isinstance(error, PermissionError | TimeoutError | ConnectionError) or re.search(NOT_ITS_FAULT, words):
        return UserError(f"{path} cannot be read now ({words}); try again when its storage answers")
    return Unreadable(f"{path} cannot be read ({words})")


def _reason(error: Exception) -> str:
    """Why something could not be written, in a few words; tensorstore has a number for it at the end of a page."""
    text = " ".join(str(error).split())
    if number := re.search(r"os_error_code='(\d+)'", text):
        return os.strerror(int(number[1]))
    return getattr(error, "strerror", None) or f"{type(error).__name__}: {text[:300]}"


# --- training ---------------------------------------------------------------------------------------------------------


def deadline_of(state: TrainState) -> float:
    """Seconds in which a checkpoint of a state (``ShapeDtypeStruct`` leaves will do) has to be written."""
    return LEAST_DEADLINE + size_of(state) / SLOWEST


class Checkpoints:
    """The checkpoints of a run that is being trained.

    Args:
      workdir: of the run; its folder of checkpoints is made.
      keep: how many of the newest stay.
      deadline: seconds in which one has to be written or read, see ``deadline_of``.
      resumable: of those that stay, how many of the newest keep the optimiser's state.
      patient: whether training goes on after one that cannot be written; of a job of several processes it never does,
        since the others wait for each other in a save.

    Attributes:
      best: the update whose checkpoint stays beside the newest ones; None if no one does.
      seconds: that the last complete one has taken; None if there is none.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        keep: int,
        deadline: float = LEAST_DEADLINE,
        resumable: int = 1,
        patient: bool = False,
    ):
        folder = storage.absolute(storage.path(workdir)) / CHECKPOINTS
        self._folder, self._keep = folder, keep
        self._workdir, self._deadline, self._resumable = workdir, deadline, resumable
        self._patient = patient and jax.process_count() == 1
        self._began, self.seconds = time.monotonic(), None  # when the newest save did; before the first, this one
        self._saving = (0, 0)  # step and bytes
        self._sealer: opening.Sealer | None = None
        self.best: int | None = None
        try:
            if not storage.in_bucket(folder):
                folder.mkdir(parents=True, exist_ok=True)
            self._manager: ocp.CheckpointManager | None = self._open()
        except OSError as error:
            raise StorageError(f"{folder} cannot be written: {error.strerror}") from error

    def _open(self) -> ocp.CheckpointManager:
        """Orbax's manager of what is there; half of a checkpoint is removed. Raises OSError if the workdir is gone, in
        whose place Orbax would make another."""
        if not storage.in_bucket(self._folder):
            self._folder.mkdir(exist_ok=True)
        if jax.process_index() == 0:
            leftovers.sweep(self._folder, self._keep, complete)
        return ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=_Kept(self._keep, lambda: self.best),
                cleanup_tmp_directories=False,  # see leftovers; Orbax does it in a thread, and nobody knows when
                async_options=ocp.options.AsyncOptions(
                    timeout_secs=math.ceil(self._deadline), post_finalization_callback=self._tell
                ),
            ),
            item_handlers={name: ocp.StandardCheckpointHandler() for name in ARRAYS}
            | {"run": ocp.JsonCheckpointHandler()},
        )

    @property
    def age(self) -> float:
        """Seconds since the newest save began, or was tried; before the first one, since this start."""
        return time.monotonic() - self._began

    def latest(self) -> int | None:
        """The step of the newest checkpoint; waits until what is being written is complete. Raises StorageError."""
        self._finish()
        return max(steps(self._workdir), default=None)

    def check(self) -> None:
        """Looks whether the checkpoint that is being written has failed meanwhile. Raises StorageError, or says so and
        goes on where training is to."""
        with self._forgiven(), self._told():
            if self._manager is not None:
                self._manager.check_for_errors()

    def restore_newest(self, like: TrainState) -> tuple[int, TrainState, dict[str, Any]]:
        """Reads the newest checkpoint that can be read and has the optimiser's state, as ``restore`` does; returns its
        step too.

        Others are named in a warning and set aside, as ``STEP.unreadable``. Raises UserError if there is none.
        """
        while found := [step for step in steps(self._workdir) if resumable(self._folder / str(step))]:
            path = self._folder / str(found[-1])
            try:
                return found[-1], *self.restore(found[-1], like)
            except Unreadable as error:
                why = error
            terminal.warn(str(why), everywhere=True)  # only the process that has found it knows the file
            if jax.process_index() == 0:
                place = leftovers.set_aside(path, leftovers.UNREADABLE)
                then = f"; the run goes on from update {found[-2]}" if found[1:] else ""
                terminal.warn(f"{path} is set aside as {place.name}{then}")
            distributed.largest(0)  # nobody looks before it has its new name
            self._manager.reload()
        raise UserError(
            f"no checkpoint in {self._folder} that training can go on from can be read; nothing was deleted "
            f"({leftovers.UNREADABLE} is behind their names): bring back a copy of one, or choose another --workdir to "
            "begin anew"
        )

    def restore(self, step: int, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Reads a checkpoint into the shapes, dtypes and shardings of ``like`` (``ShapeDtypeStruct`` leaves; None is
        not read), after its checksums have been checked. One without them, of an earlier version or of a run that was
        killed while they were made, is read as it is, which is said.

        Returns:
          The state, and the dictionary that ``save`` was given.

        Raises Unreadable if the checkpoint is damaged, and UserError if it is of another state or the storage does not
        answer.
        """
        path = self._folder / str(step)
        wanted = {name: getattr(like, name) for name in ARRAYS if getattr(like, name) is not None}
        within = () if like.opt_state is not None else (*wanted, "run")  # of weights alone, see FOR_RESUMING
        try:
            if not integrity.sealed(path):
                terminal.warn(f"{path} has no checksums; it is read without being checked")
            words = integrity.damage(path, within)
            if distributed.largest(bool(words)):  # all go on from the same checkpoint
                raise Unreadable(words or f"{path} is damaged, as another process of this job has found")
            stored = self._manager.item_metadata(step)
            for name, tree in wanted.items():
                # Orbax casts to the dtype that is asked for and says nothing.
                _check_same(path / name, stored[name].tree, tree)
            args = {name: ocp.args.StandardRestore(tree) for name, tree in wanted.items()}
            with pulse.bounded(self._deadline + distributed.PATIENCE, f"reading {path}"):
                found = self._manager.restore(step, args=ocp.args.Composite(**args, run=ocp.args.JsonRestore()))
        except Exception as error:  # of several libraries, which take a broken file for many things
            raise misread(path, error) from error
        counter = jax.device_put(np.int32(step), like.step.sharding)
        return TrainState(counter, **{name: found[name] if name in wanted else None for name in ARRAYS}), found["run"]

    def save(self, step: int, state: TrainState, run: dict[str, Any], last: bool = False) -> None:
        """Starts to write the state and a JSON-able dictionary; returns when training may change the state.

        ``run["step"]`` is set to ``step``. A step that is already saved is left as it is. Waits for the save before
        this one. Raises StorageError if one of the two cannot be written; where training is to go on, it is said, and
        raised only of a ``last`` one, which no later one makes up for.
        """
        with self._forgiven():
            self._finish()
        with contextlib.nullcontext() if last else self._forgiven():
            self._write(step, state, run)

    def _write(self, step: int, state: TrainState, run: dict[str, Any]) -> None:
        arrays = {name: getattr(state, name) for name in ARRAYS if getattr(state, name) is not None}
        args = {name: ocp.args.StandardSave(tree) for name, tree in arrays.items()}
        run = ocp.args.JsonSave(run | {"step": step})
        # Orbax copies to the host, and tells the processes apart, in ways that a transfer guard would not let pass on
        # accelerators.
        with jax.transfer_guard("allow"), self._told():
            self._began, self._saving = time.monotonic(), (step, size_of(arrays))
            self._manager = self._manager or self._open()
            if step in self._manager.all_steps():
                return
            self._leave_weights()
            self._check_room(size_of(arrays))
            if not self._manager.save(step, args=ocp.args.Composite(**args, run=run), force=True):
                raise RuntimeError("Orbax has left it out")
        self._sealer = opening.Sealer(self._folder / str(step), arrays, complete)

    def _check_room(self, size: int) -> None:
        """Raises OSError, in all processes of a job, if the disk has no room for so many bytes."""
        if storage.in_bucket(self._folder):
            return
        free = shutil.disk_usage(self._folder).free
        if distributed.largest(free < size):
            raise OSError(
                errno.ENOSPC, f"it takes {terminal.in_bytes(size)}, and {terminal.in_bytes(free)} are free on the disk"
            )

    def close(self) -> None:
        """Waits until everything is written. Raises StorageError."""
        self._finish()
        with self._told():
            if self._manager is not None:
                self._leave_weights()
                self._manager.close()

    def _finish(self) -> None:
        """Waits until the checkpoint that is being written is complete, and its checksums with it.

        Raises StorageError, also if it cannot be opened: then nothing older is deleted, and no hours go on in vain.
        """
        try:
            with self._told():
                if self._manager is not None:
                    self._manager.wait_until_finished()
        finally:
            words = self._end_seal()
        if words:
            raise StorageError(
                f"a checkpoint was written that cannot be opened again ({words}); nothing was deleted: keep it, and "
                "choose another --workdir, or other storage"
            )

    def _end_seal(self) -> str:
        """Returns why what was written cannot be opened, "" if it can, or if nothing was being written."""
        sealer, self._sealer = self._sealer, None
        return sealer.finish() if sealer is not None else ""

    def _tell(self) -> None:
        """Called by Orbax, in a thread of its own, when all is written and gets its name."""
        step, size = self._saving
        self.seconds = time.monotonic() - self._began
        terminal.say(f"saved checkpoint {step}: {terminal.in_bytes(size)} in {self.seconds:.1f} s")

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
    def _forgiven(self) -> Iterator[None]:
        """For a block after whose StorageError training goes on, if it is to."""
        try:
            yield
        except StorageError as error:
            if not self._patient:
                raise
            terminal.warn(f"{error}; training goes on, and tries again when the next checkpoint is due")

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """For a block that writes a checkpoint or waits until it is written. Raises StorageError if it cannot be, or if
        it takes too long.

        A process that is lost is noticed by other means and sooner (``pulse``): whose time runs out has slow storage.
        """
        try:
            with pulse.bounded(self._deadline + distributed.PATIENCE, f"saving into {self._folder}"):
                yield
        except Exception as error:  # of several libraries, which have many names for what a disk says
            late = isinstance(error, TimeoutError) or "DEADLINE_EXCEEDED" in str(error)
            if late:
                words = (
                    f"a checkpoint was not written into {self._folder} within {self._deadline / 60:.0f} minutes, with "
                    "no process of the job lost: the storage is too slow or does not answer; choose a faster one for "
                    "--workdir"
                )
            elif isinstance(error, jax.errors.JaxRuntimeError | MemoryError) or (
                jax.process_count() > 1 and distributed.is_loss(error)
            ):
                raise
            else:
                words = f"checkpoint {self._saving[0]} cannot be written into {self._folder}: {_reason(error)}"
            self._give_up(clean=not late)
            there = max(steps(self._workdir), default=None)
            newest = "none is there" if there is None else f"the newest that is there is of update {there}"
            raise StorageError(f"{words}; {newest}") from error

    def _give_up(self, clean: bool) -> None:
        """Forgets Orbax's idea of what is there, and removes half of a checkpoint, unless it is still being written: it
        may be what keeps a disk full."""
        manager, self._manager = self._manager, None
        self._end_seal()
        if clean and jax.process_count() == 1:
            with contextlib.suppress(Exception):  # one of its threads has failed; others still write into the folder
                if manager is not None:
                    manager.close()
            with contextlib.suppress(Exception):  # the folder may be gone: the next save tries again
                self._manager = self._open()


@dataclasses.dataclass(frozen=True)
class _Kept(preservation.PreservationPolicy):
    """Which checkpoints stay, for Orbax: the newest ``count``, and the best."""

    count: int
    best: Callable[[], int | None]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Of checkpoints in the order of their steps."""
        del context
        newest, best = len(checkpoints) - self.count, self.best()
        return [place >= newest or info.step == best for place, info in enumerate(checkpoints)]


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
