"""The pictures of fixed prompts along a run, small: those of its evaluations or, without any, its sample grids."""

import dataclasses
import io
import json
import os
import re
from collections.abc import Sequence

import numpy as np
from etils import epath
from PIL import Image

from srpo_jax import report, sampling
from srpo_jax.evaluation import history

SAMPLES, PROMPTS_FILE = "samples", "prompts.json"  # of a workdir: sample grids, and what they are of
MOMENTS, PROMPTS = 10, 24  # that are shown, at most: 240 small pictures, 5 to 8 MB


@dataclasses.dataclass(frozen=True)
class Pictures:
    """Small pictures of some prompts at some moments.

    Attributes:
      steps: updates of the moments.
      entries: a prompt each.
      text: where they come from.
    """

    steps: tuple[int, ...]
    entries: tuple[report.Browsed, ...]
    text: str

    def part(self) -> report.Browser:
        """The part of the page."""
        orders = dict.fromkeys(name for entry in self.entries for name in entry.numbers)
        return report.Browser(
            "Pictures from before to now",
            self.text,
            tuple(f"update {step}" if step else "before" for step in self.steps),
            self.entries,
            tuple(orders),
            along=True,
        )


class Album:
    """Reads the pictures of a workdir, and remembers small ones: files do not change, and large ones take long.

    Args:
      workdir: of the run.
    """

    def __init__(self, workdir: epath.Path):
        self._workdir = workdir
        self._small: dict[epath.Path, list[report.Inline]] = {}
        self._used: set[epath.Path] = set()

    def open(self, evaluated: Sequence[int], best: int | None = None) -> Pictures | None:
        """The pictures of the evaluations of these updates, the ``best`` one's among them, or else of the sample grids;
        None if there are none."""
        self._used = set()
        found = self._evaluated(evaluated, best) or self._sampled()
        self._small = {file: cells for file, cells in self._small.items() if file in self._used}
        return found

    def _evaluated(self, evaluated: Sequence[int], best: int | None) -> Pictures | None:
        prompts = history.prompts(self._workdir)
        numbers = {text: prompts.index(text) for text in dict.fromkeys(prompts)}  # of each prompt's first picture
        chosen = dict(list(numbers.items())[:PROMPTS])
        steps = [step for step in evaluated if history.picture(self._workdir, step, 0).parent.is_dir()]
        if not steps or not chosen:
            return None
        steps = spread(steps, [] if best is None else [best])
        scores = {step: self._scores(step) for step in steps}
        entries = []
        for text, number in chosen.items():
            values = {
                step: {name: of[number] for name, of in scores[step].items() if number < len(of)} for step in steps
            }
            columns = []
            for step in steps:
                file = history.picture(self._workdir, step, number)
                told = "\n".join(f"{name} {value:.4g}" for name, value in values[step].items())
                columns.append((self._shown(file, 1, 0, told),))
            first, last = values[steps[0]], values[steps[-1]]
            gains = {f"gain of {name}": last[name] - first[name] for name in last if name in first and len(steps) > 1}
            entries.append(report.Browsed(report.Comparison(text, tuple(columns)), "", gains))
        words = f"The first picture of {len(chosen)} of {len(numbers)} held-out prompts, from the same noise at every"
        return Pictures(tuple(steps), tuple(entries), f"{words} evaluation. A click opens the whole picture.")

    def _sampled(self) -> Pictures | None:
        folder = self._workdir / SAMPLES
        names = [file.name for file in folder.iterdir()] if folder.is_dir() else []
        steps = spread(sorted(int(name[:-4]) for name in names if re.fullmatch(r"\d+\.png", name)))
        file = folder / PROMPTS_FILE
        prompts = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
        if not steps or not prompts:
            return None
        entries = []
        for number, text in enumerate(prompts[:PROMPTS]):
            sheets = [folder / f"{step:06d}.png" for step in steps]
            columns = tuple((self._shown(sheet, len(prompts), number, ""),) for sheet in sheets)
            entries.append(report.Browsed(report.Comparison(text, columns)))
        words = (
            f"{len(entries)} of {len(prompts)} held-out prompts of the sample grids, from the same noise every time."
        )
        return Pictures(tuple(steps), tuple(entries), f"{words} A click opens the whole grid.")

    def _shown(self, file: epath.Path, count: int, number: int, text: str) -> report.Shown:
        """The picture with a number of a file that is a grid of so many."""
        self._used.add(file)
        if file not in self._small:
            with Image.open(io.BytesIO(file.read_bytes())) as sheet:
                cells = sampling.cut(np.asarray(sheet.convert("RGB")), count)
            self._small[file] = [report.inline(report.small(cell)) for cell in cells[:PROMPTS]]
        link = os.path.relpath(os.fspath(file), os.fspath(self._workdir))
        return report.Shown(self._small[file][number], text=text, link=link)

    def _scores(self, step: int) -> dict[str, list[float]]:
        file = history.picture(self._workdir, step, 0).parent / history.SCORES
        return json.loads(file.read_text(encoding="utf-8"))["scores"] if file.exists() else {}


def spread(steps: Sequence[int], wanted: Sequence[int] = ()) -> list[int]:
    """At most ``MOMENTS`` of these, evenly; the first, the last and one that is ``wanted`` among them.

    Every second one is left out as a run grows, so that most of what was chosen once stays chosen.
    """
    stride = 1
    while len(steps[::stride]) > MOMENTS - 2:
        stride *= 2
    return sorted({*steps[::stride], *steps[-1:], *(step for step in wanted if step in steps)})
