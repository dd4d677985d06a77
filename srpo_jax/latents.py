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

from srpo_jax import sampling, sharding
from srpo_jax.algorithm.batch import join_batch, split_batch
from srpo_jax.algorithm.networks import to_unit_range
from srpo_jax.families.base import AUTOENCODER, Family
from srpo_jax.models.compute import Compute, Params, bind
from srpo_jax.weights import folder


class LatentEncoder:
    """Encodes pictures with the autoencoder of a pipeline folder, on a mesh.

    Args:
      model: pipeline folder.
      family: of the pipeline.
      mesh: where parameters and results live.

    Raises UserError for a folder that is not right.
    """

    def __init__(self, model: str | os.PathLike, family: Family, mesh: Mesh):
        self._mesh, compute = mesh, Compute(constrain=sharding.constraint(mesh))
        where, place = pathlib.Path(model) / AUTOENCODER, sharding.of(mesh, family.decoder)
        _, graphdef, self._params = folder.load(where, family.decoder, compute, place)

        def encode(autoencoder: object, images: jax.Array) -> jax.Array:
            return family.encode(autoencoder, images.astype(jnp.float32) / 127.5 - 1)

        def apply(params: Params, images: jax.Array) -> jax.Array:
            parts = split_batch(images, images.shape[0] // sharding.batch_parts(mesh))
            return join_batch(jax.lax.map(lambda part: encode(bind(graphdef, params), part), parts))

        self._apply = jax.jit(apply, out_shardings=sharding.of_batch(mesh))

    def __call__(self, images: np.ndarray, batch_size: int) -> jax.Array:
        """Latents float32 [B, h, w, channels], split over the mesh, of this process's share uint8 [b, H, W, 3] of B
        pictures."""
        with jax.default_matmul_precision("float32"):  # accelerators would round what enters a product
            return self._apply(self._params, sharding.place(self._mesh, batch_size, images))


def decode(model: str | os.PathLike, family: Family, latents: np.ndarray) -> np.ndarray:
    """Pictures uint8 [B, H, W, 3] from latents [B, h, w, channels], one after the other on the default device, by the
    autoencoder of the pipeline folder ``model``.

    Raises UserError for a pipeline folder that is not right.
    """
    _, graphdef, params = folder.load(pathlib.Path(model) / AUTOENCODER, family.decoder)
    height, width = (side * family.factor for side in latents.shape[1:3])

    @jax.jit
    def apply(params: Params, latents: jax.Array) -> jax.Array:
        decoded = family.decode(bind(graphdef, params), family.pack(latents), height, width)
        return sampling.to_bytes(to_unit_range(decoded))

    return np.concatenate([apply(params, latents[index : index + 1]) for index in range(len(latents))])
