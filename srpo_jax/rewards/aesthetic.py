"""Aesthetic predictors: how well people rate a picture, from 1 to 10, whatever the caption.

LAION's v2 reads OpenAI's CLIP ViT-L/14; V2.5 (AGPL-3.0, code and weights: the user's own download) a SigLIP. As they
read no words, a relative reward ``(1 + k) r - r`` of theirs is ``k r``.
"""

import os

import jax
import jax.numpy as jnp

from srpo_jax.costs import flops
from srpo_jax.costs.flops import Forward
from srpo_jax.models.aesthetic import ClipAestheticConfig, SiglipAestheticConfig
from srpo_jax.models.compute import Params, bind
from srpo_jax.rewards.base import Reward, Tokenize
from srpo_jax.rewards.clip import preprocess, resize, unit


class Aesthetic(Reward):
    """LAION's aesthetic predictor v2 (``sac+logos+ava1-l14-linearMSE``)."""

    network = "aesthetic"
    published = ClipAestheticConfig()

    def tokens(self, path: str | os.PathLike) -> Tokenize:
        """Nothing."""
        del path
        return lambda texts: {}

    def token_shapes(self) -> dict:
        """Nothing."""
        return {}

    def prepare(self, params: Params, tokens: dict) -> dict:
        """Nothing."""
        del params, tokens
        return {}

    def look(self, params: Params, images: jax.Array) -> jax.Array:
        """The score ``[B]``, float32."""
        network = bind(self.graphdef, params)
        return network.head(unit(network.vision(self.pixels(images))))

    def score(self, params: Params, seen: jax.Array, prepared: dict) -> jax.Array:
        """What was seen."""
        del params, prepared
        return seen

    def pixels(self, images: jax.Array) -> jax.Array:
        """Pictures ``[B, H, W, 3]`` in [0, 1] as the tower takes them."""
        return preprocess(images, self.sizes.vision_config.image_size)

    def look_cost(self) -> Forward:
        """The vision tower."""
        return flops.vision_tower(self.sizes.vision_config, 1, self.sizes.projection_dim)


class AestheticV25(Aesthetic):
    """Aesthetic Predictor V2.5. The whole picture is seen, its sides not kept in proportion."""

    network = "aesthetic_v25"
    published = SiglipAestheticConfig()

    def pixels(self, images: jax.Array) -> jax.Array:
        """In [-1, 1]."""
        size = self.sizes.vision_config.image_size
        return 2 * resize(images.astype(jnp.float32), size, size) - 1

    def look_cost(self) -> Forward:
        """The vision tower with its pooling."""
        return flops.siglip(self.sizes.vision_config)
