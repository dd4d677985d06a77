"""The FLUX.1 transformer: the velocity field of a rectified flow over packed latents, conditioned on text.

Black Forest Labs published it as weights and code (github.com/black-forest-labs/flux); its blocks are those of MM-DiT
(Esser et al., arXiv 2403.03206), the parallel single-stream blocks those of ViT-22B (arXiv 2302.05442).
Widths in comments: B batch, N image tokens, T text tokens, D model width, H heads of width Dh, D = H * Dh.
"""

import dataclasses
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from srpo_jax import schema
from srpo_jax.models.activation import gelu
from srpo_jax.models.attention import attention
from srpo_jax.models.compute import Compute, keep
from srpo_jax.models.flux_layers import (
    MLP_RATIO,
    TIME_CHANNELS,
    Embedder,
    HeadNorm,
    Linear,
    Mlp,
    add_gated,
    modulate,
    parts_of,
    sinusoid,
)
from srpo_jax.models.rotary import rotary_table, rotate
from srpo_jax.models.stack import map_part, scan_blocks, stack, without
from srpo_jax.schema import LARGEST_SIZE, Range, Size


@dataclasses.dataclass(frozen=True)
class FluxConfig:
    """Sizes, named as in the ``config.json`` of diffusers' ``FluxTransformer2DModel``.

    Attributes:
      in_channels: of a packed token in, 2 * 2 * 16.
      out_channels: of a packed token out.
      num_layers: double-stream blocks.
      num_single_layers: single-stream blocks.
      attention_head_dim: Dh.
      num_attention_heads: H.
      joint_attention_dim: width of the text encoder's tokens.
      pooled_projection_dim: width of the pooled text vector.
      guidance_embeds: whether the guidance scale is an input (FLUX.1-dev) or not (FLUX.1-schnell).
      axes_dims_rope: how many of the Dh channels each of the three position axes rotates; they sum to Dh.
    """

    in_channels: Size
    num_layers: Annotated[int, Range(0, 1024)]
    num_single_layers: Annotated[int, Range(0, 1024)]
    attention_head_dim: Size
    num_attention_heads: Size
    joint_attention_dim: Size
    pooled_projection_dim: Size
    guidance_embeds: bool
    axes_dims_rope: tuple[Size, Size, Size]
    out_channels: Size

    def __post_init__(self):
        if sum(self.axes_dims_rope) != self.attention_head_dim or any(d % 2 for d in self.axes_dims_rope):
            raise ValueError(
                f"axes_dims_rope {self.axes_dims_rope} must be even numbers whose sum is "
                f"attention_head_dim {self.attention_head_dim}"
            )
        if self.width > LARGEST_SIZE:
            raise ValueError(
                f"{self.num_attention_heads} heads of {self.attention_head_dim} are wider than {LARGEST_SIZE}"
            )

    @property
    def width(self) -> int:
        """D, the model's width."""
        return self.num_attention_heads * self.attention_head_dim

    def with_blocks(self, double: int, single: int) -> "FluxConfig":
        """The same widths with other numbers of blocks."""
        return dataclasses.replace(self, num_layers=double, num_single_layers=single)

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> "FluxConfig":
        """Takes what it knows from a ``config.json``. Raises ValueError for a missing key or an unsupported value."""
        if config.get("patch_size", 1) != 1:
            raise ValueError(f"patch_size {config['patch_size']} is not supported; FLUX.1 has 1")
        names = [field.name for field in dataclasses.fields(cls)]
        # What diffusers itself leaves out of older files.
        config = {"axes_dims_rope": (16, 56, 56), **config}
        config["out_channels"] = config.get("out_channels") or config.get("in_channels")
        missing = [name for name in names if config.get(name) is None]
        if missing:
            raise ValueError(f"the transformer's config lacks {', '.join(missing)}")
        values = schema.take(cls, config, "the transformer's config")
        taken, given = values["in_channels"], values["out_channels"]
        if taken != given:
            what = {384: "FLUX.1 Fill", 128: "FLUX.1 Canny or Depth"}.get(
                taken, "a FLUX.1 with more inputs than latents"
            )
            raise ValueError(f"in_channels {taken} and out_channels {given} are {what}'s, which is not supported")
        return cls(**values)


def is_modulation(path: str) -> bool:
    """Whether a layer or a parameter, by its dotted path, makes modulations: it reads one vector a sample."""
    return any(part.endswith("mod") for part in path.split("."))


class Modulations(NamedTuple):
    """The shifts, scales and gates that every block applies to its tokens, for one conditioning vector a sample.

    A quarter of FLUX.1-dev's parameters make them, and read nothing else: they are computed before the blocks run, and
    for a rollout before its first step.

    Attributes:
      img, txt: of the two streams of double blocks, [layers, B, 6 D].
      single: of single blocks, [layers, B, 3 D].
      last: of the norm before the output, [B, 2 D].
    """

    img: jax.Array
    txt: jax.Array
    single: jax.Array
    last: jax.Array


