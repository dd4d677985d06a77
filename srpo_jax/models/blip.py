"""BLIP as ImageReward has it (Li et al., arXiv 2201.12086; Xu et al., arXiv 2304.05977): a score of picture and text.

A vision transformer makes tokens of the picture. A BERT reads the text and, in every layer, looks at them; its first
token, ``[CLS]``, then gives the score by an affine head. Norms, softmax and the head are float32.
"""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from srpo_jax import schema
from srpo_jax.models.compute import Compute
from srpo_jax.models.stack import scan_blocks, stack
from srpo_jax.models.tower import (
    BLOCK_RULES,
    HEAD_WIDTHS,
    MAY_STAY_WHOLE,
    PatchEmbedding,
    ScoreHead,
    TowerAttention,
    TowerBlock,
    TowerMlp,
    layer_norm,
    parameter,
    pick,
)
from srpo_jax.schema import LARGEST_SIZE, Epsilon, Layers, Range, Side, Size, Widths


@dataclasses.dataclass(frozen=True)
class BlipVisionConfig:
    """Vision tower, by default ImageReward's ViT-L/16. Sizes in pixels; names as HF's ``BlipVisionConfig`` has them."""

    hidden_size: Size = 1024
    intermediate_size: Size = 4096
    num_hidden_layers: Layers = 24
    num_attention_heads: Size = 16
    image_size: Side = 224
    patch_size: Side = 16
    hidden_act: str = "gelu"
    layer_norm_eps: Epsilon = 1e-6

    @property
    def tokens(self) -> int:
        """Patches and the class token."""
        return (self.image_size // self.patch_size) ** 2 + 1


@dataclasses.dataclass(frozen=True)
class BlipTextConfig:
    """Text encoder, by default a BERT-base with ``[DEC]`` and ``[ENC]`` added; names as BERT's config.json has them."""

    vocab_size: Size = 30524
    hidden_size: Size = 768
    intermediate_size: Size = 3072
    num_hidden_layers: Layers = 12
    num_attention_heads: Size = 12
    max_position_embeddings: Annotated[int, Range(2, LARGEST_SIZE)] = 512
    hidden_act: str = "gelu"
    layer_norm_eps: Epsilon = 1e-12


@dataclasses.dataclass(frozen=True)
class BlipConfig:
    """Both encoders, and the widths of the head's layers; by default ImageReward v1.0's."""

    text_config: BlipTextConfig = BlipTextConfig()
    vision_config: BlipVisionConfig = BlipVisionConfig()
    head: Widths = HEAD_WIDTHS

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "BlipConfig":
        """From ``dataclasses.asdict`` of this class, or from ImageReward's ``med_config.json``, which is a BERT's and
        says nothing of the vision tower (its ``encoder_width`` is not the one in use). Raises ValueError."""
        text = config.get("text_config", config)
        if "vision_config" not in config and "vocab_size" not in config:
            raise ValueError("BLIP config: expected ImageReward's med_config.json")
        vision = pick(BlipVisionConfig, config.get("vision_config", {}), "BLIP vision config")
        if vision.image_size % vision.patch_size:
            raise ValueError(
                f"BLIP vision config: image_size={vision.image_size} is not a multiple of patch_size="
                f"{vision.patch_size}"
            )
        head = schema.take(cls, {"head": config.get("head", HEAD_WIDTHS)}, "BLIP config")["head"]
        return cls(pick(BlipTextConfig, text, "BLIP text config"), vision, head)


class BlipVision(nnx.Module):
    """Vision transformer with a class token."""

    def __init__(self, config: BlipVisionConfig, compute: Compute, *, rngs: nnx.Rngs):
        width, patch, init = config.hidden_size, config.patch_size, nnx.initializers.normal(0.02)
        self.compute = compute
        self.patch_embedding = PatchEmbedding(config.image_size, patch, width, True, compute, rngs=rngs)
        self.class_embedding = parameter(init, (width,), compute, rngs)
        self.position_embedding = parameter(init, (config.tokens, width), compute, rngs)
        self.blocks = stack(lambda r: TowerBlock(config, compute, rngs=r), config.num_hidden_layers, rngs)
        self.norm_out = layer_norm(width, config.layer_norm_eps, rngs)

    def __call__(self, pixels: jax.Array) -> jax.Array:
        """Normalised pixels [B, S, S, 3] -> [B, N, D] in ``compute.dtype``, the class token first."""
        dtype, x = self.compute.dtype, self.patch_embedding(pixels)
        first = jnp.broadcast_to(self.class_embedding[...].astype(dtype), (len(x), 1, x.shape[-1]))
        x = jnp.concatenate([first, x], axis=1) + self.position_embedding[...].astype(dtype)
        return self.norm_out(scan_blocks(self.blocks, x, self.compute)).astype(dtype)


class BlipTextBlock(nnx.Module):
    """Post-norm block of a BERT that looks at a picture: words to words, words to picture, MLP."""

    def __init__(self, config: BlipTextConfig, image_width: int, compute: Compute, *, rngs: nnx.Rngs):
        width, layers, eps = config.hidden_size, config.num_hidden_layers, config.layer_norm_eps
        heads, self.compute = config.num_attention_heads, compute
        self.self_attn = TowerAttention(width, heads, layers, compute, rngs=rngs)
        self.norm1 = layer_norm(width, eps, rngs)
        self.cross_attn = TowerAttention(width, heads, layers, compute, rngs=rngs, source=image_width)
        self.norm2 = layer_norm(width, eps, rngs)
        self.mlp = TowerMlp(config, compute, rngs=rngs)
        self.norm3 = layer_norm(width, eps, rngs)

    def __call__(self, x: jax.Array, mask: jax.Array, image: jax.Array) -> jax.Array:
        """[B, T, D], mask [B, T] of words, picture [B, N, E] -> [B, T, D] in ``compute.dtype``."""
        x = self.compute.constrain(x, "tokens")
        x = self.norm1(x + self.self_attn(x, key_mask=mask)).astype(x.dtype)
        x = self.norm2(x + self.cross_attn(x, image)).astype(x.dtype)
        x = self.norm3(x + self.mlp(x)).astype(x.dtype)
        return self.compute.constrain(x, "tokens")


class BlipText(nnx.Module):
    """BERT without token types, with cross-attention to a picture in every layer."""

    def __init__(self, config: BlipTextConfig, image_width: int, compute: Compute, *, rngs: nnx.Rngs):
        width, init = config.hidden_size, nnx.initializers.normal(0.02)
        self.config, self.compute = config, compute
        self.token_embedding = parameter(init, (config.vocab_size, width), compute, rngs)
        self.position_embedding = parameter(init, (config.max_position_embeddings, width), compute, rngs)
        self.norm_in = layer_norm(width, config.layer_norm_eps, rngs)
        self.blocks = stack(
            lambda r: BlipTextBlock(config, image_width, compute, rngs=r), config.num_hidden_layers, rngs
        )

    def embed(self, ids: jax.Array) -> jax.Array:
        """[B, T] ids -> [B, T, D] in ``compute.dtype``. Raises ValueError if T exceeds the position table."""
        if ids.shape[1] > self.config.max_position_embeddings:
            raise ValueError(
                f"BLIP text: {ids.shape[1]} tokens exceed max_position_embeddings={self.config.max_position_embeddings}"
            )
        dtype = self.compute.dtype
        x = self.token_embedding[...][ids].astype(dtype) + self.position_embedding[: ids.shape[1]].astype(dtype)
        return self.norm_in(x).astype(dtype)

    def __call__(self, words: jax.Array, mask: jax.Array, image: jax.Array) -> jax.Array:
        """Embedded words [B, T, D], their boolean mask [B, T], picture [B, N, E] -> [B, T, D] in ``compute.dtype``."""
        return scan_blocks(self.blocks, words, self.compute, lambda block, x, _: block(x, mask, image))


class Blip(nnx.Module):
    """Both encoders and the head."""

    RULES = (
        *BLOCK_RULES,
        (r"text\.token_embedding", P(None, "fsdp")),
        (r"vision\.patch_embedding\.kernel|head\..*kernel", P()),
        (r".*(bias|scale|class_embedding|position_embedding)", P()),
    )
    MAY_STAY_WHOLE = MAY_STAY_WHOLE

    def __init__(self, config: BlipConfig, compute: Compute, *, rngs: nnx.Rngs):
        text, vision = config.text_config, config.vision_config
        self.vision = BlipVision(vision, compute, rngs=rngs)
        self.text = BlipText(text, vision.hidden_size, compute, rngs=rngs)
        self.head = ScoreHead(text.hidden_size, config.head, rngs=rngs)

    def __call__(self, words: jax.Array, mask: jax.Array, image: jax.Array) -> jax.Array:
        """Words by ``text.embed`` [B, T, D], their boolean mask [B, T], picture by ``vision`` [B, N, E] -> score [B],
        float32."""
        return self.head(self.text(words, mask, image)[:, 0])
