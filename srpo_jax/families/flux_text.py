"""FLUX.1's two text encoders, T5 for the tokens and CLIP-L for the pooled vector, as one callable."""

import os
import pathlib
from collections.abc import Sequence

import jax
import numpy as np

from srpo_jax import text, tokens
from srpo_jax.families.base import Condition, PlaceOf
from srpo_jax.models.compute import Compute, Params, bind
from srpo_jax.weights import folder


class FluxTextEncoders:
    """Both text encoders from a converted pipeline folder; a ``families.base.TextEncoders``.

    Args:
      path: holds ``tokenizer``, ``tokenizer_2``, ``text_encoder`` (CLIP-L) and ``text_encoder_2`` (T5).
      compute: execution options of both.
      place: called with a network's name ("clip_text", "t5") for where its parameters go, as in ``folder.load``; None
        puts whole arrays on the default device.

    Attributes:
      params: of CLIP, of T5.
      apply: pure ``apply(params, clip_ids, t5_ids) -> {"text": [B, T, C], "pooled": [B, P]}`` in ``compute.dtype``.

    Raises UserError if one of the folders is missing or is not what it should be, or a tokenizer is of another
    network.
    """

    def __init__(self, path: str | os.PathLike, compute: Compute = folder.DEFAULT, place: PlaceOf | None = None):
        path = pathlib.Path(path)
        self._clip_tokenizer = text.load_tokenizer(path / "tokenizer")
        self._t5_tokenizer = text.load_tokenizer(path / "tokenizer_2")

        def load(part: str, network: str) -> tuple:
            return folder.load(path / part, network, compute, None if place is None else place(network))

        sizes, clip, clip_params = load("text_encoder", "clip_text")
        t5_sizes, t5, t5_params = load("text_encoder_2", "t5")
        tokens.check(self._clip_tokenizer, sizes, path / "tokenizer")
        tokens.check(self._t5_tokenizer, t5_sizes, path / "tokenizer_2")
        # CLIP's files say how long its texts are; a tokenizer may cut them earlier.
        self._clip_length = min(sizes.max_position_embeddings, self._clip_tokenizer.model_max_length)
        self.params = (clip_params, t5_params)

        def apply(params: tuple[Params, Params], clip_ids: jax.Array, t5_ids: jax.Array) -> Condition:
            features, pooled = bind(t5, params[1])(t5_ids), bind(clip, params[0])(clip_ids)
            return {"text": features, "pooled": pooled.astype(compute.dtype)}

        self.apply = apply

    def tokens(self, prompts: Sequence[str], length: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids int32 of B prompts: CLIP's [B, its own fixed length], T5's [B, ``length``]."""
        clip = text.tokenize(self._clip_tokenizer, prompts, self._clip_length)
        return clip, text.tokenize(self._t5_tokenizer, prompts, length)
