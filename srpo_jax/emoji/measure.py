"""Draws held-out concepts with given weights, and measures what came out."""

import dataclasses
import os
import pathlib
from collections.abc import Sequence

import jax
import numpy as np
from ml_collections import ConfigDict

from srpo_jax import flow, sampling, text
from srpo_jax.emoji import judge, pictures, world
from srpo_jax.models.compute import Params
from srpo_jax.weights import folder
from srpo_jax.weights.files import read_json

WANTED = "3D"  # the style that the demonstration steers to


class Painter:
    """Draws the same prompts from the same noise with different weights, as FLUX's inference pipeline does.

    Args:
      pipeline: a converted pipeline folder.
      prompts: P prompts.
      config: of the run, for size, text length and the settings of samples.
      seeds: pictures of each prompt.
    """

    def __init__(self, pipeline: str | os.PathLike, prompts: Sequence[str], config: ConfigDict, seeds: int):
        pipeline = pathlib.Path(pipeline)
        self._text, self._pooled = text.TextEncoders(pipeline).encode(prompts, config.data.text_length)
        _, graphdef, self.base = folder.load(pipeline / "transformer", "flux")
        _, decoder, self._decoder = folder.load(pipeline / "vae", "autoencoder")
        height, width = config.data.height, config.data.width
        scheduler = read_json(pipeline / "scheduler" / "scheduler_config.json")
        sigmas = flow.pipeline_schedule(config.sample.steps, sampling.tokens(height, width), scheduler)
        sampler = sampling.make_sampler(
            graphdef, decoder, height=height, width=width, sigmas=sigmas, guidance=config.sample.guidance
        )
        self._sample = jax.jit(sampler)
        starts = range(0, seeds * len(prompts), len(prompts))
        self._noise = [sampling.noise(config.sample.seed, start, len(prompts), height, width) for start in starts]

    def __call__(self, params: Params) -> np.ndarray:
        """uint8 pictures ``[P, seeds, H, W, 3]`` by a transformer's parameters (``base`` holds the pipeline's own)."""
        images = [self._sample(params, self._decoder, self._text, self._pooled, noise) for noise in self._noise]
        return np.stack([np.asarray(image) for image in images], axis=1)


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
