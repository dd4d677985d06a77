"""Rewards of CLIP's kind: an inner product of unit-norm image and text features, HPS-v2.1, PickScore and CLIP.

They differ in weights, in a scale, and in what fills short captions.
"""

import os
import pathlib
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from srpo_jax import text, tokens
from srpo_jax.costs import flops
from srpo_jax.costs.flops import Forward
from srpo_jax.errors import UserError
from srpo_jax.models.clip import VIT_H_14, ClipConfig
from srpo_jax.models.compute import Params, bind
from srpo_jax.rewards.base import Reward, Tokenize, int32

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
# Brings a trained temperature, about 100, to the range of the loss's margin.
TEMPERATURE_DIVISOR = 20.0


class ClipReward(Reward):
    """A CLIP, on the scale of its trained temperature: laion's CLIP-H, PickScore, a user's own."""

    network = "clip"
    published = VIT_H_14
    tokenizer_of = "HPS-v2.1, PickScore and CLIP-H have that of FLUX.1-dev/tokenizer"
    reported = TEMPERATURE_DIVISOR  # as PickScore and the CLIP score are printed: about 100 times the cosine
    open_clip: ClassVar[bool] = False  # whether it was trained with open_clip's tokenizer

    @classmethod
    def load_tokenizer(cls, sizes: ClipConfig, where: str | os.PathLike) -> Any:
        """As transformers reads it."""
        tokenizer = text.load_tokenizer(where)
        tokens.check(tokenizer, sizes.text_config, where)
        return tokenizer

    def tokens(self, path: str | os.PathLike) -> Tokenize:
        """Token ids int32 [B, T], T as the network has positions."""
        where, length = pathlib.Path(path) / "tokenizer", self.sizes.text_config.max_position_embeddings
        tokenizer = self.load_tokenizer(self.sizes, where)
        if self.open_clip:
            tokenizer = tokens.OpenClipTokenizer(tokenizer, where)
        if tokenizer.pad_token_id is None:
            raise UserError(f"{where} names no padding token; take the tokenizer of a CLIP model")
        return lambda texts: text.tokenize(tokenizer, texts, length)

    def token_shapes(self) -> jax.ShapeDtypeStruct:
        """[T]."""
        return int32(self.sizes.text_config.max_position_embeddings)

    def prepare(self, params: Params, tokens: jax.Array) -> jax.Array:
        """Unit-norm features ``[B, E]``, float32, of token ids ``[B, T]``."""
        return unit(bind(self.graphdef, params).encode_text(tokens))

    def look(self, params: Params, images: jax.Array) -> jax.Array:
        """Unit-norm features ``[B, E]``, float32."""
        pixels = preprocess(images, self.sizes.vision_config.image_size)
        return unit(bind(self.graphdef, params).encode_image(pixels))

    def score(self, params: Params, seen: jax.Array, prepared: jax.Array) -> jax.Array:
        """The inner product, on the model's scale."""
        return jnp.sum(seen * prepared, axis=-1) * self.scale(params)

    def scale(self, params: Params) -> jax.Array | float:
        """What multiplies the inner product."""
        return jnp.exp(params["logit_scale"].astype(jnp.float32)) / TEMPERATURE_DIVISOR

    def prepare_cost(self) -> Forward:
        """The text tower."""
        return flops.text_tower(self.sizes.text_config, self.sizes.projection_dim)

    def look_cost(self) -> Forward:
        """The vision tower."""
        return flops.image_tower(self.sizes)


class HpsReward(ClipReward):
    """HPS-v2.1 (arXiv 2306.09341): the inner product as it is, under open_clip's tokenizer."""

    reported = 1.0
    open_clip = True

    def scale(self, params: Params) -> float:
        """One."""
        del params
        return 1.0


def unit(features: jax.Array) -> jax.Array:
    """Divides by the Euclidean norm over the last axis, in float32."""
    features = features.astype(jnp.float32)
    return features / jnp.linalg.norm(features, axis=-1, keepdims=True)


def preprocess(images: jax.Array, size: int) -> jax.Array:
    """CLIP's preprocessing: short side to ``size`` (bicubic, antialiased), centre crop, normalise.

    Matches torchvision's ``Resize(size, BICUBIC, antialias=True)``, ``CenterCrop(size)`` and ``Normalize``, and
    carries gradients.

    Args:
      images: ``[B, H, W, 3]`` in [0, 1].
      size: side of the result, pixels.

    Returns:
      ``[B, size, size, 3]``, float32.
    """
    height, width = images.shape[1:3]
    short = min(height, width)
    resized_height, resized_width = size * height // short, size * width // short
    x = resize(images.astype(jnp.float32), resized_height, resized_width)
    # torchvision rounds the crop's corner half to even, as Python does.
    top, left = round((resized_height - size) / 2), round((resized_width - size) / 2)
    x = x[:, top : top + size, left : left + size]
    return (x - jnp.asarray(MEAN)) / jnp.asarray(STD)


def resize(images: jax.Array, height: int, width: int) -> jax.Array:
    """``[B, H, W, C]`` to another size, bicubic and antialiased, as torchvision and PIL do; in the same dtype."""
    if images.shape[1:3] == (height, width):
        return images
    shape = len(images), height, width, images.shape[3]
    return jax.image.resize(images, shape, method="cubic", antialias=True, precision=jax.lax.Precision.HIGHEST)
