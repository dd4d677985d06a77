"""What interrupted runs leave in a workdir: cleaned up at the next start where it is surely ours, kept where it is not.

checkpoints/STEP, not complete     the rest of one that was being deleted as too old: removed
                                   in a bucket, and without checksums: of an interrupted save: removed
                                   damaged, as its checksums tell: renamed to STEP.unreadable
                                   half of a copy, or damaged: renamed to STEP.incomplete
checkpoints/STEP.orbax-checkpoint-tmp*   of an interrupted save: removed
checkpoints/STEP.incomplete[.N]    removed once there is a complete checkpoint of that step or a later one
checkpoints/STEP.unreadable[.N]    never touched
FILE.unreadable[.N]                a file of which some lines could not be read, as it was: never touched
.FILE.partial                      half of a file that we were writing: removed
"""

import itertools
import re
from collections.abc import Callable

from etils import epath

from srpo_jax import integrity, storage, terminal

INCOMPLETE, UNREADABLE = "incomplete", "unreadable"
# Of a workdir, in which files are written by way of a partial one.
PLACES = ("", "samples", "nonfinite", "evaluations", "evaluations/*")
TEMPORARY = re.compile(r"\d+\.orbax-checkpoint-tmp")  # the name of a checkpoint that is being written
PARTIAL = re.compile(
    r"\.((config|recipe|models|wandb|prompts|scores)\.json|(metrics|changes|warnings|evaluations)\.jsonl|report\.html"
    r"|\d+\.png|(base|\d+(\.\d+)?)\.npz)\.partial"
)


def set_aside(path: epath.Path, kind: str) -> epath.Path:
    """Renames a checkpoint's folder to ``STEP.KIND``, or with a number behind it; returns its new place."""
    place = _free(path, kind)
    storage.rename(path, place)
    return place


def keep_copy(file: epath.Path) -> epath.Path:
    """Copies a file to ``FILE.unreadable``, or with a number behind it, before it is written anew; returns the copy."""
    place = _free(file, UNREADABLE)
    storage.write(place, file.read_bytes())
    return place


def _free(path: epath.Path, kind: str) -> epath.Path:
    names = itertools.chain([kind], (f"{kind}.{number}" for number in itertools.count(2)))
    return next(place for name in names if not (place := path.with_name(f"{path.name}.{name}")).exists())


def damaged(folder: epath.Path, complete: Callable[[epath.Path], bool]) -> list[str]:
    """The names in a folder of checkpoints of those that were one once, or half of a copy, and are none now."""
    if not folder.is_dir():
        return []
    names = [path.name for path in folder.iterdir()]
    bare = [name for name in names if name.isdecimal() and not complete(folder / name)]
    if storage.in_bucket(folder):  # what a save leaves there that was interrupted looks the same
        bare = [name for name in bare if integrity.sealed(folder / name)]
    return sorted([*bare, *(name for name in names if re.fullmatch(rf"\d+\.{UNREADABLE}(\.\d+)?", name))])


def sweep(folder: epath.Path, keep: int, complete: Callable[[epath.Path], bool]) -> None:
    """Cleans up a workdir's folder of checkpoints, and the workdir around it; to be called by who holds its lock.

    Args:
      folder: of the checkpoints.
      keep: how many of the newest stay.
      complete: whether a folder is a complete checkpoint.
    """
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    steps = [int(name) for name in names if name.isdecimal() and complete(folder / name)]
    for name in [name for name in names if name.isdecimal() and int(name) not in steps]:
        _sweep_bare(folder / name, sum(step > int(name) for step in steps) >= keep)
    for name in [name for name in names if TEMPORARY.match(name)]:
        (folder / name).rmtree()
        terminal.warn(f"{folder / name}, what an interrupted save has left, is removed")
    for name in names:
        match = re.fullmatch(rf"(\d+)\.{INCOMPLETE}(\.\d+)?", name)
        if match and max(steps, default=-1) >= int(match[1]):
            (folder / name).rmtree()
            terminal.warn(f"{folder / name}, an incomplete checkpoint of an earlier start, is removed")
    for place in [] if storage.in_bucket(folder) else PLACES:  # objects of a bucket appear as wholes
        found = list(folder.parent.glob(f"{place}/.*.partial".lstrip("/")))
        for path in [path for path in found if PARTIAL.fullmatch(path.name)]:
            path.unlink()
            terminal.warn(f"{path}, half of a file, is removed")


def _sweep_bare(path: epath.Path, too_old: bool) -> None:
    """A numbered folder that is no complete checkpoint, which Orbax would take for one."""
    sealed = integrity.sealed(path)
    if storage.in_bucket(path) and not sealed:
        path.rmtree()
        terminal.warn(f"{path}, what an interrupted save has left, is removed")
    elif too_old:
        path.rmtree()
        terminal.warn(f"{path}, a checkpoint whose deletion was interrupted, is removed")
    else:
        place = set_aside(path, UNREADABLE if sealed else INCOMPLETE)
        terminal.warn(f"{path} is not complete; it is set aside as {place.name}")
