"""Pictures from prompts: a pipeline's own inference (Euler sampling, its guidance), compiled once per batch size."""

import dataclasses
import io
import math
import os
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from PIL import Image

from srpo_jax import distributed, seeds, sharding, storage
from srpo_jax.algorithm import flow
from srpo_jax.algorithm.networks import to_unit_range
from srpo_jax.algorithm.rollout import of_step
from srpo_jax.conditions import PromptEncoder
from srpo_jax.errors import UserError
from srpo_jax.families.base import AUTOENCODER, Condition, Family
from srpo_jax.models import rotary
from srpo_jax.models.attention import choose
from srpo_jax.models.compute import Compute, Params, bind
from srpo_jax.weights import folder


class Look(NamedTuple):
    """How pictures are drawn: sides in pixels, steps of the sampler, guidance scale."""

    height: int
    width: int
    steps: int
    guidance: float


def default_dtype() -> str:
    """Of weights and matrix products where nobody says: float32 on CPUs, bfloat16 on accelerators."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def computes(mesh: Mesh, dtype: str, attention: str) -> tuple[Compute, Compute]:
    """Execution options of the transformer, and of the networks beside it, whose attention is XLA's.

    ``attention`` is the transformer's backend, as ``models.attention.choose`` takes it.
    """
    kind = jnp.dtype(dtype)
    frozen = Compute(dtype=kind, param_dtype=kind, mesh=mesh, constrain=sharding.constraint(mesh))
    device = mesh.devices.flat[0]
    return dataclasses.replace(frozen, attention=choose(attention, device, kind), rotary=rotary.choose(device)), frozen


class Chunk(NamedTuple):
    """Inputs of pictures that are made at once; the last of them may be there to fill the batch: ``count`` are
    wanted."""

    condition: Condition
    noise: jax.Array
    count: int


class NotFinite(UserError):
    """What was drawn is no picture: its pixels are nan or infinite."""


class Painter:
    """Draws prompts on a mesh, with whatever weights of a transformer it is given.

    Args:
      mesh: where the parameters live.
      family: of the pipeline.
      transformer, autoencoder: graph definitions.
      pipeline: folder, whose scheduler file gives the noise levels.
      look: how pictures are drawn.
      at_once: pictures made at once, rounded up to what the mesh divides.
    """

    def __init__(
        self,
        mesh: Mesh,
        family: Family,
        transformer: nnx.GraphDef,
        autoencoder: nnx.GraphDef,
        pipeline: str | os.PathLike,
        look: Look,
        at_once: int,
    ):
        self._mesh, self._shape = mesh, family.token_shape(look.height, look.width)
        parts = sharding.batch_parts(mesh)
        self._batch_size = -(-at_once // parts) * parts
        sigmas = family.schedule(pipeline, look.steps, look.height, look.width)
        function = make_sampler(family, transformer, autoencoder, sigmas, look)
        # Pictures come back to every process, however the batch was split.
        self._sample = jax.jit(function, out_shardings=sharding.replicated(mesh))
        self._draw = jax.jit(draw_noise, static_argnums=(1, 2), out_shardings=sharding.of_batch(mesh))

    def prepare(
        self,
        encode: PromptEncoder,
        prompts: Sequence[str],
        *,
        seed: int = 0,
        names: np.ndarray | None = None,
        noise: np.ndarray | None = None,
    ) -> list[Chunk]:
        """Encodes prompts and draws noise for them, on the devices.

        The noise depends on ``seed`` and a picture's row of ``names`` [len(prompts), K], uint32, alone (see
        ``draw_noise``); without names it is the picture's number. ``noise`` [len(prompts), N, C] is taken instead.
        """
        size = self._batch_size
        if names is None:
            names = np.arange(len(prompts), dtype=np.uint32)[:, None]
        rows = sharding.local_rows(self._mesh, size)
        chunks = []
        for first in range(0, len(prompts), size):
            # The last batch is filled up with its last prompt: one compiled program for all.
            wanted = np.minimum(np.arange(first, first + size), len(prompts) - 1)
            condition = encode([prompts[wanted[row]] for row in rows], size)
            if noise is None:
                start = self._draw(sharding.place(self._mesh, size, names[wanted[rows]]), seed, self._shape)
            else:
                start = sharding.place(self._mesh, size, np.asarray(noise, np.float32)[wanted[rows]])
            chunks.append(Chunk(condition, start, min(size, len(prompts) - first)))
        return chunks

    def paint(self, transformer: Params, autoencoder: Params, chunks: Iterable[Chunk]) -> Iterable[np.ndarray]:
        """Yields the pictures of each chunk, uint8 [count, height, width, 3].

        Raises NotFinite if one of them is no picture.
        """
        for chunk in chunks:
            distributed.meet("the first pictures")
            images, finite = jax.device_get(self._sample(transformer, autoencoder, chunk.condition, chunk.noise))
            if not finite[: chunk.count].all():
                raise NotFinite(
                    f"{(~finite[: chunk.count]).sum()} of {chunk.count} pictures are not finite numbers and would be "
                    "black: weights are not, or they grow beyond the dtype; check the weights, or draw in float32"
                )
            yield images[: chunk.count]


class Tools(NamedTuple):
    """What a painter needs beside a transformer: the autoencoder's graph definition and parameters, text encoders."""

    autoencoder: nnx.GraphDef
    params: Params
    encode: PromptEncoder


