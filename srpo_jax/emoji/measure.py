"""Draws held-out concepts by a pipeline or a run's checkpoints, as evaluation does, and measures what came out."""

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from srpo_jax import sampling, sharding
from srpo_jax.emoji import judge, pictures, world
from srpo_jax.evaluation import candidates, drawing, statistics
from srpo_jax.evaluation.candidates import Asked, Candidate
from srpo_jax.evaluation.statistics import Comparison, Estimate

WANTED = "3D"  # the style that the demonstration steers to
ACCURACY, DISTANCE = "accuracy", "distance"
BATCH = 32  # pictures drawn at once, at most


class Place(NamedTuple):
    """A picture in a list of pictures, on whose number its noise depends. (A picture that is evaluated has its noise
    by its prompt; here it was by the place from the beginning, and so figures stay comparable.)"""

    prompt: str
    number: int

    @property
    def name(self) -> np.ndarray:
        """uint32 [1]."""
        return np.array([self.number], np.uint32)


class Easel:
    """Draws the same prompts from the same noise by several models.

    Args:
      prompts: P prompts.
      config: of the run, for size, text length and the settings of samples.
      seeds: pictures of each prompt.
    """

    def __init__(self, prompts: Sequence[str], config: ConfigDict, seeds: int):
        look = sampling.Look(config.data.height, config.data.width, config.sample.steps, config.sample.guidance)
        how = drawing.Drawing(
            look, config.sample.seed, config.model.dtype, config.model.attention, config.data.text_length
        )
        repeated = [prompt for prompt in prompts for _ in range(seeds)]
        self._places = [Place(prompt, number) for number, prompt in enumerate(repeated)]
        self._shape, self._at_once = (len(prompts), seeds), min(BATCH, len(repeated))
        self._studio = drawing.Studio(sharding.make_mesh(config.mesh), how, self._at_once)

    def __call__(self, model: Candidate) -> np.ndarray:
        """uint8 pictures ``[P, seeds, H, W, 3]``."""
        draw = self._studio.open(model).draw
        parts = range(0, len(self._places), self._at_once)
        images = np.concatenate([draw(self._places[start : start + self._at_once]) for start in parts])
        return images.reshape(*self._shape, *images.shape[1:])


def models(pipeline: str, workdir: str = "", which: int | str = candidates.ALL) -> list[Candidate]:
    """A pipeline as it is, and its run's checkpoints, all of them or one by its update, if a workdir is named."""
    asked = [Asked("model", f"before={pipeline}")]
    if workdir:
        asked.append(Asked("checkpoint", f"after={workdir}@{which}"))
    return candidates.read(asked, ema=False, quantize="none")


@dataclasses.dataclass(frozen=True)
class Measured:
    """Pictures ``[P, seeds, H, W, 3]`` of P concepts at one moment, the judge's opinion of all of them, and what was
    measured of each by name, ``[P, seeds]``: whether it is in a style, "accuracy" (whether the right concept is found
    among all of the world), "distance" (root mean squared difference, of 0 .. 1, to the artist's own 3D picture).
    """

    images: np.ndarray
    judgement: judge.Judgement
    values: dict[str, np.ndarray]

    @functools.cached_property
    def figures(self) -> dict[str, float]:
        """The means."""
        return {name: float(np.mean(values)) for name, values in self.values.items()}

    def estimate(self, name: str) -> Estimate:
        """A mean with its 95 % interval over concepts."""
        return statistics.mean(self.values[name].ravel(), self._concepts)

    def against(self, other: "Measured", name: str) -> Comparison:
        """This moment's pictures against another's, pair by pair."""
        differences = self.values[name].astype(np.float64) - other.values[name]
        return statistics.compare(differences.ravel(), self._concepts)

    @property
    def _concepts(self) -> np.ndarray:
        count, seeds = self.images.shape[:2]
        return np.repeat(np.arange(count), seeds)

    def __str__(self) -> str:
        shares = ", ".join(f"{self.figures[style]:.0%} {style}" for style in world.STYLES)
        return f"judged {shares}; concept right {self.figures[ACCURACY]:.1%}; distance {self.figures[DISTANCE]:.3f}"


def measure(images: np.ndarray, concepts: Sequence[world.Concept], critic: judge.Judge) -> Measured:
    """Judges pictures ``[P, seeds, H, W, 3]``, uint8, of P concepts."""
    judgement, shape = critic(images.reshape(-1, *images.shape[2:])), images.shape[:2]
    captions = [concept.caption for concept in concepts for _ in range(images.shape[1])]
    truth = pictures.load(concepts, [WANTED])[0][:, None] / np.float32(255)
    values = judgement.in_style() | {ACCURACY: judgement.right(captions)}
    values = {name: found.reshape(shape) for name, found in values.items()}
    values[DISTANCE] = np.sqrt(np.square(images / np.float32(255) - truth).mean((2, 3, 4)))
    return Measured(images, judgement, values)


def table(moments: dict[str, Measured]) -> Iterator[tuple[str, ...]]:
    """Rows of the figures at some moments, with 95 % intervals over concepts; the first row is the header."""
    yield "", *moments
    for name, title, words in (
        (WANTED, f"judged {WANTED}", "{:.1%}"),
        (ACCURACY, f"concept right, among {len(world.world())}", "{:.1%}"),
        (DISTANCE, f"distance to the artist's {WANTED} picture", "{:.3f}"),
    ):
        yield title, *(_words(moment.estimate(name), words) for moment in moments.values())


def _words(estimate: Estimate, words: str) -> str:
    if not math.isfinite(estimate.low):  # of a single concept
        return words.format(estimate.value)
    return f"{words} ({words} to {words})".format(*estimate)
