"""One cell of the study: a run with one seed, trained, drawn and judged; its figures stay, its checkpoints do not."""

import dataclasses
import json
import pathlib
import shutil
import time
from collections.abc import Sequence

import numpy as np
from ml_collections import ConfigDict

from srpo_jax import convert, metrics, ranges, sampling, schema, storage
from srpo_jax.emoji import demo, judge, measure, rollouts, study_plan, world
from srpo_jax.emoji.colour import chroma
from srpo_jax.emoji.study_plan import BIASED, Case, Preset
from srpo_jax.errors import UserError
from srpo_jax.evaluation import candidates, signals

SHOWN = 12  # concepts of which a cell of the first seed keeps a picture


@dataclasses.dataclass(frozen=True)
class Moment:
    """Figures of the pictures of one moment, each a list with a number a picture, concept by concept.

    Attributes:
      update: after how many.
      styles: what the judge takes them for, numbers of ``world.STYLES``.
      right: 1 where the judge finds the right concept among all of the world, else 0.
      chroma: see ``colour.chroma``.
      saturation: HSV's, see ``evaluation.signals``.
      diversity: the mean distance to the other pictures of the concept (root mean square of pixels); 0 of a single one.
    """

    update: int
    styles: list[int]
    right: list[int]
    chroma: list[float]
    saturation: list[float]
    diversity: list[float]


@dataclasses.dataclass(frozen=True)
class Cell:
    """What is known of a case and a seed.

    Attributes:
      seed: of the run.
      rate: its learning rate.
      update_seconds: of an update, on average.
      seconds: that the cell took in all, breaks left out.
      skipped: updates that changed nothing, since their numbers were not finite.
      moments: in their order.
    """

    seed: int
    rate: float
    update_seconds: float
    seconds: float
    skipped: int
    moments: list[Moment]


def judged(update: int, images: np.ndarray, concepts: Sequence[world.Concept], critic: judge.Judge) -> Moment:
    """The figures of uint8 pictures ``[P, seeds, H, W, 3]`` of P concepts."""
    count = images.shape[1]
    flat = images.reshape(-1, *images.shape[2:])
    opinion = critic(flat)
    captions = [concept.caption for concept in concepts for _ in range(count)]
    unit = images / np.float32(255)
    apart = np.sqrt(np.square(unit[:, :, None] - unit[:, None]).mean((3, 4, 5)))  # [P, seeds, seeds]
    return Moment(
        update,
        opinion.styles.argmax(-1).tolist(),
        opinion.right(captions).astype(int).tolist(),
        chroma(unit).reshape(-1).tolist(),
        signals.saturation(flat).tolist(),
        (apart.sum(-1) / max(1, count - 1)).reshape(-1).tolist(),
    )


