"""CLIP: a text and a vision transformer with a common embedding space (Radford et al., arXiv 2103.00020).

One module serves the rewards (HPS-v2.1, PickScore, CLIP: ViT-H-14) and, by its text tower alone (``ClipText``), FLUX's
pooled text embedding. Both towers are pre-norm transformers; every layer norm is computed in float32.
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
    MAY_STAY_WHOLE,
    PatchEmbedding,
    TowerBlock,
    checked,
    layer_norm,
    linear,
    parameter,
    pick,
)
from srpo_jax.schema import LARGEST_SIZE, Epsilon, Layers, Range, Side, Size

# Where older files keep a wrong end-of-text id (2), their models take the feature at the largest id of the sequence.
LEGACY_EOS_TOKEN_ID = 2

# How the parameters lie on a mesh, see ``sharding``.
RULES = (
    *BLOCK_RULES,
    (r".*token_embedding", P(None, "fsdp")),
    (r".*projection\.kernel", P("fsdp", None)),
    (r"vision\.patch_embedding\.kernel", P()),
    (r".*(bias|scale|class_embedding|position_embedding)", P()),
)


@dataclasses.dataclass(frozen=True)
class ClipTextConfig:
    """Text tower; names and defaults of HF's ``CLIPTextConfig``."""

    vocab_size: Size = 49408
    hidden_size: Size = 512
    intermediate_size: Size = 2048
    num_hidden_layers: Layers = 12
    num_attention_heads: Size = 8
    max_position_embeddings: Annotated[int, Range(2, LARGEST_SIZE)] = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: Epsilon = 1e-5
    eos_token_id: int = 49407

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "ClipTextConfig":
        """From the config.json of a ``CLIPTextModel`` or the ``text_config`` of a ``CLIPModel``. Raises ValueError."""
        return pick(cls, config, "CLIP text config")

    @property
    def end_rule(self) -> str:
        """Which rule finds the end token, "argmax" or "eos": see ``end_positions``."""
        return "argmax" if self.eos_token_id == LEGACY_EOS_TOKEN_ID else "eos"


@dataclasses.dataclass(frozen=True)
class ClipVisionConfig:
    """Vision tower; names and defaults of HF's ``CLIPVisionConfig``. ``image_size`` and ``patch_size`` in pixels."""

    hidden_size: Size = 768
    intermediate_size: Size = 3072
    num_hidden_layers: Layers = 12
    num_attention_heads: Size = 12
    image_size: Side = 224
    patch_size: Side = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: Epsilon = 1e-5

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "ClipVisionConfig":
        """From the ``vision_config`` of a ``CLIPModel``. Raises ValueError for what this module does not compute."""
        picked = pick(cls, config, "CLIP vision config")
        if config.get("num_channels", 3) != 3:
            raise ValueError(f"CLIP vision config: num_channels={config['num_channels']} is not supported; expected 3")
        if picked.image_size % picked.patch_size:
            raise ValueError(
                f"CLIP vision config: image_size={picked.image_size} is not a multiple of "
                f"patch_size={picked.patch_size}"
            )
        return picked


@dataclasses.dataclass(frozen=True)
class ClipConfig:
    """Both towers and the width of their common space; names and defaults of HF's ``CLIPConfig``."""

    text_config: ClipTextConfig = ClipTextConfig()
    vision_config: ClipVisionConfig = ClipVisionConfig()
    projection_dim: Size = 512

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "ClipConfig":
        """From the config.json of a HF ``CLIPModel`` (or ``dataclasses.asdict`` of this class). Raises ValueError.

        Old files have ``text_config_dict`` and ``vision_config_dict``; where present these decide, as in transformers.
        """
        towers = {}
        for name in ("text_config", "vision_config"):
            tower = config.get(f"{name}_dict") or config.get(name)
            if tower is None:
                raise ValueError(f"CLIP config: {name!r} is missing; expected the config.json of a CLIPModel")
            towers[name] = tower
        text = ClipTextConfig.from_dict(towers["text_config"])
        vision = ClipVisionConfig.from_dict(towers["vision_config"])
        rest = {name: value for name, value in config.items() if name not in towers}
        return cls(text, vision, **schema.take(cls, rest, "CLIP config"))

    @classmethod
    def from_open_clip(cls, config: Mapping[str, Any]) -> "ClipConfig":
        """From an ``open_clip_config.json`` (its ``model_cfg``, or the whole file). Raises ValueError.

        Only the plain ViT family is computed here; a config that asks for anything else (another tower, pooling, layer
        scale) is refused by the name of its key.
        """
        config = config.get("model_cfg", config)
        whole = schema.read(_OpenClip, config, "open_clip config")
        vision = schema.read(_OpenClipVision, whole.vision_cfg, "open_clip config: vision_cfg")
        text = schema.read(_OpenClipText, whole.text_cfg, "open_clip config: text_cfg")
        for part, taken in ((config, whole), (whole.vision_cfg, vision), (whole.text_cfg, text)):
            for key in sorted(part.keys() - dataclasses.asdict(taken).keys()):
                if part[key]:
                    raise ValueError(f"open_clip config: {key}={schema.shown(part[key])} is not supported")
        if vision.width % vision.head_width:
            raise ValueError(f"open_clip config: head_width={vision.head_width} does not divide width={vision.width}")
        act = "quick_gelu" if whole.quick_gelu else "gelu"
        return cls(
            text_config=checked(
                ClipTextConfig(
                    vocab_size=text.vocab_size,
                    hidden_size=text.width,
                    intermediate_size=int(text.width * text.mlp_ratio),
                    num_hidden_layers=text.layers,
                    num_attention_heads=text.heads,
                    max_position_embeddings=text.context_length,
                    hidden_act=act,
                    eos_token_id=LEGACY_EOS_TOKEN_ID,  # open_clip takes the largest id
                ),
                "open_clip config: text_cfg",
            ),
            vision_config=checked(
                ClipVisionConfig(
                    hidden_size=vision.width,
                    intermediate_size=int(vision.width * vision.mlp_ratio),
                    num_hidden_layers=vision.layers,
                    num_attention_heads=vision.width // vision.head_width,
                    image_size=vision.image_size,
                    patch_size=vision.patch_size,
                    hidden_act=act,
                ),
                "open_clip config: vision_cfg",
            ),
            projection_dim=whole.embed_dim,
        )