def split_modulation(x: jax.Array, parts: int, compute: Compute) -> list[jax.Array]:
    """The ``parts`` shifts, scales and gates [B, 1, D] of one block's [B, parts * D]."""
    # Constrained, so that no device holds a slice of a gate: XLA's partitioner then wants the product that the gate
    # scales in slices too, and on a mesh of three split axes gives it the samples of other devices.
    return jnp.split(compute.constrain(x[:, None, :], "tokens"), parts, axis=-1)


# --- blocks ---


class StreamAttention(nnx.Module):
    """One stream's projections into and out of the joint attention."""

    def __init__(self, config: FluxConfig, compute: Compute, *, rngs: nnx.Rngs):
        heads, head_dim = config.num_attention_heads, config.attention_head_dim
        self.qkv = Linear(config.width, (3, heads, head_dim), compute, rngs=rngs)
        self.query_norm = HeadNorm(head_dim, compute)
        self.key_norm = HeadNorm(head_dim, compute)
        self.proj = Linear(config.width, config.width, compute, rngs=rngs)

    def queries_keys_values(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """[B, T, D] -> three times [B, T, H, Dh]; queries and keys are normalised."""
        query, key, value = parts_of(keep(self.qkv(x), "qkv"))
        return self.query_norm(query), self.key_norm(key), value


def joint_attention(query, key, value, table, compute: Compute) -> jax.Array:
    """Rotary attention over one sequence: three times [B, T, H, Dh] -> the same."""
    query, key = (rotate(x, table, compute.rotary) for x in (query, key))
    query, key, value = (compute.constrain(x, "heads") for x in (query, key, value))
    out = attention(query, key, value, backend=compute.attention, mesh=compute.mesh)
    return keep(compute.constrain(out, "heads"), "attention")


class DoubleBlock(nnx.Module):
    """Text and image tokens attend jointly, with weights of their own."""

    def __init__(self, config: FluxConfig, compute: Compute, *, rngs: nnx.Rngs):
        self.img_mod = Linear(config.width, 6 * config.width, compute, rngs=rngs)
        self.txt_mod = Linear(config.width, 6 * config.width, compute, rngs=rngs)
        self.img_attn = StreamAttention(config, compute, rngs=rngs)
        self.txt_attn = StreamAttention(config, compute, rngs=rngs)
        self.img_mlp = Mlp(config.width, compute, rngs=rngs)
        self.txt_mlp = Mlp(config.width, compute, rngs=rngs)
        self.compute = compute

    def __call__(
        self, img: jax.Array, txt: jax.Array, img_mod: jax.Array, txt_mod: jax.Array, table
    ) -> tuple[jax.Array, jax.Array]:
        """Both streams [B, .., D] under modulations [B, 6 D], which ``img_mod`` and ``txt_mod`` made before."""
        img_mod, txt_mod = (split_modulation(mod, 6, self.compute) for mod in (img_mod, txt_mod))
        img_shift1, img_scale1, img_gate1, img_shift2, img_scale2, img_gate2 = img_mod
        txt_shift1, txt_scale1, txt_gate1, txt_shift2, txt_scale2, txt_gate2 = txt_mod

        img_qkv = self.img_attn.queries_keys_values(modulate(img, img_shift1, img_scale1))
        txt_qkv = self.txt_attn.queries_keys_values(modulate(txt, txt_shift1, txt_scale1))
        # The joint sequence is text, then image.
        joint = [jnp.concatenate(pair, axis=1) for pair in zip(txt_qkv, img_qkv, strict=True)]
        out = joint_attention(*joint, table, self.compute)
        txt_out, img_out = jnp.split(out, [txt.shape[1]], axis=1)

        img = add_gated(img, img_gate1, keep(self.img_attn.proj(img_out), "out"))
        img = add_gated(img, img_gate2, self.img_mlp(modulate(img, img_shift2, img_scale2)))
        txt = add_gated(txt, txt_gate1, keep(self.txt_attn.proj(txt_out), "out"))
        txt = add_gated(txt, txt_gate2, self.txt_mlp(modulate(txt, txt_shift2, txt_scale2)))
        return img, txt


class SingleBlock(nnx.Module):
    """Attention and MLP in parallel over the joint sequence, read from one norm and written by one projection."""

    def __init__(self, config: FluxConfig, compute: Compute, *, rngs: nnx.Rngs):
        width, heads, head_dim = config.width, config.num_attention_heads, config.attention_head_dim
        self.mod = Linear(width, 3 * width, compute, rngs=rngs)
        self.qkv = Linear(width, (3, heads, head_dim), compute, rngs=rngs)
        self.query_norm = HeadNorm(head_dim, compute)
        self.key_norm = HeadNorm(head_dim, compute)
        self.mlp_in = Linear(width, MLP_RATIO * width, compute, rngs=rngs)
        self.out = Linear((1 + MLP_RATIO) * width, width, compute, rngs=rngs)
        self.compute = compute

    def __call__(self, x: jax.Array, mod: jax.Array, table) -> jax.Array:
        """The sequence [B, T + N, D] under a modulation [B, 3 D], which ``mod`` made before."""
        shift, scale, gate = split_modulation(mod, 3, self.compute)
        normed = modulate(x, shift, scale)
        query, key, value = parts_of(keep(self.qkv(normed), "qkv"))
        attended = joint_attention(self.query_norm(query), self.key_norm(key), value, table, self.compute)
        hidden = gelu(keep(self.mlp_in(normed), "mlp"))
        return add_gated(x, gate, keep(self.out(attended, hidden), "out"))


# --- the network ---

FLUX_RULES = (
    (r"(img_in|txt_in)\.kernel", P(None, "fsdp")),
    (r"(time|guidance|vector)_in\.in_layer\.kernel", P(None, "fsdp")),
    (r"(time|guidance|vector)_in\.out_layer\.kernel", P("fsdp", None)),
    (r"\w+_blocks\.(img_|txt_|)mod\.kernel(\.codes|)", P(None, "fsdp", "tensor")),
    (r"\w+_blocks\.(\w+_attn\.|)qkv\.kernel(\.codes|)", P(None, "fsdp", None, "tensor", None)),
    (r"\w+_blocks\.(\w+_attn\.|)qkv\.bias", P(None, None, "tensor", None)),
    (r"\w+_blocks\.(\w+_mlp\.in_layer|mlp_in)\.kernel(\.codes|)", P(None, "fsdp", "tensor")),
    (r"\w+_blocks\.(\w+_mlp\.in_layer|mlp_in)\.bias", P(None, "tensor")),
    (r"\w+_blocks\.(\w+_attn\.proj|\w+_mlp\.out_layer|out)\.kernel(\.codes|)", P(None, "tensor", "fsdp")),
    # Scales of quantised kernels: blocks lie along the inputs, and are fewer.
    (r"\w+_blocks\.(\w+_attn\.|)qkv\.kernel\.scales", P(None, None, None, "tensor", None)),
    (r"\w+_blocks\.(\w+_attn\.proj|\w+_mlp\.out_layer|out)\.kernel\.scales", P(None, None, "fsdp")),
    (r"\w+_blocks\..*kernel\.scales", P(None, None, "tensor")),
    # Factors of LoRA: A's inputs lie as the kernel's, B's outputs as the kernel's; the rank is too small to be split.
    (r"\w+_blocks\.(.*_attn\.proj|.*_mlp\.out_layer|out)\.lora_a", P(None, "tensor")),
    (r"\w+_blocks\..*lora_a", P(None, "fsdp")),
    (r"\w+_blocks\.(\w+_attn\.|)qkv\.lora_b", P(None, None, None, "tensor", None)),
    (r"\w+_blocks\.(.*_attn\.proj|.*_mlp\.out_layer|out)\.lora_b", P(None, None, "fsdp")),
    (r"\w+_blocks\..*lora_b", P(None, None, "tensor")),
    (r"final_mod\.kernel", P("fsdp", "tensor")),
    (r"final_out\.kernel", P("fsdp", None)),
    (r".*(bias|scale)", P()),
)


class Flux(nnx.Module):
    """The whole transformer.

    Attributes:
      STACKS: the attributes that are stacks of blocks, in the order in which they run.
      RULES: how its parameters lie on a mesh, see ``sharding``.
    """

    STACKS = ("double_blocks", "single_blocks")
    RULES = FLUX_RULES

    def __init__(self, config: FluxConfig, compute: Compute, *, rngs: nnx.Rngs):
        width = config.width
        self.img_in = Linear(config.in_channels, width, compute, rngs=rngs)
        self.txt_in = Linear(config.joint_attention_dim, width, compute, rngs=rngs)
        self.time_in = Embedder(TIME_CHANNELS, width, compute, rngs=rngs)
        self.vector_in = Embedder(config.pooled_projection_dim, width, compute, rngs=rngs)
        if config.guidance_embeds:
            self.guidance_in = Embedder(TIME_CHANNELS, width, compute, rngs=rngs)
        self.double_blocks = stack(lambda r: DoubleBlock(config, compute, rngs=r), config.num_layers, rngs)
        self.single_blocks = stack(lambda r: SingleBlock(config, compute, rngs=r), config.num_single_layers, rngs)
        self.final_mod = Linear(width, 2 * width, compute, rngs=rngs)
        self.final_out = Linear(width, config.out_channels, compute, rngs=rngs)
        self.config = config
        self.compute = compute

    def __call__(
        self,
        latents: jax.Array,
        text: jax.Array,
        pooled: jax.Array,
        timestep: jax.Array,
        guidance: jax.Array | None,
        image_ids: jax.Array,
        text_ids: jax.Array,
    ) -> jax.Array:
        """Predicts the velocity ``eps - x0``.

        Args:
          latents: [B, N, in_channels], packed 2x2.
          text: [B, T, joint_attention_dim], tokens of the T5 encoder.
          pooled: [B, pooled_projection_dim], the CLIP text encoder's vector.
          timestep: [B] noise level in 0 .. 1.
          guidance: [B] guidance scale such as 3.5, or None for a network without that input.
          image_ids: [N, 3] positions (0, row, column).
          text_ids: [T, 3] positions, all zero.

        Returns:
          [B, N, out_channels] in the compute dtype.

        Raises:
          ValueError: guidance is given and not expected, or the reverse.
        """
        return self.modulated(latents, text, self.modulations(pooled, timestep, guidance), image_ids, text_ids)

    def modulations(self, pooled: jax.Array, timestep: jax.Array, guidance: jax.Array | None) -> Modulations:
        """All that the network draws from the pooled text, the time and the guidance; arguments as of a call."""
        if (guidance is not None) != self.config.guidance_embeds:
            raise ValueError(f"guidance must {'' if self.config.guidance_embeds else 'not '}be given to this network")
        condition = self.time_in(sinusoid(timestep)) + self.vector_in(pooled)
        if guidance is not None:
            condition = condition + self.guidance_in(sinusoid(guidance))
        # Split by features, as the kernels are: their devices then exchange vectors, which are small, not kernels.
        condition = self.compute.constrain(jax.nn.silu(condition), "features")

        def of(blocks: nnx.Module, name: str) -> jax.Array:
            return map_part(
                blocks, name, lambda layer: self.compute.constrain(layer(condition), "vectors"), self.compute
            )

        return Modulations(
            of(self.double_blocks, "img_mod"),
            of(self.double_blocks, "txt_mod"),
            of(self.single_blocks, "mod"),
            self.compute.constrain(self.final_mod(condition), "vectors"),
        )

    def modulated(
        self, latents: jax.Array, text: jax.Array, modulations: Modulations, image_ids: jax.Array, text_ids: jax.Array
    ) -> jax.Array:
        """A call whose modulations were made before."""
        img, txt, table = self.enter(latents, text, image_ids, text_ids)
        img, txt = self.double(img, txt, modulations, table)
        x = self.single(self.join(txt, img), modulations, table)
        return self.leave(x[:, text.shape[1] :], modulations)

    # The parts of a pass, in order. ``some`` are the numbers of the blocks that run, None for all.

    def enter(
        self, latents: jax.Array, text: jax.Array, image_ids: jax.Array, text_ids: jax.Array
    ) -> tuple[jax.Array, jax.Array, tuple[jax.Array, jax.Array]]:
        """Image tokens [B, N, D], text tokens [B, T, D], and the rotary table of the joint sequence."""
        img = self.compute.constrain(self.img_in(latents), "tokens")
        txt = self.compute.constrain(self.txt_in(text), "tokens")
        ids = jnp.concatenate([text_ids, image_ids])
        return img, txt, rotary_table(ids, self.config.axes_dims_rope, self.compute.rotary)

    def double(
        self, img: jax.Array, txt: jax.Array, modulations: Modulations, table: Any, some: range | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Both streams through the double blocks."""

        def step(block: DoubleBlock, streams: tuple, given: tuple) -> tuple:
            return tuple(self.compute.constrain(x, "tokens") for x in block(*streams, *given, table))

        blocks = without(self.double_blocks, "img_mod", "txt_mod")
        return scan_blocks(blocks, (img, txt), self.compute, step, (modulations.img, modulations.txt), some)

    def join(self, txt: jax.Array, img: jax.Array) -> jax.Array:
        """The joint sequence [B, T + N, D]: text, then image."""
        return self.compute.constrain(jnp.concatenate([txt, img], axis=1), "tokens")

    def single(self, x: jax.Array, modulations: Modulations, table: Any, some: range | None = None) -> jax.Array:
        """The joint sequence through the single blocks."""

        def step(block: SingleBlock, x: jax.Array, given: jax.Array) -> jax.Array:
            return self.compute.constrain(block(x, given, table), "tokens")

        return scan_blocks(without(self.single_blocks, "mod"), x, self.compute, step, modulations.single, some)

    def leave(self, img: jax.Array, modulations: Modulations) -> jax.Array:
        """Image tokens [B, N, D] to the velocity [B, N, out_channels]."""
        shift, scale = split_modulation(modulations.last, 2, self.compute)
        return self.final_out(modulate(img, shift, scale))
