"""How well a picture is recovered from noise: the one-step prediction against Direct-Align's interpolation.

The figure of arXiv 2509.06942 that Direct-Align rests on. An artist's picture ``x0`` is mixed with noise that is kept.
The network's prediction from there to level 0 in one step is ReFL's picture; Direct-Align takes a short step and
removes the rest of the noise, which it knows.
"""

import dataclasses
import json
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from srpo_jax import architectures, latents, sampling, schema, sharding, storage
from srpo_jax.algorithm import direct_align, flow
from srpo_jax.algorithm.networks import to_unit_range
from srpo_jax.emoji import judge, measure, pictures, world
from srpo_jax.errors import UserError
from srpo_jax.families.base import TRANSFORMER
from srpo_jax.models.compute import Compute, Params, bind
from srpo_jax.weights import folder

LEVELS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
ONE_STEP, DIRECT_ALIGN = "one step", "Direct-Align"


@dataclasses.dataclass(frozen=True)
class Recovered:
    """Of one way at one noise level, a number a picture, concept by concept.

    Attributes:
      way: ``ONE_STEP`` or ``DIRECT_ALIGN``.
      level: sigma.
      error: to what the autoencoder makes of the picture itself, root mean square of pixels.
      right, styled: 1 where the judge finds the concept, the style, else 0.
    """

    way: str
    level: float
    error: list[float]
    right: list[int]
    styled: list[int]


def stride(config: ConfigDict) -> float:
    """How far, in sigma, Direct-Align's step of a recipe goes."""
    align = config.align
    grid = direct_align.training_grid(
        train_timestep=tuple(align.train_timestep), length=align.length, schedule_steps=align.schedule_steps,
        shift=config.rollout.shift, groundtruth_ratio=align.groundtruth_ratio,
        discount_positive=(0.0, 0.0), discount_negative=(0.0, 0.0),
    )  # fmt: skip
    return float(grid.sigmas[0] - grid.sigmas[grid.stride])


def recover(config: ConfigDict, concepts: Sequence[world.Concept], count: int, critic: judge.Judge) -> list[Recovered]:
    """Recovers the artists' pictures of concepts, ``count`` times each with other noise, at all levels in both ways.

    Raises UserError for a pipeline folder that is not right.
    """
    family, sizes = architectures.read_pipeline(config.model.path)
    mesh, height, width = sharding.make_mesh(config.mesh), config.data.height, config.data.width
    path = pathlib.Path(config.model.path) / TRANSFORMER
    _, graphdef, params = folder.load(path, family.network, sharding=sharding.of(mesh, family.network))
    given = mesh, family, sizes.transformer, Compute(), config.data.text_length
    tools = sampling.read_tools(config.model.path, *given)
    truth = np.repeat(pictures.load(concepts, [measure.WANTED])[0], count, axis=0)
    names = [world.prompt(concept) for concept in concepts for _ in range(count)]
    clean = family.pack(latents.LatentEncoder(config.model.path, family, mesh)(truth, len(truth)))
    condition = tools.encode(names, len(names))
    noise = sampling.draw_noise(np.arange(len(names), dtype=np.uint32)[:, None], 0, clean.shape[1:])
    guidance, step = jnp.full(len(names), config.align.guidance), stride(config)

    @jax.jit
    def predict(params: Params, level: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The latents that the one step and the short step imply."""
        network, levels = bind(graphdef, params), jnp.full(len(noise), level)
        noisy = flow.add_noise(clean, noise, levels)
        prepared = family.prepare(network, condition, levels, guidance)
        velocity = family.velocity(network, noisy, condition, prepared, height, width)
        ends = jnp.zeros_like(levels), levels - step
        return tuple(direct_align.recover(noisy, velocity, noise, levels, end) for end in ends)

    @jax.jit
    def picture(params: Params, tokens: jax.Array) -> jax.Array:
        return to_unit_range(family.decode(bind(tools.autoencoder, params), tokens, height, width))

    whole, found = np.asarray(picture(tools.params, clean)), []
    captions = [concept.caption for concept in concepts for _ in range(count)]
    for level in LEVELS:
        for way, tokens in zip((ONE_STEP, DIRECT_ALIGN), predict(params, level), strict=True):
            images = np.asarray(picture(tools.params, tokens))
            opinion = critic(images)
            right, styled = opinion.right(captions), opinion.in_style()[measure.WANTED]
            error = np.sqrt(np.square(images - whole).mean((1, 2, 3)))
            found.append(Recovered(way, level, error.tolist(), right.astype(int).tolist(), styled.astype(int).tolist()))
    return found


def write(file: pathlib.Path, found: Sequence[Recovered]) -> None:
    """Writes what ``read`` reads."""
    content = json.dumps([dataclasses.asdict(one) for one in found]) + "\n"
    storage.write(storage.path(file), content.encode())


def read(file: pathlib.Path) -> list[Recovered]:
    """What was found. Raises UserError for a file that is damaged."""
    remedy = f"{file} is no file of a study; delete it, and the same command makes it again"
    try:
        content = schema.parse(file.read_text(encoding="utf-8"))
        return [schema.rebuild(Recovered, one, "it") for one in content]
    except (ValueError, TypeError) as error:
        raise UserError(f"{remedy} ({error})") from error
