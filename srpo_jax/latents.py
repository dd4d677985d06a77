"""Pictures to the latents that the transformer sees, and back, by a pipeline's autoencoder.

Encoding takes the mean of the posterior, not a draw from it: what is encoded again is the same to the last bit, and
the posterior is narrow beside the noise that training adds. It is done once, so in float32 whatever training computes
in; one picture at a time passes on each device, since the encoder's activations are the largest of all.
"""

import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from srpo_jax import program, sharding
from srpo_jax.algorithm import step
from srpo_jax.algorithm.settings import LATENT_CHANNELS, LATENT_FACTOR
from srpo_jax.errors import UserError
from srpo_jax.models.autoencoder import Autoencoder, AutoencoderConfig
from srpo_jax.models.compute import Compute, Params, bind
from srpo_jax.weights import folder


def read_config(model: str | os.PathLike) -> AutoencoderConfig:
    """The sizes of a pipeline's autoencoder. Raises UserError if training cannot use its latents."""
    path = pathlib.Path(model) / program.AUTOENCODER
    config = program.read_config(path, "autoencoder")
    if (config.factor, config.latent_channels) != (LATENT_FACTOR, LATENT_CHANNELS):
        raise UserError(
            f"{path} has {config.latent_channels} channels of latents at 1/{config.factor} of a picture's sides; "
            f"FLUX takes {LATENT_CHANNELS} at 1/{LATENT_FACTOR}"
        )
    return config


def encode(autoencoder: Autoencoder, images: jax.Array) -> jax.Array:
    """Pictures uint8 [B, H, W, 3] to scaled latents float32 [B, H/8, W/8, 16]: the posterior's mean."""
    return autoencoder.scale_latents(autoencoder.encode(images.astype(jnp.float32) / 127.5 - 1)[0])


class Encoder:
    """``encode`` with the autoencoder of a pipeline folder, on a mesh. Raises UserError for a folder that is not right.

    Args:
      model: pipeline folder.
      mesh: where parameters and results live.
    """

    def __init__(self, model: str | os.PathLike, mesh: Mesh):
        read_config(model)
        self._mesh = mesh
        path, compute = pathlib.Path(model) / program.AUTOENCODER, Compute(constrain=sharding.constraint(mesh))
        _, graphdef, self._params = folder.load(path, "autoencoder", compute, sharding.of(mesh, "autoencoder"))

        def apply(params: Params, images: jax.Array) -> jax.Array:
            parts = step.split_batch(images, images.shape[0] // sharding.batch_parts(mesh))
            return step.join_batch(jax.lax.map(lambda part: encode(bind(graphdef, params), part), parts))

        self._apply = jax.jit(apply, out_shardings=sharding.of_batch(mesh))

    def __call__(self, images: np.ndarray, batch_size: int) -> jax.Array:
        """Latents [B, H/8, W/8, 16], split over the mesh, of this process's share [b, H, W, 3] of B pictures."""
        with jax.default_matmul_precision("float32"):  # accelerators would round what enters a product
            return self._apply(self._params, sharding.place(self._mesh, batch_size, images))


def decode(model: str | os.PathLike, latents: np.ndarray) -> np.ndarray:
    """Pictures uint8 [B, H, W, 3] from latents [B, H/8, W/8, 16], one after the other on the default device.

    Raises UserError for a pipeline folder that is not right.
    """
    _, graphdef, params = folder.load(pathlib.Path(model) / program.AUTOENCODER, "autoencoder")

    @jax.jit
    def apply(params: Params, latents: jax.Array) -> jax.Array:
        autoencoder = bind(graphdef, params)
        images = step.to_unit_range(autoencoder.decode(autoencoder.unscale_latents(latents)))
        return jnp.round(images * 255).astype(jnp.uint8)

    return np.concatenate([apply(params, latents[index : index + 1]) for index in range(len(latents))])
