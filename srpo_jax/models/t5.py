"""T5 v1.1's encoder (Raffel et al., arXiv 1910.10683; gated GELU: Shazeer, arXiv 2002.05202), FLUX's text encoder.

What is unlike other transformers: attention logits are not divided by sqrt(d); positions enter only as a bias of the
logits, learnt per head and bucket of distance, one table for all layers; norms have a scale alone; nothing has a bias.
FLUX gives no attention mask: padding (id 0) is text like any other. float16 overflows here, bfloat16 does not.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P

from srpo_jax import schema
from srpo_jax.models.activation import gelu
from srpo_jax.models.attention import attention
from srpo_jax.models.compute import Compute
from srpo_jax.models.stack import scan_blocks, stack
from srpo_jax.schema import LARGEST_SIZE, Epsilon, Layers, Range, Size


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Names of HF's ``T5Config``; XXL has d_model 4096, d_kv 64, 64 heads, d_ff 10240, 24 layers."""

    vocab_size: Size
    d_model: Size
    d_kv: Size
    d_ff: Size
    num_layers: Layers
    num_heads: Size
    relative_attention_num_buckets: Annotated[int, Range(4, 65536)] = 32
    relative_attention_max_distance: Annotated[int, Range(2, 2**20)] = 128  # absent in older files
    layer_norm_epsilon: Epsilon = 1e-6

    def __post_init__(self):
        if self.num_heads * self.d_kv > LARGEST_SIZE:
            raise ValueError(f"T5 config: {self.num_heads} heads of {self.d_kv} are wider than {LARGEST_SIZE}")
        if self.relative_attention_max_distance <= self.relative_attention_num_buckets // 4:
            raise ValueError(
                f"T5 config: relative_attention_max_distance={self.relative_attention_max_distance} must be larger "
                f"than a quarter of relative_attention_num_buckets={self.relative_attention_num_buckets}"
            )

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "T5Config":
        """From a T5 config.json. Raises ValueError for a missing key and for a feed-forward other than v1.1's."""
        found = schema.read(cls, config, "T5 config")
        feed_forward = config.get("feed_forward_proj", "gated-gelu")
        if feed_forward != "gated-gelu":
            raise ValueError(f"T5 config: feed_forward_proj={feed_forward!r} is not supported; expected 'gated-gelu'")
        return found


def distance_buckets(length: int, buckets: int, max_distance: int) -> np.ndarray:
    """The bucket of every (query, key) pair, [T, T] int32 (T5's bidirectional relative positions).

    Half of the buckets are for keys after the query. In each half, small distances have a bucket each; from its middle
    on, buckets widen logarithmically up to ``max_distance``, and the last one takes all that is farther.
    """
    distance = np.arange(length)[None, :] - np.arange(length)[:, None]
    half = buckets // 2
    exact = half // 2
    # float32 throughout: so the borders fall where they were when the models learnt.
    far = np.maximum(np.abs(distance), 1).astype(np.float32)
    slope = np.float32(math.log(max_distance / exact))
    steps = np.log(far / np.float32(exact)) / slope * np.float32(half - exact)
    far = np.minimum(exact + steps.astype(np.int32), half - 1)
    near = np.abs(distance)
    return (np.where(distance > 0, half, 0) + np.where(near < exact, near, far)).astype(np.int32)


