"""The disk that a run's checkpoints take, known before its first update."""

import os
import shutil
from collections.abc import Sequence

from ml_collections import ConfigDict

from srpo_jax import checkpoint, storage
from srpo_jax.algorithm.step import TrainState
from srpo_jax.errors import UserError
from srpo_jax.terminal import in_bytes


def sizes(state: TrainState) -> tuple[int, int]:
    """Bytes of a checkpoint of a state (``ShapeDtypeStruct`` leaves will do): the newest, and one of weights alone."""
    parts = {name: checkpoint.size_of(getattr(state, name)) for name in checkpoint.ARRAYS}
    return sum(parts.values()), sum(size for name, size in parts.items() if name not in checkpoint.FOR_RESUMING)


def most(
    there: Sequence[int], whole: int, weights: int, keep: int, resumable: int, saves: int, best: bool = False
) -> int:
    """Bytes of all checkpoints together when they take the most: while one is written, what it replaces is there.

    Args:
      there: of those that are there, the oldest first.
      whole, weights: of one, see ``sizes``.
      keep, resumable: of ``config.checkpoint``.
      saves: how many are still to be written.
      best: whether the best one stays beside the newest.
    """
    kept, highest = list(there), sum(there)
    keep += best  # it has weights alone, unless it is one of the newest itself
    for _ in range(saves):
        kept = [min(size, weights) for size in kept[:-resumable]] + kept[-resumable:]
        highest = max(highest, sum(kept) + whole)
        kept = [*kept, whole][-keep:]
    return highest


def check(workdir: str | os.PathLike, config: ConfigDict, state: TrainState, done: int) -> str:
    """Checks that a run's checkpoints have room in its workdir, and says in a line what they take.

    Args:
      workdir: of the run; it need not exist. What a bucket holds is not known: there only the line is made.
      config: of the run.
      state: of the run, ``ShapeDtypeStruct`` leaves will do.
      done: the update that the run goes on from.

    Raises UserError if they have no room.
    """
    workdir, settings = storage.absolute(storage.path(workdir)), config.checkpoint
    whole, weights = sizes(state)
    # With checkpoint.best, every evaluation may be the best one so far, which is saved; by the clock, any update is.
    periods = [settings.every, *([config.evaluate.every] if settings.best else []), *([1] if settings.minutes else [])]
    updates = range(done + 1, config.steps + 1)
    saves = sum(any(step % period == 0 for period in periods) or step == config.steps for step in updates)
    folders = [workdir / checkpoint.CHECKPOINTS / str(step) for step in checkpoint.steps(workdir)]
    there = [whole if checkpoint.resumable(folder) else weights for folder in folders]
    total = most(there, whole, weights, settings.keep, settings.resumable, saves, bool(settings.best))
    newer = "a newer one is" if settings.resumable == 1 else f"{settings.resumable} newer ones are"
    words = (
        f"checkpoints of {in_bytes(whole)}, {in_bytes(weights)} once {newer} there, at most {in_bytes(total)} in all"
    )
    if storage.in_bucket(workdir):
        return words
    # Where they will lie: their folder may be a link to another disk.
    place = next(folder for folder in (workdir / checkpoint.CHECKPOINTS, workdir, *workdir.parents) if folder.exists())
    free = shutil.disk_usage(place).free
    if total - sum(there) > free:
        raise UserError(
            f"{words}: {place} has {in_bytes(free)} free; make room there, choose another --workdir, or lower "
            f"config.checkpoint.keep={settings.keep}"
        )
    return f"{words}, {in_bytes(free)} free in {place}"
