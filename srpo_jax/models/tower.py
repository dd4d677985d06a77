"""What the towers of CLIP, BLIP and SigLIP have in common: patches, attention, MLP, and the pre-norm block of all.

Norms are computed in float32 whatever the input.
"""

from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from srpo_jax import schema
from srpo_jax.models.activation import gelu
from srpo_jax.models.attention import attention
from srpo_jax.models.compute import Compute

# How the parameters of stacked blocks lie on a mesh, see ``sharding``.
BLOCK_RULES = (
    (r".*blocks\.\w*attn\.[qkv]\.kernel", P(None, "fsdp", "tensor")),
    (r".*blocks\.\w*attn\.[qkv]\.bias", P(None, "tensor")),
    (r".*blocks\.mlp\.in_layer\.kernel", P(None, "fsdp", "tensor")),
    (r".*blocks\.mlp\.in_layer\.bias", P(None, "tensor")),
    (r".*blocks\.(\w*attn\.proj|mlp\.out_layer)\.kernel", P(None, "tensor", "fsdp")),
)
MAY_STAY_WHOLE = r".*blocks\.\w*attn\..*"  # around heads that "tensor" may not divide, as CLIP-L's 12


def quick_gelu(x: jax.Array) -> jax.Array:
    """OpenAI's approximation of GELU: ``x * sigmoid(1.702 x)``."""
    return x * jax.nn.sigmoid(1.702 * x)


def exact_gelu(x: jax.Array) -> jax.Array:
    """GELU by the error function, as open_clip and HF's "gelu" have it: in float32, rounded once."""
    return jax.nn.gelu(x.astype(jnp.float32), approximate=False).astype(x.dtype)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "quick_gelu": quick_gelu,
    "gelu": exact_gelu,
    "gelu_pytorch_tanh": gelu,
}


class TowerConfig(Protocol):
    """What a block reads of a tower's config, by HF's names."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    hidden_act: str
    layer_norm_eps: float


def pick(cls: type, config: Any, where: str) -> Any:
    """A tower's config from the entries of a config.json that are its fields. Absent ones keep the defaults, as HF
    files have it.

    Raises ValueError for a value that is not as ``cls`` declares it or an activation that is not computed here.
    """
    return checked(cls(**schema.take(cls, config, where)), where)


def checked(found: Any, where: str) -> Any:
    """A tower's config whose numbers fit each other. Raises ValueError, also for an activation that is not computed
    here."""
    if found.hidden_act not in ACTIVATIONS:
        raise ValueError(f"{where}: hidden_act={found.hidden_act!r} is not supported; known: {', '.join(ACTIVATIONS)}")
    if found.hidden_size % found.num_attention_heads:
        raise ValueError(
            f"{where}: hidden_size={found.hidden_size} is not a multiple of num_attention_heads="
            f"{found.num_attention_heads}"
        )
    return found


def layer_norm(width: int, eps: float, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """Layer norm in float32 whatever the input. The fast variance E[x^2] - E[x]^2 cancels, so it is off."""
    return nnx.LayerNorm(
        width, epsilon=eps, use_fast_variance=False, dtype=jnp.float32, param_dtype=jnp.float32, rngs=rngs
    )


def linear(n_in: int, n_out: int, compute: Compute, rngs: nnx.Rngs, *, std: float, bias: bool = True) -> nnx.Linear:
    """A dense layer with OpenAI CLIP's normal initialisation."""
    return nnx.Linear(
        n_in,
        n_out,
        use_bias=bias,
        kernel_init=nnx.initializers.normal(std),
        dtype=compute.dtype,
        param_dtype=compute.param_dtype,
        rngs=rngs,
    )


def parameter(init: Callable, shape: tuple[int, ...], compute: Compute, rngs: nnx.Rngs) -> nnx.Param:
    """A parameter of a frozen network."""
    return nnx.Param(init(rngs.params(), shape, compute.param_dtype))


class PatchEmbedding(nnx.Module):
    """A vector for each square patch of a picture. The kernel has the layout of a convolution (HWIO); stride = size
    makes it one product over cut-out patches."""

    def __init__(self, size: int, patch: int, width: int, bias: bool, compute: Compute, *, rngs: nnx.Rngs):
        self.size, self.patch, self.compute = size, patch, compute
        init = nnx.initializers.normal((3 * patch * patch) ** -0.5)
        self.kernel = parameter(init, (patch, patch, 3, width), compute, rngs)
        if bias:
            self.bias = parameter(nnx.initializers.zeros, (width,), compute, rngs)

    def __call__(self, pixels: jax.Array) -> jax.Array:
        """Pixels [B, S, S, 3] -> [B, N, D], row by row; pixels on the right and below that fill no patch are left out.

        Raises ValueError unless S is the size that the tower was made for.
        """
        size, patch, dtype = self.size, self.patch, self.compute.dtype
        if pixels.shape[1:] != (size, size, 3):
            raise ValueError(f"expected pixels [B, {size}, {size}, 3], got {pixels.shape}")
        pixels = self.compute.constrain(pixels.astype(dtype), "image")
        batch, side = pixels.shape[0], size // patch
        pixels = pixels[:, : side * patch, : side * patch]
        patches = pixels.reshape(batch, side, patch, side, patch, 3).transpose(0, 1, 3, 2, 4, 5)
        patches = patches.reshape(batch, side * side, patch * patch * 3)
        x = patches @ self.kernel[...].astype(dtype).reshape(patches.shape[-1], -1)
        return x + self.bias[...].astype(dtype) if hasattr(self, "bias") else x


