"""From examples to what an update or a sample is made from: features and latents for the transformer, token ids for
rewards."""

import os
import pathlib
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from srpo_jax import program, sharding, text, tokens
from srpo_jax.algorithm import flow, rewards
from srpo_jax.algorithm.step import Batch
from srpo_jax.data import stored
from srpo_jax.data.loading import Examples
from srpo_jax.errors import UserError
from srpo_jax.models.compute import Compute
from srpo_jax.models.flux import FluxConfig
from srpo_jax.program import Program


class TextEncoders:
    """``text.TextEncoders`` on a mesh, compiled once per batch size.

    Args:
      path: pipeline folder.
      compute: execution options.
      mesh: where parameters and results live.
      transformer: the sizes of the transformer that the features are for.
      length: T5 tokens of a prompt.

    Raises UserError if a folder is missing or the encoders do not fit the transformer.
    """

    def __init__(
        self, path: str | os.PathLike, compute: Compute, mesh: Mesh, transformer: FluxConfig, length: int
    ) -> None:
        encoders = text.TextEncoders(path, compute, lambda network: sharding.of(mesh, network))
        for name, found, wanted in (
            ("text_encoder", encoders.clip_config.hidden_size, transformer.pooled_projection_dim),
            ("text_encoder_2", encoders.t5_config.d_model, transformer.joint_attention_dim),
        ):
            if found != wanted:
                raise UserError(
                    f"{pathlib.Path(path) / name} has width {found}; the transformer beside it expects {wanted}"
                )
        self._encoders, self._mesh, self._length = encoders, mesh, length
        self._apply = jax.jit(encoders.apply, out_shardings=sharding.of_batch(mesh))

    def __call__(self, prompts: Sequence[str], batch_size: int) -> tuple[jax.Array, jax.Array]:
        """Features [B, T, C] and pooled vectors [B, P] in the compute dtype, split over the mesh.

        ``prompts`` are this process's share (``sharding.local_rows``) of the ``batch_size`` = B prompts.
        """
        ids = self._encoders.tokens(prompts, self._length)
        return self._apply(self._encoders.params, *(sharding.place(self._mesh, batch_size, array) for array in ids))


def text_encoders(config: ConfigDict, built: Program, architecture: program.Architecture) -> TextEncoders:
    """The text encoders of a training run."""
    return TextEncoders(
        config.model.path, built.computes.text, built.mesh, architecture.transformer, config.data.text_length
    )


class Conditioner:
    """Makes the batches of a training run.

    Args:
      config, built, architecture: of the run.
      encode: the text encoders; None if the examples come with their features.
    """

    def __init__(
        self, config: ConfigDict, built: Program, architecture: program.Architecture, encode: TextEncoders | None
    ):
        self._mesh, self._batch_size, self._encode = built.mesh, config.data.batch_size, encode
        self._words = tuple(config.reward.positive), tuple(config.reward.negative)
        self._offline = config.data.rollout == "offline"
        self._encoded: tuple[Examples, tuple[jax.Array, jax.Array]] | None = None
        self._rewards = {}
        for name, (path, _) in program.used_rewards(config).items():
            where, sizes = pathlib.Path(path) / "tokenizer", architecture.rewards[name].text_config
            tokenizer = text.load_tokenizer(where)
            tokens.check(tokenizer, sizes, where)
            if name == "hps":  # HPS-v2.1 was trained with open_clip's tokenizer
                tokenizer = tokens.OpenClipTokenizer(tokenizer, where)
            if tokenizer.pad_token_id is None:
                raise UserError(f"{where} names no padding token; take the tokenizer of a CLIP model")
            self._rewards[name] = tokenizer, sizes.max_position_embeddings

    def batch(self, examples: Examples, step: int) -> Batch:
        """The batch of update ``step`` (counted from 1) from this process's examples."""
        prompts = examples.prompts
        positive, negative = rewards.control_words(step, *self._words)
        captions = {
            "positive": [rewards.prefixed(positive, prompt) for prompt in prompts],
            "negative": [rewards.prefixed(negative, prompt) for prompt in prompts],
            "caption": prompts,
        }
        # Updates that share a rollout get the same object: its features are made once.
        if self._encoded is None or self._encoded[0] is not examples:
            self._encoded = examples, self._features(examples)
        reward_ids = {
            name: {
                caption: self._place(text.tokenize(tokenizer, captions[caption], length))
                for caption in program.CAPTIONS
            }
            for name, (tokenizer, length) in self._rewards.items()
        }
        latents = self._place(flow.pack(examples.arrays[stored.LATENTS])) if self._offline else None
        return Batch(*self._encoded[1], reward_ids, latents)

    def _features(self, examples: Examples) -> tuple[jax.Array, jax.Array]:
        if self._encode is None:
            return self._place(examples.arrays["text"]), self._place(examples.arrays["pooled"])
        return self._encode(examples.prompts, self._batch_size)

    def _place(self, local: np.ndarray) -> jax.Array:
        return sharding.place(self._mesh, self._batch_size, local)
