"""Images from prompts: FLUX's inference pipeline (guidance-distilled Euler sampling), compiled once per batch size."""

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

from srpo_jax import sharding, storage
from srpo_jax.algorithm import flow
from srpo_jax.errors import UserError
from srpo_jax.models.compute import Params, bind
from srpo_jax.weights.files import read_json

FACTOR = 8  # pixels of an image per latent position, along each side
SCHEDULER = "FlowMatchEulerDiscreteScheduler"
# What diffusers takes where the file is silent; the second group changes the schedule in ways that FLUX.1 does not use.
SCHEDULER_DEFAULTS = {
    "shift": 1.0, "use_dynamic_shifting": False, "base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}  # fmt: skip
SCHEDULER_FIXED = {
    "time_shift_type": "exponential", "invert_sigmas": False, "shift_terminal": None, "use_karras_sigmas": False,
    "use_exponential_sigmas": False, "use_beta_sigmas": False, "stochastic_sampling": False,
}  # fmt: skip

Encode = Callable[[Sequence[str], int], tuple[jax.Array, jax.Array]]


def read_scheduler(path: str | os.PathLike) -> dict[str, Any]:
    """The scheduler of a pipeline folder, complete, for ``flow.pipeline_schedule``.

    Raises UserError if the file is missing or asks for a schedule that is not computed here.
    """
    file = pathlib.Path(path) / "scheduler" / "scheduler_config.json"
    found = read_json(file)
    if found.get("_class_name", SCHEDULER) != SCHEDULER:
        raise UserError(f"{file}: {found['_class_name']} is not supported; FLUX.1 has {SCHEDULER}")
    for key, value in SCHEDULER_FIXED.items():
        if found.get(key, value) not in (value, None):
            raise UserError(f"{file}: {key}={found[key]!r} is not supported; FLUX.1 has {value!r}")
    return {key: found.get(key, value) for key, value in SCHEDULER_DEFAULTS.items()}


def make_sampler(
    transformer: nnx.GraphDef,
    autoencoder: nnx.GraphDef,
    *,
    height: int,
    width: int,
    sigmas: np.ndarray,
    guidance: float | None,
) -> Callable[[Params, Params, jax.Array, jax.Array, jax.Array], jax.Array]:
    """Builds ``sample(transformer_params, autoencoder_params, text, pooled, noise) -> images``, ready for ``jax.jit``.

    Args:
      transformer, autoencoder: graph definitions.
      height, width: of the images, pixels, multiples of 16.
      sigmas: noise levels ``[S + 1]``, as from ``flow.pipeline_schedule``. Times are not truncated to thousandths here:
        the released trainer does that, the inference pipeline does not.
      guidance: the distilled guidance scale, None for a transformer without that input.

    Returns:
      A pure function of text [B, T, C], pooled [B, P] and noise [B, N, 64], giving uint8 images [B, height, width, 3].
    """
    rows, columns = height // FACTOR, width // FACTOR

    def sample(
        transformer_params: Params, autoencoder_params: Params, text: jax.Array, pooled: jax.Array, noise: jax.Array
    ) -> jax.Array:
        count = noise.shape[0]
        network = bind(transformer, transformer_params)
        scale = None if guidance is None else jnp.full((count,), guidance, jnp.float32)
        image_ids, text_ids = jnp.asarray(flow.image_ids(rows, columns)), jnp.asarray(flow.text_ids(text.shape[1]))

        steps = network.modulations_of_steps(pooled, jnp.asarray(sigmas[:-1]), scale)

        def velocity(x: jax.Array, sigma: jax.Array, index: jax.Array, memory: tuple) -> tuple[jax.Array, tuple]:
            return network.modulated(x, text, steps.of_step(index), image_ids, text_ids), memory

        latents = flow.unpack(flow.sample(velocity, noise, sigmas, memory=()), rows, columns)
        decoder = bind(autoencoder, autoencoder_params)
        images = jnp.clip(decoder.decode(decoder.unscale_latents(latents)) / 2 + 0.5, 0, 1)
        return jnp.round(images * 255).astype(jnp.uint8)

    return sample


def draw_noise(indices: jax.Array, seed: int, tokens: int) -> jax.Array:
    """Initial noise [B, N, 64], float32, of the images numbered ``indices`` [B]. Each number has a key of its own, so
    that an image does not depend on how many are made at once."""
    keys = jax.vmap(lambda index: jax.random.fold_in(jax.random.key(seed), index))(indices)
    return jax.vmap(lambda key: jax.random.normal(key, (tokens, 4 * 16)))(keys)


class Chunk(NamedTuple):
    """Inputs of images that are made at once; the last of them may be there to fill the batch: ``count`` are wanted."""

    text: jax.Array
    pooled: jax.Array
    noise: jax.Array
    count: int


class Sampler:
    """Makes images of one size on a mesh.

    Args:
      mesh: where the parameters live.
      sample: from ``make_sampler``.
      tokens: image tokens, N.
      batch_size: images made at once, a multiple of ``sharding.batch_parts``.
    """

    def __init__(self, mesh: Mesh, sample: Callable[..., jax.Array], tokens: int, batch_size: int):
        self._mesh, self._tokens, self._batch_size = mesh, tokens, batch_size
        # Images come back to every process, however the batch was split.
        self._sample = jax.jit(sample, out_shardings=sharding.replicated(mesh))

    def prepare(
        self, encode: Encode, prompts: Sequence[str], *, seed: int = 0, noise: np.ndarray | None = None
    ) -> list[Chunk]:
        """Encodes prompts and draws noise for them (or takes ``noise`` [len(prompts), N, 64]), on the devices.

        ``encode`` are the text encoders, ``encode(prompts, batch_size)`` (``conditions.TextEncoders``).
        """
        size, split = self._batch_size, sharding.of_batch(self._mesh)
        draw = jax.jit(lambda indices: draw_noise(indices, seed, self._tokens), out_shardings=split)
        rows = sharding.local_rows(self._mesh, size)
        chunks = []
        for first in range(0, len(prompts), size):
            # The last batch is filled up with its last prompt: one compiled program for all.
            wanted = np.minimum(np.arange(first, first + size), len(prompts) - 1)
            text, pooled = encode([prompts[wanted[row]] for row in rows], size)
            if noise is None:
                start = draw(sharding.place(self._mesh, size, wanted[rows].astype(np.int32)))
            else:
                start = sharding.place(self._mesh, size, np.asarray(noise, np.float32)[wanted[rows]])
            chunks.append(Chunk(text, pooled, start, min(size, len(prompts) - first)))
        return chunks

    def draw(self, transformer: Params, autoencoder: Params, chunks: Iterable[Chunk]) -> Iterable[np.ndarray]:
        """Yields the images of each chunk, uint8 [count, height, width, 3]."""
        for chunk in chunks:
            images = self._sample(transformer, autoencoder, chunk.text, chunk.pooled, chunk.noise)
            yield jax.device_get(images)[: chunk.count]


def grid(images: np.ndarray, columns: int | None = None) -> Image.Image:
    """Images uint8 [B, H, W, 3] side by side, about as many rows as columns if ``columns`` is None."""
    count, height, width, _ = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    sheet = Image.new("RGB", (columns * width, math.ceil(count / columns) * height), "white")
    for index, image in enumerate(images):
        sheet.paste(Image.fromarray(image), (index % columns * width, index // columns * height))
    return sheet


def save_image(image: Image.Image, path: str | os.PathLike) -> None:
    """Writes a PNG, at once or not at all."""
    content = io.BytesIO()
    image.save(content, format="PNG")
    storage.write(storage.path(path), content.getvalue())
