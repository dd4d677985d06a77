"""An evaluation from its models and prompts to scores: what is there already is neither drawn nor scored again."""

import concurrent.futures
import dataclasses
import pathlib
import sys
from collections import Counter
from collections.abc import Callable, Sequence

import jax
import numpy as np
import tqdm
from jax.sharding import Mesh
from PIL import Image

from srpo_jax import distributed, sampling, sharding
from srpo_jax.data import images
from srpo_jax.errors import UserError
from srpo_jax.evaluation import drawing, signals
from srpo_jax.evaluation.candidates import Candidate, Item
from srpo_jax.evaluation.clock import Clock
from srpo_jax.evaluation.drawing import Drawing
from srpo_jax.evaluation.prompts import Prompt
from srpo_jax.evaluation.records import Records
from srpo_jax.evaluation.scoring import DIVERSITY, Judge, Judges, Score

SAVERS = 4  # threads that write PNG files while the devices draw


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What was asked for and what came of it.

    Attributes:
      out: folder.
      candidates: the first is what the others are compared with.
      prompts, images: what is drawn, and how many pictures of each.
      scores: the names of the scores.
      settings: of drawing, by flag.
      values, signals: scores, and signs of collapse (``signals``), by the folder of a candidate and the item.
      drift: of checkpoints against their pipelines (``signals.drift``), by the folder of the candidate.
      items: by the folder of a candidate, the pictures there are of it, in the order of the prompts.
      seconds: by part of the work.
    """

    out: pathlib.Path
    candidates: tuple[Candidate, ...]
    prompts: tuple[Prompt, ...]
    images: int
    scores: tuple[Score, ...]
    settings: dict
    values: dict[tuple[str, Item], dict[str, float]]
    signals: dict[tuple[str, Item], dict[str, float]]
    drift: dict[str, float]
    items: dict[str, list[Item]]
    seconds: dict[str, float]

    def picture(self, candidate: Candidate, item: Item) -> np.ndarray:
        """uint8 [H, W, 3]."""
        return drawing.read(_stored(self.out, candidate, item))


def evaluate(
    candidates: Sequence[Candidate],
    prompts: Sequence[Prompt],
    scores: Sequence[Score],
    out: pathlib.Path,
    how: Drawing,
    mesh: Mesh,
    count: int = 1,
    at_once: int | None = None,
) -> Evaluation:
    """Draws and scores what is missing in ``out``; process 0 of a job writes.

    Args:
      candidates: at least one.
      prompts: at least one, no two alike.
      scores: names differ.
      out: folder, made if there is none.
      how: pictures are drawn.
      mesh: of the models.
      count: pictures of each prompt.
      at_once: pictures drawn and scored at once; default is one a device.

    Raises UserError for what does not fit, before anything is drawn, and for pictures that cannot be scored.
    """
    parts = sharding.batch_parts(mesh)
    at_once = -(-(at_once or parts) // parts) * parts
    studio = drawing.Studio(mesh, how, at_once)
    for candidate in candidates:
        if candidate.pipeline is not None:
            studio.check(candidate)
    items = {candidate.folder: _items(candidate, prompts, count) for candidate in candidates}
    if any(score.kind == DIVERSITY for score in scores):
        _check_several(candidates, items)
    records = Records(out)
    if jax.process_index() == 0:
        models = {c.folder: {"source": c.source, "content": c.content} for c in candidates}
        records.begin(how.settings(), models, {s.name: _told(s, count) for s in scores})
    clock = Clock()
    traced = [Item(prompt.text, 0) for prompt in prompts[:at_once]]
    worker = _Worker(records, studio, tuple(scores), mesh, at_once, out, clock, candidates, traced)
    for candidate in candidates:
        worker.work(candidate, items[candidate.folder])
    return Evaluation(
        out,
        tuple(candidates),
        tuple(prompts),
        count,
        tuple(scores),
        how.settings(),
        records.scores,
        records.signals,
        worker.drift,
        items,
        clock.seconds,
    )


def _told(score: Score, count: int) -> dict[str, str]:
    """What a score is, for the records. Diversity is among so many pictures of a prompt."""
    among = f" of {count}" if score.kind == DIVERSITY else ""
    return {"source": score.source, "content": f"{score.kind} {score.content}{among}"}


def _check_several(candidates: Sequence[Candidate], items: dict[str, list[Item]]) -> None:
    for candidate in candidates:
        counts = Counter(item.prompt for item in items[candidate.folder])
        if alone := [prompt for prompt, count in counts.items() if count < 2]:
            where = f"{candidate.source} has one of {alone[0]!r}" if candidate.pictures else "give --images=2 or more"
            raise UserError(f"diversity compares the pictures of a prompt: {where}")


def _items(candidate: Candidate, prompts: Sequence[Prompt], count: int) -> list[Item]:
    wanted = [Item(prompt.text, number) for prompt in prompts for number in range(count)]
    if candidate.pictures:
        wanted = [item for item in wanted if item in candidate.there]
    if not wanted:
        raise UserError(f"{candidate.source} holds no picture whose caption is one of the {len(prompts)} prompts")
    return wanted


def _stored(out: pathlib.Path, candidate: Candidate, item: Item) -> images.Picture:
    if candidate.pictures:
        return candidate.there[item]
    file = out / candidate.file(item)
    return images.Picture(str(file), item.prompt, file.read_bytes)


class _Worker:
    """Draws and scores the items of one candidate after the other, in parts that are the same in every run: whatever
    was interrupted, the same pictures pass together."""

    def __init__(
        self,
        records: Records,
        studio: drawing.Studio,
        scores: tuple[Score, ...],
        mesh: Mesh,
        at_once: int,
        out: pathlib.Path,
        clock: Clock,
        candidates: Sequence[Candidate],
        traced: list[Item],
    ):
        self._records, self._studio, self._scores = records, studio, scores
        self._at_once, self._out, self._clock = at_once, out, clock
        self._first = jax.process_index() == 0
        self._judges = Judges(mesh, at_once)
        self._traced, self._traces = traced, {}
        self.drift = records.drift(traced) if self._first else {}
        runs = [candidate for candidate in candidates if candidate.workdir is not None]
        known = distributed.of_first(np.array([run.folder in self.drift for run in runs], np.int32)) if runs else ()
        self._drifting = [run for run, is_known in zip(runs, known, strict=True) if not is_known]
        self._alone = np.array([score.kind != DIVERSITY for score in scores], bool)  # made picture by picture

    def work(self, candidate: Candidate, items: list[Item]) -> None:
        """Fills in what is missing of a candidate's pictures and scores."""
        # Only the first process knows what it has written; the others do as it does.
        done = distributed.of_first(np.array([self._done(candidate, item) for item in items], np.int32)) > 0
        opened, waiting = None, []
        bar = tqdm.tqdm(
            total=len(items), desc=candidate.label, unit="image", disable=not (self._first and sys.stderr.isatty())
        )
        with concurrent.futures.ThreadPoolExecutor(SAVERS) as pool, bar:
            for start in range(0, len(items), self._at_once):
                part, flags = items[start : start + self._at_once], done[start : start + self._at_once]
                bar.update(len(part))
                if flags[:, :3].all() and flags[:, 3:][:, self._alone].all():
                    continue
                saving, seen = [], {}
                if candidate.pictures or flags[:, 0].all():
                    with self._clock.part("read pictures"):
                        pictures = self._read(candidate, part)
                else:
                    if opened is None:
                        with self._clock.part("read weights"):
                            opened = self._studio.open(candidate)
                    with self._clock.part("draw"):
                        pictures = list(opened.draw(part))
                    for item, picture, is_there in zip(part, pictures, flags[:, 0], strict=True):
                        if self._first and not is_there:
                            file = self._out / candidate.file(item)
                            saving.append(pool.submit(sampling.save_image, Image.fromarray(picture), file))
                for row in np.flatnonzero(~flags[:, 2]) if self._first else ():
                    seen[row] = pool.submit(signals.of_picture, pictures[row])
                found = self._score(pictures, part, flags[:, 3:])
                # A line is written when its picture is on the disk, which takes as long as the next ones are drawn.
                self._write(candidate, *waiting)
                waiting = [part, flags, found, saving, seen]
            self._write(candidate, *waiting)
        self._follow(candidate, opened)
        for number, score in enumerate(self._scores):
            if score.kind == DIVERSITY and not done[:, 3 + number].all():
                self._compare(candidate, items, score, done[:, 3 + number])

    def _follow(self, candidate: Candidate, opened: drawing.Opened | None) -> None:
        """Measures a checkpoint's drift, for which its pipeline's trace is taken when that one's turn is."""
        is_base = candidate.workdir is None and any(run.pipeline == candidate.pipeline for run in self._drifting)
        if not is_base and candidate not in self._drifting:
            return
        if opened is None:
            with self._clock.part("read weights"):
                opened = self._studio.open(candidate)
        with self._clock.part("drift"):
            if is_base:
                self._traces[candidate.pipeline] = opened.trace(self._traced)
                return
            value = opened.drift(self._traced, self._traces[candidate.pipeline])
        self.drift[candidate.folder] = float(f"{value:.7g}")
        if self._first:
            self._records.keep_drift(self._traced, self.drift)

    def _done(self, candidate: Candidate, item: Item) -> list[bool]:
        """Whether a picture is there, has a line, has its signals, and has each score."""
        key = candidate.folder, item
        known = self._records.scores.get(key)
        is_there = bool(candidate.pictures) or (self._out / candidate.file(item)).exists()
        signs = bool(self._records.signals.get(key))
        return [is_there, known is not None, signs, *(score.name in (known or {}) for score in self._scores)]

    def _read(self, candidate: Candidate, part: list[Item]) -> list[np.ndarray]:
        if candidate.pictures:
            return [drawing.read(candidate.there[item]) for item in part]
        look = self._studio.drawing.look
        pixels = np.zeros((len(part), look.height, look.width, 3), np.uint8)
        if self._first:
            pixels = np.stack([drawing.read(_stored(self._out, candidate, item)) for item in part])
        return list(distributed.of_first(pixels))

    def _score(self, pictures: list[np.ndarray], part: list[Item], known: np.ndarray) -> dict[str, np.ndarray]:
        """The scores that some of these pictures lack, of all of them."""
        found, made = {}, {}
        for score, has, alone in zip(self._scores, known.T, self._alone, strict=True):
            if has.all() or not alone:
                continue
            if score.source not in made:
                with self._clock.part("read weights"):
                    judge = self._judges.judge(score)
                with self._clock.part("score"):
                    made[score.source] = _by_size(pictures, _under(judge, part))
            found[score.name] = made[score.source][:, score.figure]
        return found

    def _compare(self, candidate: Candidate, items: list[Item], score: Score, has: np.ndarray) -> None:
        """Adds a score of kind ``DIVERSITY``, which is of all pictures of a prompt, to those that lack it."""
        with self._clock.part("read weights"):
            look = self._judges.features(score)
        features = []
        for start in range(0, len(items), self._at_once):
            with self._clock.part("read pictures"):
                pictures = self._read(candidate, items[start : start + self._at_once])
            with self._clock.part("score"):
                features.append(_by_size(pictures, lambda same, _: look(same)))
        values = signals.unlikeness_of_prompts(np.concatenate(features), [item.prompt for item in items])
        for row in np.flatnonzero(~has) if self._first else ():
            self._records.add(candidate, items[row], {score.name: float(f"{values[row]:.7g}")}, {})

    def _write(
        self,
        candidate: Candidate,
        part: Sequence[Item] = (),
        flags: np.ndarray | None = None,
        found: dict[str, np.ndarray] | None = None,
        saving: Sequence[concurrent.futures.Future] = (),
        seen: dict[int, concurrent.futures.Future] | None = None,
    ) -> None:
        with self._clock.part("save pictures"):
            for future in saving:
                future.result()
            signs = {row: future.result() for row, future in (seen or {}).items()}
        for row, item in enumerate(part if self._first else ()):
            lacking = [score.name for score, has in zip(self._scores, flags[row, 3:], strict=True) if not has]
            # Seven digits are what float32 has. What is of all pictures of a prompt comes later.
            scores = {name: float(f"{found[name][row]:.7g}") for name in lacking if name in found}
            if scores or row in signs or not flags[row, 1]:
                self._records.add(candidate, item, scores, signs.get(row, {}))


def _under(judge: Judge, part: Sequence[Item]) -> Callable[[np.ndarray, list[int]], np.ndarray]:
    """All figures [B, F] of pictures [B, H, W, 3] in places of a part."""
    return lambda same, rows: np.stack(judge(same, [part[row].prompt for row in rows]), 1)


def _by_size(pictures: Sequence[np.ndarray], function: Callable[[np.ndarray, list[int]], np.ndarray]) -> np.ndarray:
    """What a function of pictures [B, H, W, 3] and their places makes of pictures of any sizes: those of one size pass
    together, and a folder may have many."""
    found: dict[int, np.ndarray] = {}
    for shape in dict.fromkeys(picture.shape for picture in pictures):
        rows = [row for row, picture in enumerate(pictures) if picture.shape == shape]
        found |= zip(rows, function(np.stack([pictures[row] for row in rows]), rows), strict=True)
    return np.stack([found[row] for row in range(len(pictures))])
