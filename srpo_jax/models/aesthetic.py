"""Aesthetic predictors: a vision tower, of a CLIP (LAION's) or a SigLIP (V2.5), and an affine head for its feature,
which is brought to unit norm first. The towers are the published ones, unchanged; only the heads were trained.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from flax import nnx
from jax.sharding import PartitionSpec as P

from srpo_jax import schema
from srpo_jax.models.clip import ClipVisionConfig, ClipVisionTower
from srpo_jax.models.compute import Compute
from srpo_jax.models.siglip import SO400M_14_384, SiglipVision, SiglipVisionConfig
from srpo_jax.models.tower import BLOCK_RULES, HEAD_WIDTHS, MAY_STAY_WHOLE, ScoreHead
from srpo_jax.schema import Size, Widths

OTHERS = (
    (r".*patch_embedding\.kernel|head\..*kernel", P()),
    (r".*(bias|scale|_embedding)", P()),
)


@dataclasses.dataclass(frozen=True)
class ClipAestheticConfig:
    """LAION's predictor v2; by default of OpenAI's CLIP ViT-L/14.

    Attributes:
      vision_config, projection_dim: of the CLIP.
      head: widths of the head's layers.
    """

    vision_config: ClipVisionConfig = ClipVisionConfig(1024, 4096, 24, 16, 224, 14)
    projection_dim: Size = 768
    head: Widths = HEAD_WIDTHS

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "ClipAestheticConfig":
        """From a HF ``CLIPModel``'s config.json or ``dataclasses.asdict`` of this class. Raises ValueError, also for a
        CLIP that is not OpenAI's, as the activation tells: its features would look right and mean nothing."""
        vision = config.get("vision_config_dict") or config.get("vision_config")
        if vision is None:
            raise ValueError("CLIP config: 'vision_config' is missing; expected the config.json of a CLIPModel")
        vision = ClipVisionConfig.from_dict(vision)
        if vision.hidden_act != "quick_gelu":
            raise ValueError(
                f"hidden_act={vision.hidden_act!r}: LAION's aesthetic predictor reads OpenAI's CLIP (quick_gelu), "
                "openai/clip-vit-large-patch14"
            )
        rest = {name: value for name, value in config.items() if name != "vision_config"}
        return cls(vision, **schema.take(cls, rest, "CLIP config"))


@dataclasses.dataclass(frozen=True)
class SiglipAestheticConfig:
    """Aesthetic Predictor V2.5; by default of SigLIP so400m/14 at 384 pixels. ``head``: widths of its layers."""

    vision_config: SiglipVisionConfig = SO400M_14_384
    head: Widths = HEAD_WIDTHS

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "SiglipAestheticConfig":
        """From a HF ``SiglipModel``'s config.json or ``dataclasses.asdict`` of this class. Raises ValueError."""
        if "vision_config" not in config:
            raise ValueError("SigLIP config: 'vision_config' is missing; expected the config.json of a SiglipModel")
        vision = SiglipVisionConfig.from_dict(config["vision_config"])
        return cls(**schema.take(cls, config, "SigLIP config") | {"vision_config": vision})


class ClipAesthetic(nnx.Module):
    """A CLIP's vision tower with its projection, and the head."""

    RULES = (*BLOCK_RULES, (r"vision\.projection\.kernel", P("fsdp", None)), *OTHERS)
    MAY_STAY_WHOLE = MAY_STAY_WHOLE

    def __init__(self, config: ClipAestheticConfig, compute: Compute, *, rngs: nnx.Rngs):
        self.vision = ClipVisionTower(config.vision_config, config.projection_dim, compute, rngs=rngs)
        self.head = ScoreHead(config.projection_dim, config.head, rngs=rngs)


class SiglipAesthetic(nnx.Module):
    """A SigLIP's vision tower, and the head."""

    RULES = (
        *BLOCK_RULES,
        (r"vision\.pooling\..*kernel", P("fsdp", None)),
        (r"vision\.pooling\.probe", P()),
        *OTHERS,
    )
    MAY_STAY_WHOLE = MAY_STAY_WHOLE
    UNEVEN = r"vision\..*"  # 1152 and 4304 have few divisors

    def __init__(self, config: SiglipAestheticConfig, compute: Compute, *, rngs: nnx.Rngs):
        self.vision = SiglipVision(config.vision_config, compute, rngs=rngs)
        self.head = ScoreHead(config.vision_config.hidden_size, config.head, rngs=rngs)