_Ratio = Annotated[float, Range(1 / 64, 64)]


@dataclasses.dataclass(frozen=True)
class _OpenClip:
    """What is read of open_clip's ``model_cfg``."""

    embed_dim: Size
    vision_cfg: dict[str, Any]
    text_cfg: dict[str, Any]
    quick_gelu: bool = False


@dataclasses.dataclass(frozen=True)
class _OpenClipVision:
    """Names and defaults of open_clip's ``CLIPVisionCfg``."""

    width: Size = 768
    layers: Layers = 12
    head_width: Size = 64
    mlp_ratio: _Ratio = 4.0
    image_size: Side = 224
    patch_size: Side = 16


@dataclasses.dataclass(frozen=True)
class _OpenClipText:
    """Names and defaults of open_clip's ``CLIPTextCfg``."""

    context_length: Annotated[int, Range(2, LARGEST_SIZE)] = 77
    vocab_size: Size = 49408
    width: Size = 512
    heads: Size = 8
    layers: Layers = 12
    mlp_ratio: _Ratio = 4.0


# HPS-v2.1 is a bare state dict without a config: it is open_clip's ViT-H-14.
VIT_H_14 = ClipConfig.from_open_clip(
    {
        "embed_dim": 1024,
        "vision_cfg": {"image_size": 224, "layers": 32, "width": 1280, "head_width": 80, "patch_size": 14},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 1024, "heads": 16, "layers": 24},
    }
)


def end_positions(ids: jax.Array, rule: str, eos_token_id: int) -> jax.Array:
    """Where each text's feature is read.

    Args:
      ids: [B, T] integer token ids.
      rule: "argmax" (position of the largest id, which is end-of-text in OpenAI's vocabulary: open_clip, and HF files
        whose config has the legacy ``eos_token_id`` 2) or "eos" (first position of ``eos_token_id``; 0 if it does not
        occur).
      eos_token_id: used by "eos" alone.

    Returns:
      [B] int32. Raises ValueError for another rule.
    """
    if rule == "argmax":
        return jnp.argmax(ids, axis=-1).astype(jnp.int32)
    if rule == "eos":
        return jnp.argmax(ids == eos_token_id, axis=-1).astype(jnp.int32)
    raise ValueError(f"end_rule={rule!r} is unknown; choose argmax or eos")


