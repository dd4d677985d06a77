"""What the evaluations of a run say of going on: which update is the best one, whether a run has gone on long enough
without a better one, and whether it learns its reward at the cost of what it was not trained with.

All of it follows from the history (``history``) alone, so that a run that was interrupted decides as one that was not.
"""

import itertools
import re
from collections.abc import Collection, Sequence
from typing import NamedTuple

from srpo_jax.evaluation.history import Entry

FALLS = 2  # evaluations in a row at which a reward rises and a held-out score falls: a warning


class Aim(NamedTuple):
    """``checkpoint.best``: a score by its name, and whether more of it is better."""

    score: str
    largest: bool

    def better(self, value: float, than: float) -> bool:
        """Whether a mean is better than another."""
        return value > than if self.largest else value < than


def parse(text: str) -> Aim:
    """``NAME:max`` or ``NAME:min``. Raises ValueError, which says what is expected."""
    found = re.fullmatch(r"(.+):(max|min)", text)
    if not found:
        raise ValueError("write NAME:max or NAME:min, as hps:max")
    return Aim(found[1], found[2] == "max")


def best(entries: Sequence[Entry], aim: Aim) -> int | None:
    """The update with the best mean, the first of equals, among the evaluations that compare with the last one."""
    found: Entry | None = None
    for entry in comparable(entries):
        if aim.score in entry.scores and (
            found is None or aim.better(entry.scores[aim.score].mean, found.scores[aim.score].mean)
        ):
            found = entry
    return None if found is None else found.step


def is_over(entries: Sequence[Entry], aim: Aim, patience: int) -> bool:
    """Whether the last ``patience`` evaluations are no better than one before them; 0 is endless patience."""
    since = [entry.step for entry in comparable(entries)]
    step = best(entries, aim)
    return bool(patience) and step in since and len(since) - 1 - since.index(step) >= patience


def over_optimised(entries: Sequence[Entry], own: Collection[str], held_out: Collection[str]) -> list[str]:
    """Warnings of the last evaluation: a reward of the run's ``own`` rose and a ``held_out`` score fell at the last
    ``FALLS`` evaluations in a row."""
    last = comparable(entries)[-FALLS - 1 :]
    if len(last) <= FALLS:
        return []
    means = {
        name: [entry.scores[name].mean for entry in last]
        for name in (*own, *held_out)
        if all(name in entry.scores for entry in last)
    }
    steps = {name: [after - before for before, after in itertools.pairwise(found)] for name, found in means.items()}
    rose = [name for name in own if name in steps and min(steps[name]) > 0]
    fell = [name for name in held_out if name in steps and max(steps[name]) < 0]
    if not rose or not fell:
        return []
    updates = " and ".join(str(entry.step) for entry in last[1:])
    return [
        f"over-optimisation: {', '.join(rose)}, which the run is trained with, rose and {', '.join(fell)}, which it is "
        f"not, fell at updates {updates}; an earlier checkpoint may be the better one"
    ]


def comparable(entries: Sequence[Entry]) -> list[Entry]:
    """Those that compare with the last one, see ``Entry.how``."""
    return [entry for entry in entries if entry.how == entries[-1].how]
