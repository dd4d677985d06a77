"""The evaluations of a run that is being trained, in its workdir.

    WORKDIR/evaluations.jsonl             a line an evaluation, see ``Entry``
           /evaluations/prompts.json      a list of texts, one a picture: number N is what NNNN.png is of
           /evaluations/STEP/NNNN.png     the pictures; STEP has six digits, as in samples/STEP.png
           /evaluations/STEP/scores.json  of every picture: {"scores": {NAME: [..]}, "signals": {NAME: [..]}}

An evaluation of update N is there before the checkpoint of update N is written; 0 is the model before training. What an
interrupted run wrote of later updates than its newest checkpoint is dropped when it goes on.
"""

import dataclasses
import json
import os

from etils import epath

from srpo_jax import checkpoint, schema, storage
from srpo_jax.errors import UserError

JSONL, FOLDER, PROMPTS, SCORES = "evaluations.jsonl", "evaluations", "prompts.json", "scores.json"
BEST = "best"  # in the place of an update's number


@dataclasses.dataclass(frozen=True)
class Figure:
    """The mean of a score over ``n`` pictures, on the scale of its publication, and the ends of its 95 % interval,
    which draws prompts again; None where a single prompt gives none."""

    mean: float
    low: float | None
    high: float | None
    n: int


@dataclasses.dataclass(frozen=True)
class Entry:
    """What an evaluation has found.

    Attributes:
      step: the update that it is of.
      how: tells what figures depend on beside the weights: prompts, noise, sampler, scores. Only those of equal ``how``
        compare.
      scores: by name; the run's own rewards come first.
      signals: means over the pictures by name (``signals.OF_PICTURES``), "drift" against the run's first weights, and
        what all pictures are worth by the features of a score of diversity, "NAME_vendi".
      seconds: by part of the work.
      warnings: sentences, one each.
      best: the update with the best score so far, by ``checkpoint.best``; None if nothing was asked for.
    """

    step: int
    how: str
    scores: dict[str, Figure]
    signals: dict[str, float]
    seconds: dict[str, float]
    warnings: list[str]
    best: int | None


def read(workdir: str | os.PathLike) -> list[Entry]:
    """The evaluations of a workdir in the order of their updates, up to a line that is broken, as a last one that was
    cut off. [] if there are none."""
    file = storage.path(workdir) / JSONL
    found: list[Entry] = []
    for line in file.read_bytes().decode(errors="replace").splitlines() if file.exists() else ():
        try:
            entry = schema.rebuild(Entry, schema.parse(line), JSONL)
        except ValueError:
            break
        if found and entry.step <= found[-1].step:
            break
        found.append(entry)
    return found


def write(workdir: str | os.PathLike, entries: list[Entry]) -> None:
    """Writes all evaluations of a workdir, at once or not at all."""
    lines = [json.dumps(dataclasses.asdict(entry), allow_nan=False) + "\n" for entry in entries]
    storage.write(storage.path(workdir) / JSONL, "".join(lines).encode())


def best(workdir: str | os.PathLike, step: int | str | None) -> int | None:
    """The ``step`` of a flag, with the number of the update in the place of ``BEST``.

    Raises UserError if a run has none, or its checkpoint is not there.
    """
    if step != BEST:
        return step
    there = checkpoint.steps(workdir)
    # The checkpoint of an update comes after its evaluation: of a run that was killed between the two, the one before.
    known = [entry for entry in read(workdir) if not there or entry.step <= there[-1]]
    found = known[-1].best if known else None
    if found is None:
        raise UserError(
            f"{workdir} names no best update; set checkpoint.best and evaluate.every in the config of a run"
        )
    if found == 0:
        raise UserError(f"the best update of {workdir} is 0, the model before training; leave the checkpoint out")
    if found not in there:
        raise UserError(f"the best update of {workdir} is {found}, whose checkpoint is gone; there are "
                        f"{', '.join(map(str, there)) or 'none'}")  # fmt: skip
    return found


def picture(workdir: str | os.PathLike, step: int, number: int) -> epath.Path:
    """The file of a picture of an evaluation."""
    return storage.path(workdir) / FOLDER / f"{step:06d}" / f"{number:04d}.png"


def prompts(workdir: str | os.PathLike) -> list[str]:
    """What the pictures of a workdir's evaluations are of, by number; [] if there are none or they cannot be read."""
    file = storage.path(workdir) / FOLDER / PROMPTS
    try:
        found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    except (ValueError, OSError):
        return []
    return found if isinstance(found, list) and all(isinstance(text, str) for text in found) else []