class ClipTextTower(nnx.Module):
    """Causal text transformer; its feature is the final norm's output at the end of text, perhaps projected."""

    def __init__(self, config: ClipTextConfig, projection_dim: int | None, compute: Compute, *, rngs: nnx.Rngs):
        width = config.hidden_size
        self.config, self.compute = config, compute
        init = nnx.initializers.normal
        self.token_embedding = parameter(init(0.02), (config.vocab_size, width), compute, rngs)
        self.position_embedding = parameter(init(0.01), (config.max_position_embeddings, width), compute, rngs)
        self.blocks = stack(lambda r: TowerBlock(config, compute, rngs=r, causal=True), config.num_hidden_layers, rngs)
        self.norm_out = layer_norm(width, config.layer_norm_eps, rngs)
        if projection_dim is not None:
            self.projection = linear(width, projection_dim, compute, rngs, std=width**-0.5, bias=False)

    def hidden(self, ids: jax.Array) -> jax.Array:
        """[B, T] ids -> [B, T, D] float32, after the final norm. Raises ValueError if T exceeds the position table."""
        if ids.shape[1] > self.config.max_position_embeddings:
            raise ValueError(
                f"CLIP text: {ids.shape[1]} tokens exceed max_position_embeddings={self.config.max_position_embeddings}"
            )
        dtype = self.compute.dtype
        x = self.token_embedding[...][ids].astype(dtype) + self.position_embedding[: ids.shape[1]].astype(dtype)
        return self.norm_out(scan_blocks(self.blocks, x, self.compute))

    def __call__(self, ids: jax.Array, end_rule: str | None = None) -> jax.Array:
        """[B, T] ids -> [B, D] or, if projected, [B, E]; float32, not normalised. ``end_rule`` None: the config's."""
        hidden = self.hidden(ids)
        position = end_positions(ids, end_rule or self.config.end_rule, self.config.eos_token_id)
        pooled = jnp.take_along_axis(hidden, position[:, None, None], axis=1)[:, 0]
        if hasattr(self, "projection"):
            pooled = self.projection(pooled).astype(jnp.float32)
        return pooled


class ClipVisionTower(nnx.Module):
    """Vision transformer with a class token, pre-norm on the embeddings, and a projection."""

    def __init__(self, config: ClipVisionConfig, projection_dim: int, compute: Compute, *, rngs: nnx.Rngs):
        width, patch, eps = config.hidden_size, config.patch_size, config.layer_norm_eps
        self.config, self.compute = config, compute
        init, tokens = nnx.initializers.normal, (config.image_size // patch) ** 2 + 1
        self.patch_embedding = PatchEmbedding(config.image_size, patch, width, False, compute, rngs=rngs)
        self.class_embedding = parameter(init(width**-0.5), (width,), compute, rngs)
        self.position_embedding = parameter(init(width**-0.5), (tokens, width), compute, rngs)
        self.norm_in = layer_norm(width, eps, rngs)
        self.blocks = stack(lambda r: TowerBlock(config, compute, rngs=r), config.num_hidden_layers, rngs)
        self.norm_out = layer_norm(width, eps, rngs)
        self.projection = linear(width, projection_dim, compute, rngs, std=width**-0.5, bias=False)

    def __call__(self, pixels: jax.Array) -> jax.Array:
        """Normalised pixels [B, S, S, 3] -> [B, E] float32, not normalised. Raises ValueError unless S = image_size."""
        width, dtype = self.config.hidden_size, self.compute.dtype
        x = self.patch_embedding(pixels)
        first = jnp.broadcast_to(self.class_embedding[...].astype(dtype), (x.shape[0], 1, width))
        x = jnp.concatenate([first, x], axis=1) + self.position_embedding[...].astype(dtype)
        x = scan_blocks(self.blocks, self.norm_in(x).astype(dtype), self.compute)
        return self.projection(self.norm_out(x[:, 0])).astype(jnp.float32)


class ClipText(nnx.Module):
    """The text tower alone, without projection: FLUX's pooled text embedding (HF ``CLIPTextModel``)."""

    RULES, MAY_STAY_WHOLE = RULES, MAY_STAY_WHOLE

    def __init__(self, config: ClipTextConfig, compute: Compute, *, rngs: nnx.Rngs):
        self.text = ClipTextTower(config, None, compute, rngs=rngs)

    def __call__(self, ids: jax.Array, end_rule: str | None = None) -> jax.Array:
        """[B, T] ids -> pooled [B, D] float32."""
        return self.text(ids, end_rule)


class Clip(nnx.Module):
    """Both towers, their projections, and the log of the similarity's scale (HF ``CLIPModel``, open_clip ``CLIP``)."""

    RULES, MAY_STAY_WHOLE = RULES, MAY_STAY_WHOLE

    def __init__(self, config: ClipConfig, compute: Compute, *, rngs: nnx.Rngs):
        self.text = ClipTextTower(config.text_config, config.projection_dim, compute, rngs=rngs)
        self.vision = ClipVisionTower(config.vision_config, config.projection_dim, compute, rngs=rngs)
        self.logit_scale = nnx.Param(jnp.asarray(2.6592, jnp.float32))  # log(1 / 0.07), as CLIP was trained

    def encode_image(self, pixels: jax.Array) -> jax.Array:
        """Normalised pixels [B, S, S, 3] -> [B, E] float32, not normalised to unit length."""
        return self.vision(pixels)

    def encode_text(self, ids: jax.Array, end_rule: str | None = None) -> jax.Array:
        """[B, T] ids -> [B, E] float32, not normalised. ``end_rule``: see ``end_positions``; None: the config's."""
        return self.text(ids, end_rule)
