"""ImageReward v1.0 (arXiv 2304.05977): one BERT reads the caption while it looks at the picture.

Its scores spread around 0 with a deviation of about 1 over the pictures that it was trained on.
"""

import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from srpo_jax import text
from srpo_jax.costs import flops
from srpo_jax.costs.flops import Forward
from srpo_jax.errors import UserError
from srpo_jax.models.blip import BlipConfig
from srpo_jax.models.compute import Params, bind
from srpo_jax.rewards.base import Reward, Tokenize, int32
from srpo_jax.rewards.clip import preprocess

MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of its authors' scores
LENGTH = 35  # tokens of a caption, longer ones are cut
ADDED = ("[DEC]", "[ENC]")  # tokens that BLIP adds to BERT's


class ImageReward(Reward):
    """A pass of the text encoder for each caption of a picture; the vision tower runs once."""

    network = "blip"
    published = BlipConfig()
    tokenizer_of = "ImageReward has that of google-bert/bert-base-uncased"

    @classmethod
    def load_tokenizer(cls, sizes: BlipConfig, where: str | os.PathLike) -> Any:
        """BERT's, with BLIP's two tokens added."""
        tokenizer, size = text.load_tokenizer(where, "BertTokenizerFast"), sizes.text_config.vocab_size
        tokenizer.add_tokens(list(ADDED), special_tokens=True)
        if len(tokenizer) != size:
            raise UserError(
                f"{where} is not this network's tokenizer: with {' and '.join(ADDED)} it has {len(tokenizer)} tokens, "
                f"the network {size}; {cls.tokenizer_of} (--tokenizer of `convert import`)"
            )
        return tokenizer

    def tokens(self, path: str | os.PathLike) -> Tokenize:
        """``{"ids": int32 [B, T], "mask": int32 [B, T]}``, 1 for words and 0 for padding."""
        tokenizer = self.load_tokenizer(self.sizes, pathlib.Path(path) / "tokenizer")

        def tokens(texts: Sequence[str]) -> dict[str, np.ndarray]:
            found = tokenizer(list(texts), padding="max_length", truncation=True, max_length=LENGTH)
            names = {"ids": "input_ids", "mask": "attention_mask"}
            return {name: np.asarray(found[theirs], np.int32) for name, theirs in names.items()}

        return tokens

    def token_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """[T] each."""
        return {"ids": int32(LENGTH), "mask": int32(LENGTH)}

    def prepare(self, params: Params, tokens: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Embedded words ``[B, T, D]`` and their mask ``[B, T]``."""
        words = bind(self.graphdef, params).text.embed(tokens["ids"])
        return {"words": words, "mask": tokens["mask"] > 0}

    def look(self, params: Params, images: jax.Array) -> jax.Array:
        """The picture's tokens ``[B, N, E]``."""
        pixels = preprocess(images, self.sizes.vision_config.image_size)
        return bind(self.graphdef, params).vision(pixels)

    def score(self, params: Params, seen: jax.Array, prepared: dict[str, jax.Array]) -> jax.Array:
        """As its authors scale it."""
        score = bind(self.graphdef, params)(prepared["words"], prepared["mask"], seen)
        return (score - jnp.float32(MEAN)) / jnp.float32(STD)

    def look_cost(self) -> Forward:
        """The vision tower."""
        return flops.vision_tower(self.sizes.vision_config, 1)

    def score_cost(self) -> Forward:
        """The text encoder with its cross-attention."""
        return flops.blip_text(self.sizes, LENGTH)