def _linear(n_in: int, n_out: int, std: float, compute: Compute, rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(
        n_in,
        n_out,
        use_bias=False,
        kernel_init=nnx.initializers.normal(std),
        dtype=compute.dtype,
        param_dtype=compute.param_dtype,
        rngs=rngs,
    )


def _norm(config: T5Config, rngs: nnx.Rngs) -> nnx.RMSNorm:
    """x / rms(x) * scale, in float32 whatever the input."""
    return nnx.RMSNorm(
        config.d_model,
        epsilon=config.layer_norm_epsilon,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        rngs=rngs,
    )


class T5Attention(nnx.Module):
    """Self-attention with a given bias of the logits; the heads' joint width need not be the model's."""

    def __init__(self, config: T5Config, compute: Compute, *, rngs: nnx.Rngs):
        width, inner = config.d_model, config.num_heads * config.d_kv
        self.config, self.compute = config, compute
        self.q = _linear(width, inner, (width * config.d_kv) ** -0.5, compute, rngs)  # takes the place of 1 / sqrt(d)
        self.k = _linear(width, inner, width**-0.5, compute, rngs)
        self.v = _linear(width, inner, width**-0.5, compute, rngs)
        self.proj = _linear(inner, width, inner**-0.5, compute, rngs)

    def __call__(self, x: jax.Array, bias: jax.Array) -> jax.Array:
        """[B, T, D], bias [1, H, T, T] -> [B, T, D]."""
        split = (*x.shape[:2], self.config.num_heads, self.config.d_kv)
        q, k, v = (self.compute.constrain(f(x).reshape(split), "heads") for f in (self.q, self.k, self.v))
        # Whatever Compute.attention says: the other backends take no learnt bias, or none on every device.
        out = attention(q, k, v, backend="xla", scale=1.0, bias=bias)
        return self.proj(out.reshape(*x.shape[:2], -1))


class T5Mlp(nnx.Module):
    """Gated tanh-GELU: ``down(gelu(gate(x)) * up(x))``."""

    def __init__(self, config: T5Config, compute: Compute, *, rngs: nnx.Rngs):
        width, hidden = config.d_model, config.d_ff
        self.gate = _linear(width, hidden, width**-0.5, compute, rngs)
        self.up = _linear(width, hidden, width**-0.5, compute, rngs)
        self.down = _linear(hidden, width, hidden**-0.5, compute, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, T, D] -> [B, T, D]."""
        return self.down(gelu(self.gate(x)) * self.up(x))


class T5Block(nnx.Module):
    """Pre-norm attention and feed-forward."""

    def __init__(self, config: T5Config, compute: Compute, *, rngs: nnx.Rngs):
        self.compute = compute
        self.norm1 = _norm(config, rngs)
        self.attn = T5Attention(config, compute, rngs=rngs)
        self.norm2 = _norm(config, rngs)
        self.mlp = T5Mlp(config, compute, rngs=rngs)

    def __call__(self, x: jax.Array, bias: jax.Array) -> jax.Array:
        """[B, T, D], bias [1, H, T, T] -> [B, T, D] in ``compute.dtype``."""
        x = self.compute.constrain(x, "tokens")
        x = x + self.attn(self.norm1(x).astype(x.dtype), bias)
        x = x + self.mlp(self.norm2(x).astype(x.dtype))
        return self.compute.constrain(x, "tokens")


class T5Encoder(nnx.Module):
    """Token ids to one vector per token."""

    # How the parameters lie on a mesh, see ``sharding``.
    RULES = (
        (r"blocks\.attn\.[qkv]\.kernel", P(None, "fsdp", "tensor")),
        (r"blocks\.mlp\.(gate|up)\.kernel", P(None, "fsdp", "tensor")),
        (r"blocks\.(attn\.proj|mlp\.down)\.kernel", P(None, "tensor", "fsdp")),
        (r"token_embedding", P(None, "fsdp")),
        (r"relative_bias\.embedding|.*scale", P()),
    )
    MAY_STAY_WHOLE = r"blocks\.attn\..*"

    def __init__(self, config: T5Config, compute: Compute, *, rngs: nnx.Rngs):
        self.config, self.compute = config, compute
        normal, dtype = nnx.initializers.normal, compute.param_dtype
        self.token_embedding = nnx.Param(normal(1.0)(rngs.params(), (config.vocab_size, config.d_model), dtype))
        table = (config.relative_attention_num_buckets, config.num_heads)
        self.relative_bias = nnx.Dict(
            embedding=nnx.Param(normal(config.d_model**-0.5)(rngs.params(), table, jnp.float32)),
        )
        self.blocks = stack(lambda r: T5Block(config, compute, rngs=r), config.num_layers, rngs)
        self.norm_out = _norm(config, rngs)

    def __call__(self, ids: jax.Array) -> jax.Array:
        """[B, T] token ids -> [B, T, D] in ``compute.dtype``. Every token attends to every token."""
        config, dtype = self.config, self.compute.dtype
        buckets = distance_buckets(
            ids.shape[1], config.relative_attention_num_buckets, config.relative_attention_max_distance
        )
        bias = self.relative_bias["embedding"][...].astype(jnp.float32)[buckets].transpose(2, 0, 1)[None]
        x = self.token_embedding[...][ids].astype(dtype)
        x = scan_blocks(self.blocks, x, self.compute, lambda block, x, _: block(x, bias))
        return self.norm_out(x).astype(dtype)