class Workshop:
    """Where cells are made: ``out`` gets ``cells/``, a file each, and ``runs/`` while they train.

    Args:
      out: folder of the study.
      preset: its size.
    """

    def __init__(self, out: pathlib.Path, preset: Preset):
        self.out, self.preset = out, preset
        self.config = study_plan.changed(demo.load_recipe(), preset.changes)
        demo.prepare(out, self.config)
        if not (out / "models" / BIASED).exists():
            convert.import_folder(demo.SHIPPED / BIASED, out / "models" / BIASED)
        self.config.steps = self.config.checkpoint.every = preset.updates
        self.config.sample.every = 0
        self.config.optim.patience = int(ranges.RANGES["optim.patience"].most)  # a run that breaks is a finding, no end
        self.config.compilation_cache = str(out.absolute() / "xla")  # cases with several seeds compile once
        self.concepts = world.split("holdout")[: preset.concepts]
        train_split = world.split("train")
        chosen = np.linspace(0, len(train_split) - 1, preset.tuning).round().astype(int)
        self.tuning = [train_split[index] for index in chosen]
        self.critic = judge.Judge(out / "models" / "judge")
        self._easels = {}

    def before(self) -> Moment:
        """The held-out concepts by the shipped model."""
        file = self.out / "cells" / "before.json"
        if file.exists():
            return _read(file).moments[0]
        started = time.monotonic()
        images = self._draw(self.concepts, self.preset.pictures, None)
        moment = judged(0, images, self.concepts, self.critic)
        self._write(file, Cell(0, 0.0, 0.0, time.monotonic() - started, 0, [moment]), images[None])
        return moment

    def file(self, case: Case, seed: int) -> pathlib.Path:
        """Of a cell's figures; the pictures are beside it."""
        return self.out / "cells" / case.folder / f"{seed}.json"

    def read(self, case: Case, seed: int) -> Cell | None:
        """A cell's figures, None if it is still to be made. Raises UserError for a file that is damaged."""
        file = self.file(case, seed)
        return _read(file) if file.exists() else None

    def make(self, case: Case, seed: int) -> Cell:
        """Trains, draws and judges a cell, or what is left of it."""
        started = time.monotonic()
        rate = self._rate(case)
        own, workdir = self._train(case, case.folder, seed, rate, case.moments)
        moments, images = [], []
        for update in case.moments:
            images.append(self._draw(self.concepts, self.preset.pictures, (workdir, update)))
            moments.append(judged(update, images[-1], self.concepts, self.critic))
        records = metrics.read(workdir)
        # The mean, since of reused rollouts only some updates make one; the first one waits for other things too.
        seconds = float(np.mean([record["step_seconds"] for record in records[1:] or records]))
        took = time.monotonic() - started
        cell = Cell(seed, own.optim.learning_rate, seconds, took, _skipped(records), moments)
        self._write(self.file(case, seed), cell, np.stack(images) if seed == 0 else None)
        shutil.rmtree(workdir)
        return cell

    def _rate(self, case: Case) -> float:
        """The learning rate of a case: the one that served best on the train split, found with the first seed."""
        if not case.rates:
            return self.config.optim.learning_rate
        served = {}
        for rate in case.rates:
            folder = f"{case.folder}/rate_{rate:g}"
            file = self.out / "cells" / f"{folder}.json"
            if not file.exists():
                started = time.monotonic()
                _, workdir = self._train(case, folder, 0, rate, case.moments[:1])
                images = self._draw(self.tuning, 1, (workdir, case.moments[0]))
                moment = judged(case.moments[0], images, self.tuning, self.critic)
                skipped = _skipped(metrics.read(workdir))
                self._write(file, Cell(0, rate, 0.0, time.monotonic() - started, skipped, [moment]))
                shutil.rmtree(workdir)
            served[rate] = share(_read(file).moments[0], case.wanted, right=True)
        return max(served, key=served.get)

    def _train(
        self, case: Case, folder: str, seed: int, rate: float, moments: Sequence[int]
    ) -> tuple[ConfigDict, pathlib.Path]:
        own = study_plan.changed(self.config, case.changes)
        own.seed, own.optim.learning_rate = seed, rate
        own.steps, own.checkpoint.every = moments[-1], moments[0]
        own.reward.models.clip.path = str(self.out / "models" / case.reward)
        if case.styles:
            rollouts.replace_rollout(self.out / "pictures", case.folder.replace("/", "_"), case.styles, own)
        workdir = self.out / "runs" / folder / str(seed)
        demo.train_to_end(own, workdir)
        return own, workdir

    def _draw(
        self, concepts: Sequence[world.Concept], pictures: int, trained: tuple[pathlib.Path, int] | None
    ) -> np.ndarray:
        names = tuple(world.prompt(concept) for concept in concepts)
        if names not in self._easels:
            self._easels[names] = measure.Easel(names, self.config, pictures)
        workdir, update = trained or ("", candidates.ALL)
        try:
            return self._easels[names](measure.models(self.config.model.path, str(workdir), update)[-1])
        except sampling.NotFinite as error:
            print(f"{workdir}, update {update}: {error}; all of this moment count as black", flush=True)
            shape = len(names), pictures, self.config.data.height, self.config.data.width, 3
            return np.zeros(shape, np.uint8)

    def _write(self, file: pathlib.Path, cell: Cell, images: np.ndarray | None = None) -> None:
        """The pictures first: where a cell's file is, the cell is whole."""
        file.parent.mkdir(parents=True, exist_ok=True)
        if images is not None:
            np.save(file.with_suffix(".npy"), images[:, shown(images.shape[1]), 0])
        content = json.dumps(dataclasses.asdict(cell)) + "\n"
        storage.write(storage.path(file), content.encode())


def shown(concepts: int) -> np.ndarray:
    """Places of the concepts whose pictures are kept: even steps through the table of concepts."""
    return np.linspace(0, concepts - 1, min(SHOWN, concepts)).round().astype(int)


def share(moment: Moment, wanted: Sequence[str], right: bool = False) -> float:
    """Of the pictures that are in a wanted style (and, if asked, show the right concept)."""
    return float(np.mean(in_style(moment, wanted) * (np.array(moment.right) if right else 1)))


def in_style(moment: Moment, wanted: Sequence[str]) -> np.ndarray:
    """1 of a picture that is in one of the wanted styles, else 0."""
    return np.isin(moment.styles, [world.STYLES.index(style) for style in wanted]).astype(int)


def _skipped(records: list[dict[str, float]]) -> int:
    """Updates of a run that were skipped; its records count them from the first one on."""
    return int(records[-1]["skipped"])


def _read(file: pathlib.Path) -> Cell:
    remedy = f"{file} is no cell of a study; delete it, and the same command makes it again"
    try:
        return schema.rebuild(Cell, schema.parse(file.read_text(encoding="utf-8")), "it")
    except ValueError as error:
        raise UserError(f"{remedy} ({error})") from error
