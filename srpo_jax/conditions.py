"""From examples to what an update or a sample is made from: conditions and latents for the transformer, tokens for
rewards."""

import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from srpo_jax import distributed, sharding
from srpo_jax.algorithm import preference
from srpo_jax.algorithm.batch import Batch
from srpo_jax.architectures import Architecture, used_rewards
from srpo_jax.data import stored
from srpo_jax.data.loading import Examples
from srpo_jax.families.base import Condition, Family
from srpo_jax.models.compute import Compute
from srpo_jax.program import Program


class PromptEncoder:
    """The text encoders of a pipeline on a mesh, compiled once per batch size.

    Args:
      path: pipeline folder.
      family: of the pipeline.
      transformer: the sizes of the transformer that the features are for.
      compute: execution options.
      mesh: where parameters and results live.
      length: tokens of a prompt.

    Raises UserError if a folder is missing.
    """

    def __init__(
        self, path: str | os.PathLike, family: Family, transformer: Any, compute: Compute, mesh: Mesh, length: int
    ):
        self._encoders = family.text_encoders(path, transformer, compute, lambda network: sharding.of(mesh, network))
        self._mesh, self._length = mesh, length
        self._apply = jax.jit(self._encoders.apply, out_shardings=sharding.of_batch(mesh))

    @property
    def params(self) -> Any:
        """The encoders' weights, a tree."""
        return self._encoders.params

    def __call__(self, prompts: Sequence[str], batch_size: int) -> Condition:
        """The condition [B, ...] in the compute dtype, split over the mesh.

        ``prompts`` are this process's share (``sharding.local_rows``) of the ``batch_size`` = B prompts.
        """
        ids = self._encoders.tokens(prompts, self._length)
        placed = (sharding.place(self._mesh, batch_size, array) for array in ids)
        distributed.meet("encoding texts")
        return distributed.in_turn(self._apply(self._encoders.params, *placed))


def prompt_encoder(config: ConfigDict, built: Program, architecture: Architecture) -> PromptEncoder:
    """The text encoders of a training run."""
    return PromptEncoder(
        config.model.path,
        architecture.family,
        architecture.transformer,
        built.computes.text,
        built.mesh,
        config.data.text_length,
    )


class Conditioner:
    """Makes the batches of a training run.

    Args:
      config, built: of the run.
      encode: the text encoders; None if the examples come with their features.
    """

    def __init__(self, config: ConfigDict, built: Program, encode: PromptEncoder | None):
        self._mesh, self._batch_size, self._encode = built.mesh, config.data.batch_size, encode
        self._words = tuple(config.reward.positive), tuple(config.reward.negative)
        self._family, self._offline = built.networks.family, built.settings.offline
        self._names = tuple(built.batch.condition)
        self._encoded: tuple[Examples, Condition] | None = None
        self._tokens = {
            name: built.networks.rewards[name].tokens(reward.path) for name, reward in used_rewards(config).items()
        }

    @property
    def encoder_params(self) -> Any:
        """The weights of the text encoders, a tree; None if the examples come with their features."""
        return None if self._encode is None else self._encode.params

    def batch(self, examples: Examples, step: int) -> Batch:
        """The batch of update ``step`` (counted from 1) from this process's examples."""
        captions = preference.captions(examples.prompts, preference.control_words(step, *self._words))
        # Updates that share a rollout get the same object: its features are made once.
        if self._encoded is None or self._encoded[0] is not examples:
            self._encoded = examples, self._condition(examples)
        tokens = {
            name: {variant: jax.tree.map(self._place, tokens(texts)) for variant, texts in captions.items()}
            for name, tokens in self._tokens.items()
        }
        latents = self._place(self._family.pack(examples.arrays[stored.LATENTS])) if self._offline else None
        return Batch(self._encoded[1], tokens, latents)

    def _condition(self, examples: Examples) -> Condition:
        if self._encode is None:
            return {name: self._place(examples.arrays[name]) for name in self._names}
        return self._encode(examples.prompts, self._batch_size)

    def _place(self, local: np.ndarray) -> jax.Array:
        return sharding.place(self._mesh, self._batch_size, local)
