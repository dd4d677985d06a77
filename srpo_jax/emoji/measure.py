"""Draws held-out concepts with given weights, and measures what came out."""

import dataclasses
import os
import pathlib
from collections.abc import Sequence

import numpy as np
from ml_collections import ConfigDict

from srpo_jax import architectures, sampling, sharding
from srpo_jax.emoji import judge, pictures, world
from srpo_jax.families.base import TRANSFORMER
from srpo_jax.models.compute import Compute, Params
from srpo_jax.weights import folder

WANTED = "3D"  # the style that the demonstration steers to
BATCH = 32  # pictures drawn at once, at most


class Easel:
    """Draws the same prompts from the same noise with different weights, as the pipeline's own inference does.

    Args:
      pipeline: a converted pipeline folder.
      prompts: P prompts.
      config: of the run, for size, text length and the settings of samples.
      seeds: pictures of each prompt.

    Attributes:
      base: the pipeline's own parameters of its transformer.
    """

    def __init__(self, pipeline: str | os.PathLike, prompts: Sequence[str], config: ConfigDict, seeds: int):
        family, sizes = architectures.read_pipeline(pipeline)
        mesh, path = sharding.make_mesh(config.mesh), pathlib.Path(pipeline) / TRANSFORMER
        _, graphdef, self.base = folder.load(path, family.network, sharding=sharding.of(mesh, family.network))
        given = mesh, family, sizes.transformer, Compute(), config.data.text_length
        self._tools = sampling.read_tools(pipeline, *given)
        self._shape = len(prompts), seeds
        repeated = [prompt for prompt in prompts for _ in range(seeds)]
        look = sampling.Look(config.data.height, config.data.width, config.sample.steps, config.sample.guidance)
        self._painter = sampling.Painter(
            mesh, family, graphdef, self._tools.autoencoder, pipeline, look, at_once=min(BATCH, len(repeated))
        )
        self._chunks = self._painter.prepare(self._tools.encode, repeated, seed=config.sample.seed)

    def __call__(self, params: Params) -> np.ndarray:
        """uint8 pictures ``[P, seeds, H, W, 3]`` by a transformer's parameters."""
        images = np.concatenate(list(self._painter.paint(params, self._tools.params, self._chunks)))
        return images.reshape(*self._shape, *images.shape[1:])


@dataclasses.dataclass(frozen=True)
class Measured:
    """Pictures ``[P, seeds, H, W, 3]`` of P concepts at one moment, the judge's opinion of all of them, and figures:

    the share of each style, "accuracy" (the right concept is found among all of the world), and "distance" (root mean
    squared difference, of 0 .. 1, to the artist's own 3D picture; the mean over pictures).
    """

    images: np.ndarray
    judgement: judge.Judgement
    figures: dict[str, float]

    def __str__(self) -> str:
        shares = ", ".join(f"{self.figures[style]:.0%} {style}" for style in world.STYLES)
        return f"judged {shares}; concept right {self.figures['accuracy']:.1%}; distance {self.figures['distance']:.3f}"


def measure(images: np.ndarray, concepts: Sequence[world.Concept], critic: judge.Judge) -> Measured:
    """Judges pictures ``[P, seeds, H, W, 3]``, uint8, of P concepts."""
    judgement = critic(images.reshape(-1, *images.shape[2:]))
    captions = [concept.caption for concept in concepts for _ in range(images.shape[1])]
    truth = pictures.load(concepts, [WANTED])[0][:, None] / np.float32(255)
    distances = np.sqrt(np.square(images / np.float32(255) - truth).mean((2, 3, 4)))
    return Measured(
        images,
        judgement,
        judgement.style_shares() | {"accuracy": judgement.accuracy(captions), "distance": float(np.mean(distances))},
    )
