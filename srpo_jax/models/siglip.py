"""SigLIP's vision tower (Zhai et al., arXiv 2303.15343): a vision transformer; attention gathers its feature."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from srpo_jax.models.compute import Compute
from srpo_jax.models.stack import scan_blocks, stack
from srpo_jax.models.tower import PatchEmbedding, TowerAttention, TowerBlock, TowerMlp, layer_norm, parameter, pick
from srpo_jax.schema import Epsilon, Layers, Side, Size


@dataclasses.dataclass(frozen=True)
class SiglipVisionConfig:
    """Names and defaults of HF's ``SiglipVisionConfig``; ``image_size`` and ``patch_size`` in pixels."""

    hidden_size: Size = 768
    intermediate_size: Size = 3072
    num_hidden_layers: Layers = 12
    num_attention_heads: Size = 12
    image_size: Side = 224
    patch_size: Side = 16
    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: Epsilon = 1e-6

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "SiglipVisionConfig":
        """From the ``vision_config`` of a ``SiglipModel``. Raises ValueError for what this module does not compute."""
        picked = pick(cls, config, "SigLIP vision config")
        if picked.patch_size > picked.image_size:
            raise ValueError(
                f"SigLIP vision config: patch_size={picked.patch_size} is larger than image_size={picked.image_size}"
            )
        if config.get("num_channels", 3) != 3:
            raise ValueError(f"SigLIP vision config: num_channels={config['num_channels']} is not supported")
        return picked


SO400M_14_384 = SiglipVisionConfig(1152, 4304, 27, 16, 384, 14)


class SiglipPooling(nnx.Module):
    """A learnt query attends to all tokens; a residual MLP follows."""

    def __init__(self, config: SiglipVisionConfig, compute: Compute, *, rngs: nnx.Rngs):
        width = config.hidden_size
        self.compute = compute
        self.probe = parameter(nnx.initializers.normal(0.02), (width,), compute, rngs)
        self.attn = TowerAttention(width, config.num_attention_heads, config.num_hidden_layers, compute, rngs=rngs)
        self.norm = layer_norm(width, config.layer_norm_eps, rngs)
        self.mlp = TowerMlp(config, compute, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, N, D] -> [B, D] in ``compute.dtype``."""
        query = jnp.broadcast_to(self.probe[...].astype(x.dtype), (len(x), 1, x.shape[-1]))
        x = self.attn(query, x)
        return (x + self.mlp(self.norm(x).astype(x.dtype)))[:, 0]


class SiglipVision(nnx.Module):
    """Pixels to one feature."""

    def __init__(self, config: SiglipVisionConfig, compute: Compute, *, rngs: nnx.Rngs):
        width, patch = config.hidden_size, config.patch_size
        self.compute = compute
        self.patch_embedding = PatchEmbedding(config.image_size, patch, width, True, compute, rngs=rngs)
        shape = ((config.image_size // patch) ** 2, width)
        self.position_embedding = parameter(nnx.initializers.normal(width**-0.5), shape, compute, rngs)
        self.blocks = stack(lambda r: TowerBlock(config, compute, rngs=r), config.num_hidden_layers, rngs)
        self.norm_out = layer_norm(width, config.layer_norm_eps, rngs)
        self.pooling = SiglipPooling(config, compute, rngs=rngs)

    def __call__(self, pixels: jax.Array) -> jax.Array:
        """Pixels [B, S, S, 3] in [-1, 1] -> [B, D] float32, not normalised. Raises ValueError unless S = image_size."""
        dtype = self.compute.dtype
        x = self.patch_embedding(pixels) + self.position_embedding[...].astype(dtype)
        x = self.norm_out(scan_blocks(self.blocks, x, self.compute)).astype(dtype)
        return self.pooling(x).astype(jnp.float32)