def read_tools(
    pipeline: str | os.PathLike, mesh: Mesh, family: Family, transformer: Any, compute: Compute, text_length: int
) -> Tools:
    """Reads them from a pipeline folder, for a transformer of this config.

    Raises UserError for a folder that is not right.
    """
    place = sharding.of(mesh, family.decoder)
    _, graphdef, params = folder.load(pathlib.Path(pipeline) / AUTOENCODER, family.decoder, compute, place)
    encode = PromptEncoder(pipeline, family, transformer, compute, mesh, text_length)
    return Tools(graphdef, params, encode)


def make_sampler(
    family: Family, transformer: nnx.GraphDef, autoencoder: nnx.GraphDef, sigmas: np.ndarray, look: Look
) -> Callable[[Params, Params, Condition, jax.Array], tuple[jax.Array, jax.Array]]:
    """Builds ``sample(transformer_params, autoencoder_params, condition, noise) -> images, finite`` for ``jax.jit``.

    Args:
      family: of both networks.
      transformer, autoencoder: graph definitions.
      sigmas: noise levels ``[S + 1]``. Times are not truncated to thousandths here: the released trainer does that, the
        inference pipeline does not.
      look: how pictures are drawn.

    Returns:
      A pure function of a condition [B, ...] and noise [B, N, C], giving uint8 pictures [B, height, width, 3]
      and which of them are finite numbers [B].
    """

    def sample(
        transformer_params: Params, autoencoder_params: Params, condition: Condition, noise: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        network, scale = bind(transformer, transformer_params), jnp.full((len(noise),), look.guidance, jnp.float32)
        steps = family.prepare_steps(network, condition, jnp.asarray(sigmas[:-1]), scale)

        def velocity(x: jax.Array, sigma: jax.Array, index: jax.Array, memory: tuple) -> tuple[jax.Array, tuple]:
            prepared = of_step(steps, index)
            return family.velocity(network, x, condition, prepared, look.height, look.width), memory

        latents = flow.sample(velocity, noise, sigmas)
        decoded = family.decode(bind(autoencoder, autoencoder_params), latents, look.height, look.width)
        return to_bytes(to_unit_range(decoded)), jnp.isfinite(decoded).all(axis=(1, 2, 3))

    return sample


def to_bytes(images: jax.Array) -> jax.Array:
    """Pictures in [0, 1] as uint8."""
    return jnp.round(images * 255).astype(jnp.uint8)


def draw_noise(names: jax.Array, seed: int, shape: tuple[int, int]) -> jax.Array:
    """Initial noise [B, *shape], float32, of the pictures with ``names`` [B, K], uint32.

    Each name has a key of its own (its words are folded in one after the other), so that a picture does not depend on
    what else is made, nor on how much of it at once.
    """

    def draw(name: jax.Array) -> jax.Array:
        key = seeds.key(seed)
        for word in name:
            key = jax.random.fold_in(key, word)
        return jax.random.normal(key, shape)

    return jax.vmap(draw)(names)


def grid(images: np.ndarray, columns: int | None = None) -> Image.Image:
    """Images uint8 [B, H, W, 3] side by side, about as many rows as columns if ``columns`` is None."""
    count, height, width, _ = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    sheet = Image.new("RGB", (columns * width, math.ceil(count / columns) * height), "white")
    for index, image in enumerate(images):
        sheet.paste(Image.fromarray(image), (index % columns * width, index // columns * height))
    return sheet


def cut(sheet: np.ndarray, count: int) -> list[np.ndarray]:
    """The images of a ``grid`` of so many, [H, W, 3], in their order."""
    columns = math.ceil(math.sqrt(count))
    height, width = sheet.shape[0] // math.ceil(count / columns), sheet.shape[1] // columns
    corners = [(index // columns * height, index % columns * width) for index in range(count)]
    return [sheet[top : top + height, left : left + width] for top, left in corners]


def save_image(image: Image.Image, path: str | os.PathLike) -> None:
    """Writes a PNG, at once or not at all."""
    content = io.BytesIO()
    image.save(content, format="PNG")
    storage.write(storage.path(path), content.getvalue())