class TowerAttention(nnx.Module):
    """Multi-head attention with biases, of tokens to themselves or to others of ``source`` features."""

    def __init__(
        self,
        width: int,
        heads: int,
        layers: int,
        compute: Compute,
        *,
        rngs: nnx.Rngs,
        causal: bool = False,
        source: int | None = None,
    ):
        if width % heads:
            raise ValueError(f"hidden_size={width} is not a multiple of num_attention_heads={heads}")
        self.heads, self.causal, self.compute = heads, causal, compute
        source = source or width
        self.q = linear(width, width, compute, rngs, std=width**-0.5)
        self.k = linear(source, width, compute, rngs, std=source**-0.5)
        self.v = linear(source, width, compute, rngs, std=source**-0.5)
        self.proj = linear(width, width, compute, rngs, std=width**-0.5 * (2 * layers) ** -0.5)

    def __call__(self, x: jax.Array, others: jax.Array | None = None, key_mask: jax.Array | None = None) -> jax.Array:
        """[B, T, D], others [B, S, E] or None for x itself, mask [B, S] of the keys that are seen -> [B, T, D]."""
        others = x if others is None else others

        def heads(of: jax.Array) -> jax.Array:
            split = of.reshape(*of.shape[:2], self.heads, of.shape[2] // self.heads)
            return self.compute.constrain(split, "heads")

        q, k, v = heads(self.q(x)), heads(self.k(others)), heads(self.v(others))
        out = attention(
            q, k, v, backend=self.compute.attention, causal=self.causal, key_mask=key_mask, mesh=self.compute.mesh
        )
        return self.proj(out.reshape(x.shape))


class TowerMlp(nnx.Module):
    """Dense, activation, dense."""

    def __init__(self, config: TowerConfig, compute: Compute, *, rngs: nnx.Rngs):
        width, hidden, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
        self.act = ACTIVATIONS[config.hidden_act]
        self.in_layer = linear(width, hidden, compute, rngs, std=(2 * width) ** -0.5)
        self.out_layer = linear(hidden, width, compute, rngs, std=width**-0.5 * (2 * layers) ** -0.5)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, T, D] -> [B, T, D]."""
        return self.out_layer(self.act(self.in_layer(x)))


class TowerBlock(nnx.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: TowerConfig, compute: Compute, *, rngs: nnx.Rngs, causal: bool = False):
        width, layers, eps = config.hidden_size, config.num_hidden_layers, config.layer_norm_eps
        self.norm1 = layer_norm(width, eps, rngs)
        self.attn = TowerAttention(width, config.num_attention_heads, layers, compute, rngs=rngs, causal=causal)
        self.norm2 = layer_norm(width, eps, rngs)
        self.mlp = TowerMlp(config, compute, rngs=rngs)
        self.compute = compute

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, T, D] -> [B, T, D] in ``compute.dtype``."""
        x = self.compute.constrain(x, "tokens")
        x = x + self.attn(self.norm1(x).astype(x.dtype))
        x = x + self.mlp(self.norm2(x).astype(x.dtype))
        return self.compute.constrain(x, "tokens")


HEAD_WIDTHS = (1024, 128, 64, 16, 1)  # of every published one


class ScoreHead(nnx.Module):
    """A number from a feature: dense layers in a row with nothing between them, an affine map of the feature.

    ImageReward and the aesthetic predictors were trained so (with dropout between) and are kept layer by layer, so that
    conversion is exact. float32, with products at full precision: what is left of a feature is one number.
    """

    def __init__(self, features: int, widths: tuple[int, ...], *, rngs: nnx.Rngs):
        def dense(n_in: int, n_out: int) -> nnx.Linear:
            init = nnx.initializers.normal(n_in**-0.5)
            highest = jax.lax.Precision.HIGHEST
            return nnx.Linear(
                n_in, n_out, kernel_init=init, dtype=jnp.float32, param_dtype=jnp.float32, precision=highest, rngs=rngs
            )

        self.layers = nnx.List([dense(*pair) for pair in zip((features, *widths), widths, strict=False)])

    def __call__(self, features: jax.Array) -> jax.Array:
        """[B, D] -> [B], float32."""
        x = features.astype(jnp.float32)
        for layer in self.layers:
            x = layer(x)
        return x[:, 0]
