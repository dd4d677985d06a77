"""An evaluation from its models and prompts to scores: what is there already is neither drawn nor scored again."""

import concurrent.futures
import dataclasses
import pathlib
import sys
from collections.abc import Sequence

import jax
import numpy as np
import tqdm
from jax.sharding import Mesh
from PIL import Image

from srpo_jax import distributed, sampling, sharding
from srpo_jax.data import images
from srpo_jax.errors import UserError
from srpo_jax.evaluation import drawing
from srpo_jax.evaluation.candidates import Candidate, Item
from srpo_jax.evaluation.clock import Clock
from srpo_jax.evaluation.drawing import Drawing
from srpo_jax.evaluation.prompts import Prompt
from srpo_jax.evaluation.records import Records
from srpo_jax.evaluation.scoring import Score, Scorer

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
      values: scores by the folder of a candidate and the item.
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
    records = Records(out)
    if jax.process_index() == 0:
        models = {c.folder: {"source": c.source, "content": c.content} for c in candidates}
        records.begin(
            how.settings(), models, {s.name: {"source": s.source, "content": f"{s.kind} {s.content}"} for s in scores}
        )
    clock = Clock()
    worker = _Worker(records, studio, tuple(scores), mesh, at_once, out, clock)
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
        items,
        clock.seconds,
    )


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
    ):
        self._records, self._studio, self._scores, self._mesh = records, studio, scores, mesh
        self._at_once, self._out, self._clock = at_once, out, clock
        self._first = jax.process_index() == 0
        self._scorers: dict[str, Scorer] = {}

    def work(self, candidate: Candidate, items: list[Item]) -> None:
        """Fills in what is missing of a candidate's pictures and scores."""
        # Only the first process knows what it has written; the others do as it does.
        done = distributed.of_first(np.array([self._done(candidate, item) for item in items], np.int32)) > 0
        draw, waiting = None, []
        bar = tqdm.tqdm(
            total=len(items), desc=candidate.label, unit="image", disable=not (self._first and sys.stderr.isatty())
        )
        with concurrent.futures.ThreadPoolExecutor(SAVERS) as pool, bar:
            for start in range(0, len(items), self._at_once):
                part, flags = items[start : start + self._at_once], done[start : start + self._at_once]
                bar.update(len(part))
                if flags.all():
                    continue
                saving = []
                if candidate.pictures:
                    with self._clock.part("read pictures"):
                        pictures = [drawing.read(candidate.there[item]) for item in part]
                elif flags[:, 0].all():
                    with self._clock.part("read pictures"):
                        pictures = self._read(candidate, part)
                else:
                    if draw is None:
                        with self._clock.part("read weights"):
                            draw = self._studio.open(candidate)
                    with self._clock.part("draw"):
                        pictures = list(draw(part))
                    for item, picture, is_there in zip(part, pictures, flags[:, 0], strict=True):
                        if self._first and not is_there:
                            file = self._out / candidate.file(item)
                            saving.append(pool.submit(sampling.save_image, Image.fromarray(picture), file))
                found = self._score(pictures, part, flags[:, 2:])
                # A line is written when its picture is on the disk, which takes as long as the next ones are drawn.
                self._write(candidate, *waiting)
                waiting = [part, flags, found, saving]
            self._write(candidate, *waiting)

    def _done(self, candidate: Candidate, item: Item) -> list[bool]:
        """Whether a picture is there, has a line, and has each score."""
        known = self._records.scores.get((candidate.folder, item))
        is_there = bool(candidate.pictures) or (self._out / candidate.file(item)).exists()
        return [is_there, known is not None, *(score.name in (known or {}) for score in self._scores)]

    def _read(self, candidate: Candidate, part: list[Item]) -> list[np.ndarray]:
        look = self._studio.drawing.look
        pixels = np.zeros((len(part), look.height, look.width, 3), np.uint8)
        if self._first:
            pixels = np.stack([drawing.read(_stored(self._out, candidate, item)) for item in part])
        return list(distributed.of_first(pixels))

    def _score(self, pictures: list[np.ndarray], part: list[Item], known: np.ndarray) -> dict[str, np.ndarray]:
        """The scores that some of these pictures lack, of all of them."""
        found = {}
        for score, has in zip(self._scores, known.T, strict=True):
            if has.all():
                continue
            if score.name not in self._scorers:
                with self._clock.part("read weights"):
                    self._scorers[score.name] = Scorer(score, self._mesh, self._at_once)
            values = np.zeros(len(part), np.float32)
            with self._clock.part("score"):
                # Pictures of one size pass together: those of a folder may have many.
                for shape in dict.fromkeys(picture.shape for picture in pictures):
                    rows = [row for row, picture in enumerate(pictures) if picture.shape == shape]
                    same = np.stack([pictures[row] for row in rows])
                    values[rows] = self._scorers[score.name](same, [part[row].prompt for row in rows])
            found[score.name] = values
        return found

    def _write(
        self,
        candidate: Candidate,
        part: Sequence[Item] = (),
        flags: np.ndarray | None = None,
        found: dict[str, np.ndarray] | None = None,
        saving: Sequence[concurrent.futures.Future] = (),
    ) -> None:
        with self._clock.part("save pictures"):
            for future in saving:
                future.result()
        for row, item in enumerate(part):
            lacking = [s.name for s, has in zip(self._scores, flags[row, 2:], strict=True) if not has]
            # Seven digits are what float32 has.
            scores = {name: float(f"{found[name][row]:.7g}") for name in lacking}
            if self._first and (scores or not flags[row, 1]):
                self._records.add(candidate, item, scores)
