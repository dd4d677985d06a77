"""Draws a candidate's pictures, or reads those that are there, a fixed part of the list at a time.

A picture's noise depends on its prompt, its number and the seed (``Item.name``): neither on what else is drawn nor on
batches, processes or the update of a checkpoint.
"""

import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from jax.sharding import Mesh

from srpo_jax import architectures, generate, sampling, stored_weights
from srpo_jax.data import images
from srpo_jax.errors import UserError
from srpo_jax.evaluation.candidates import Candidate
from srpo_jax.evaluation.drift import Drift, Trace
from srpo_jax.families.base import TRANSFORMER
from srpo_jax.models.lora import Lora


class Drawn(Protocol):
    """What is drawn: ``Item``, or whatever else has a prompt, and a name that its noise depends on, uint32 [K]."""

    @property
    def prompt(self) -> str: ...

    @property
    def name(self) -> np.ndarray: ...


class Opened(NamedTuple):
    """A candidate whose weights are read.

    Attributes:
      draw: items, at most as many as are drawn at once, to pictures uint8 [B, height, width, 3].
      trace: of so many items, where the model passes and how fast (``drift``).
      drift: how far its velocities on the items are from those that a trace of its base has.
    """

    draw: Callable[[Sequence[Drawn]], np.ndarray]
    trace: Callable[[Sequence[Drawn]], Trace]
    drift: Callable[[Sequence[Drawn], Trace], float]


class Drawing(NamedTuple):
    """How pictures are drawn.

    Attributes:
      look: sides in pixels, steps, guidance.
      seed: of all noise.
      dtype: of weights and matrix products.
      attention: backend of the transformer, see ``models.attention.choose``.
      text_length: tokens of a prompt; None is the tokenizer's.
    """

    look: sampling.Look
    seed: int = 0
    dtype: str = "float32"
    attention: str = "auto"
    text_length: int | None = None

    def settings(self) -> dict[str, Any]:
        """What pictures depend on, by the names of the command's flags."""
        values = self._asdict()
        del values["attention"]
        return values.pop("look")._asdict() | values


class Studio:
    """What draws pictures on a mesh, ``at_once`` at a time; the parts of a pipeline are read once for all its
    checkpoints, and only one transformer is held."""

    def __init__(self, mesh: Mesh, drawing: Drawing, at_once: int):
        self._mesh, self.drawing, self._at_once = mesh, drawing, at_once
        self._compute, self._frozen = sampling.computes(mesh, drawing.dtype, drawing.attention)
        self._pipeline = functools.lru_cache(1)(self._read_pipeline)
        self._painters: dict[tuple[str, Lora | None], sampling.Painter] = {}
        self._drifts: dict[tuple, Drift] = {}

    def check(self, candidate: Candidate) -> None:
        """Raises UserError for sizes that its family has not."""
        family, _ = architectures.read_pipeline(candidate.pipeline)
        look = self.drawing.look
        family.check_size(look.height, look.width, ("--height", "--width"))
        family.check_text_length("--text-length", self.drawing.text_length or 0)
        family.schedule(candidate.pipeline, look.steps, look.height, look.width)

    def open(self, candidate: Candidate) -> Opened:
        """Reads a candidate's weights."""
        family, tools = self._pipeline(candidate.pipeline)
        trained = None
        if candidate.workdir is not None:
            trained = stored_weights.load_params(candidate.workdir, candidate.step, candidate.ema)
        graphdef, params = generate.read_transformer(
            pathlib.Path(candidate.pipeline) / TRANSFORMER,
            family.network,
            self._compute,
            self._mesh,
            trained,
            candidate.lora,
        )
        # Checkpoints of a run share a graph definition, and so what is compiled for it.
        key = candidate.pipeline, candidate.lora
        if key not in self._painters:
            look, pipeline = self.drawing.look, candidate.pipeline
            self._painters = {key: sampling.Painter(
                self._mesh, family, graphdef, tools.autoencoder, pipeline, look, at_once=self._at_once
            )}  # fmt: skip
        painter = self._painters[key]

        def prepare(items: Sequence[Drawn]) -> list[sampling.Chunk]:
            names = np.stack([item.name for item in items])
            return painter.prepare(tools.encode, [i.prompt for i in items], seed=self.drawing.seed, names=names)

        def draw(items: Sequence[Drawn]) -> np.ndarray:
            return np.concatenate(list(painter.paint(params, tools.params, prepare(items))))

        def drifting(items: Sequence[Drawn]) -> Drift:
            if (*key, *items) not in self._drifts:
                chunk, look = prepare(items)[0], self.drawing.look
                drift = Drift(self._mesh, family, graphdef, candidate.pipeline, look, chunk)
                self._drifts = {(*key, *items): drift}
            return self._drifts[*key, *items]

        return Opened(
            draw,
            lambda items: drifting(items).trace(params),
            lambda items, base: drifting(items)(params, base),
        )

    def _read_pipeline(self, path: str) -> tuple:
        family, sizes = architectures.read_pipeline(path)
        length = self.drawing.text_length or generate.prompt_length(family, path)
        return family, sampling.read_tools(path, self._mesh, family, sizes.transformer, self._frozen, length)


def read(picture: images.Picture) -> np.ndarray:
    """A picture as uint8 [H, W, 3], at its own size. Raises UserError for one that cannot be read."""
    try:
        return np.asarray(images.upright(picture.content()))
    except (ValueError, OSError) as error:
        raise UserError(f"{picture.name}: {error}") from error
