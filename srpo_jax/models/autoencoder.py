"""FLUX's picture autoencoder: 16 latent channels, a factor of 8 in height and width (diffusers ``AutoencoderKL``).

    images [B, H, W, 3] in [-1, 1]  --encode-->  mean, logvar [B, H/8, W/8, 16]  --decode-->  images

The transformer works on ``scale_latents(z) = (z - shift_factor) * scaling_factor``. There are no quant convolutions
around the latents. In SRPO the decoder carries the reward's gradient, and its activations are the largest of all:
rematerialise them by ``Compute.remat``, which here acts on each residual block, the attention and each resampling.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Annotated, Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from srpo_jax import schema
from srpo_jax.models import convolution
from srpo_jax.models.attention import attention
from srpo_jax.models.compute import Compute
from srpo_jax.models.group_norm import GroupNorm
from srpo_jax.schema import Range, Size


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
    """Sizes, named as in the ``config.json`` of diffusers' ``AutoencoderKL``; the defaults are FLUX.1's.

    Attributes:
      in_channels, out_channels: of pictures.
      latent_channels: of latents.
      block_out_channels: width per resolution, finest first; every entry after the first halves height and width.
      layers_per_block: residual blocks per resolution in the encoder; the decoder has one more.
      norm_num_groups: groups of every group norm; divides every width.
      scaling_factor, shift_factor: ``scale_latents`` is ``(z - shift_factor) * scaling_factor``.
    """

    in_channels: Size = 3
    out_channels: Size = 3
    latent_channels: Size = 16
    block_out_channels: Annotated[tuple[Size, ...], Range(1, 8)] = (128, 256, 512, 512)
    layers_per_block: Annotated[int, Range(1, 16)] = 2
    norm_num_groups: Size = 32
    scaling_factor: Annotated[float, Range(1e-6, 1e6)] = 0.3611
    shift_factor: Annotated[float, Range(-1e6, 1e6)] = 0.1159

    def __post_init__(self):
        for width in self.block_out_channels:
            if width % self.norm_num_groups:
                raise ValueError(
                    f"norm_num_groups={self.norm_num_groups} does not divide the width {width} of "
                    f"block_out_channels={self.block_out_channels}"
                )

    @property
    def factor(self) -> int:
        """How many pixels, along one side, make one latent position."""
        return 2 ** (len(self.block_out_channels) - 1)

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> "AutoencoderConfig":
        """Reads a ``config.json`` of diffusers, or of ours.

        Keys that only describe (names, versions, sizes of the training pictures) are ignored. Raises ValueError for a
        missing key and for a variant that is not built here (quant convolutions, other block types or activations).
        """
        fields = [field.name for field in dataclasses.fields(cls)]
        if missing := [name for name in fields if config.get(name) is None]:
            raise ValueError(f"autoencoder config lacks {', '.join(missing)}; expected the config.json of a FLUX vae")
        values = schema.take(cls, config, "autoencoder config")
        supported = {
            "act_fn": "silu",
            "use_quant_conv": False,
            "use_post_quant_conv": False,
            "mid_block_add_attention": True,
            "latents_mean": None,
            "latents_std": None,
        }
        for name, value in supported.items():
            if config.get(name, value) != value:
                raise ValueError(f"autoencoder config has {name}={config[name]!r}; only {value!r} is supported")
        for name, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
            types = config.get(name, [])
            if not isinstance(types, list | tuple) or any(entry != kind for entry in types):
                raise ValueError(f"autoencoder config has {name}={config[name]!r}; only {kind!r} is supported")
        return cls(**values)


def _conv(inputs: int, outputs: int, size: int, compute: Compute, rngs: nnx.Rngs) -> nnx.Conv:
    return nnx.Conv(
        inputs, outputs, (size, size), dtype=compute.dtype, param_dtype=compute.param_dtype, rngs=rngs,
        conv_general_dilated=convolution.general,
    )  # fmt: skip


class ResnetBlock(nnx.Module):
    """Two 3x3 convolutions, each after norm and SiLU, beside a skip connection (1x1 if the width changes)."""

    def __init__(self, inputs: int, outputs: int, config: AutoencoderConfig, compute: Compute, *, rngs: nnx.Rngs):
        self.norm1 = GroupNorm(inputs, config.norm_num_groups, compute)
        self.conv1 = _conv(inputs, outputs, 3, compute, rngs)
        self.norm2 = GroupNorm(outputs, config.norm_num_groups, compute)
        self.conv2 = _conv(outputs, outputs, 3, compute, rngs)
        self.conv_shortcut = _conv(inputs, outputs, 1, compute, rngs) if inputs != outputs else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, inputs] -> [B, H, W, outputs]."""
        hidden = self.conv1(jax.nn.silu(self.norm1(x)))
        hidden = self.conv2(jax.nn.silu(self.norm2(hidden)))
        return hidden + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class AttentionBlock(nnx.Module):
    """Single-head self-attention over all positions of the picture, with a skip connection."""

    def __init__(self, channels: int, config: AutoencoderConfig, compute: Compute, *, rngs: nnx.Rngs):
        linear = functools.partial(
            nnx.Linear, channels, channels, dtype=compute.dtype, param_dtype=compute.param_dtype, rngs=rngs
        )
        self.norm = GroupNorm(channels, config.norm_num_groups, compute)
        self.q, self.k, self.v, self.proj = linear(), linear(), linear(), linear()

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, C] -> the same shape."""
        batch, height, width, channels = x.shape
        tokens = self.norm(x).reshape(batch, height * width, 1, channels)
        # Heads are as wide as the network (512 in FLUX), wider than fused attention kernels take: always plain XLA.
        mixed = attention(self.q(tokens), self.k(tokens), self.v(tokens), backend="xla")
        return x + self.proj(mixed).reshape(x.shape)


class Downsample(nnx.Module):
    """Halves height and width: a 3x3 convolution with stride 2, padded on the right and at the bottom only."""

    def __init__(self, channels: int, compute: Compute, *, rngs: nnx.Rngs):
        self.conv = nnx.Conv(
            channels, channels, (3, 3), strides=2, padding=((0, 1), (0, 1)), dtype=compute.dtype,
            param_dtype=compute.param_dtype, rngs=rngs,
        )  # fmt: skip

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, C] -> [B, H/2, W/2, C]."""
        return self.conv(x)


# Rows of a doubled picture repeat in pairs, so that a kernel's three taps read two rows of the picture before: an even
# row of the output reads the row above with the first tap and its own with the sum of the others, an odd one its own
# with the sum of the first two and the row below with the last. [row of a pair, tap of the coarse picture, kernel tap]
_TAPS = (((1, 0, 0), (0, 1, 1)), ((1, 1, 0), (0, 0, 1)))


class Upsample(nnx.Module):
    """Doubles height and width: every position repeated, then a 3x3 convolution.

    Computed without the repetition, as four 2x2 convolutions of the coarse picture whose outputs interleave: the same
    sums in 4/9 of the products.
    """

    def __init__(self, channels: int, compute: Compute, *, rngs: nnx.Rngs):
        self.conv = _conv(channels, channels, 3, compute, rngs)
        self.dtype = compute.dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, C] -> [B, 2H, 2W, C]."""
        batch, height, width, channels = x.shape
        taps = jnp.asarray(_TAPS, jnp.float32)
        # In full precision: the taps' sums are weights, rounded once as any other.
        kernels = jnp.einsum(
            "ard,bse,deio->abrsio", taps, taps, self.conv.kernel[...].astype(jnp.float32), precision="highest"
        ).astype(self.dtype)

        def quarter(row: int, column: int) -> jax.Array:
            around = ((1 - row, row), (1 - column, column))
            return convolution.convolve(x.astype(self.dtype), kernels[row, column], around)

        rows = [jnp.stack([quarter(row, column) for column in (0, 1)], axis=3) for row in (0, 1)]
        doubled = jnp.stack(rows, axis=2).reshape(batch, 2 * height, 2 * width, channels)
        return doubled + self.conv.bias[...].astype(self.dtype)


class Mid(nnx.Module):
    """The coarsest resolution: residual block, attention, residual block."""

    def __init__(self, channels: int, config: AutoencoderConfig, compute: Compute, *, rngs: nnx.Rngs):
        self.resnets = nnx.List([ResnetBlock(channels, channels, config, compute, rngs=rngs) for _ in range(2)])
        self.attention = AttentionBlock(channels, config, compute, rngs=rngs)


class Level(nnx.Module):
    """Residual blocks at one resolution, then ``downsample`` or ``upsample`` except at a side's last level."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        depth: int,
        config: AutoencoderConfig,
        compute: Compute,
        *,
        downsample: bool = False,
        upsample: bool = False,
        rngs: nnx.Rngs,
    ):
        widths = [inputs] + [outputs] * depth
        self.resnets = nnx.List(
            [ResnetBlock(widths[i], widths[i + 1], config, compute, rngs=rngs) for i in range(depth)]
        )
        self.downsample = Downsample(outputs, compute, rngs=rngs) if downsample else None
        self.upsample = Upsample(outputs, compute, rngs=rngs) if upsample else None


def _run(block: Callable[[jax.Array], jax.Array], x: jax.Array, compute: Compute) -> jax.Array:
    """One block, rematerialised by ``compute.remat``; its parameters go through the checkpoint as arguments."""
    graphdef, state = nnx.split(block)
    return compute.constrain(compute.checkpoint(lambda state, x: nnx.merge(graphdef, state)(x))(state, x), "image")


def _run_mid(mid: Mid, x: jax.Array, compute: Compute) -> jax.Array:
    for block in (mid.resnets[0], mid.attention, mid.resnets[1]):
        x = _run(block, x, compute)
    return x


def _run_level(level: Level, x: jax.Array, compute: Compute) -> jax.Array:
    for block in (*level.resnets, level.downsample, level.upsample):
        if block is not None:
            x = _run(block, x, compute)
    return x


class Encoder(nnx.Module):
    """Pictures to the moments of latents."""

    def __init__(self, config: AutoencoderConfig, compute: Compute, *, rngs: nnx.Rngs):
        self.compute = compute
        widths = config.block_out_channels
        self.conv_in = _conv(config.in_channels, widths[0], 3, compute, rngs)
        self.down_blocks = nnx.List(
            [
                Level(
                    widths[max(i - 1, 0)],
                    width,
                    config.layers_per_block,
                    config,
                    compute,
                    downsample=i + 1 < len(widths),
                    rngs=rngs,
                )
                for i, width in enumerate(widths)
            ]
        )
        self.mid = Mid(widths[-1], config, compute, rngs=rngs)
        self.norm_out = GroupNorm(widths[-1], config.norm_num_groups, compute)
        self.conv_out = _conv(widths[-1], 2 * config.latent_channels, 3, compute, rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """[B, H, W, in_channels] -> [B, H/8, W/8, 2 * latent_channels]: mean, then log variance."""
        x = self.conv_in(images.astype(self.compute.dtype))
        for level in self.down_blocks:
            x = _run_level(level, x, self.compute)
        x = _run_mid(self.mid, x, self.compute)
        return self.conv_out(jax.nn.silu(self.norm_out(x)))


class Decoder(nnx.Module):
    """Latents to pictures."""

    def __init__(self, config: AutoencoderConfig, compute: Compute, *, rngs: nnx.Rngs):
        self.compute = compute
        widths = config.block_out_channels[::-1]
        self.conv_in = _conv(config.latent_channels, widths[0], 3, compute, rngs)
        self.mid = Mid(widths[0], config, compute, rngs=rngs)
        self.up_blocks = nnx.List(
            [
                Level(
                    widths[max(i - 1, 0)],
                    width,
                    config.layers_per_block + 1,
                    config,
                    compute,
                    upsample=i + 1 < len(widths),
                    rngs=rngs,
                )
                for i, width in enumerate(widths)
            ]
        )
        self.norm_out = GroupNorm(widths[-1], config.norm_num_groups, compute)
        self.conv_out = _conv(widths[-1], config.out_channels, 3, compute, rngs)

    def __call__(self, latents: jax.Array) -> jax.Array:
        """[B, H/8, W/8, latent_channels] -> [B, H, W, out_channels]."""
        x = _run_mid(self.mid, self.conv_in(latents.astype(self.compute.dtype)), self.compute)
        for level in self.up_blocks:
            x = _run_level(level, x, self.compute)
        return self.conv_out(jax.nn.silu(self.norm_out(x)))


class Autoencoder(nnx.Module):
    """Encoder, decoder and the scaling between raw latents and those the transformer sees."""

    RULES = ((r".*", P()),)  # it is small: 84 million parameters in FLUX.1

    def __init__(self, config: AutoencoderConfig, compute: Compute, *, rngs: nnx.Rngs):
        self.config = config
        self.encoder = Encoder(config, compute, rngs=rngs)
        self.decoder = Decoder(config, compute, rngs=rngs)

    def encode(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Mean and log variance of the raw latents of pictures.

        Args:
          images: [B, H, W, in_channels] in [-1, 1]; H and W are multiples of ``config.factor`` (8 in FLUX).

        Returns:
          Two float32 arrays [B, H/8, W/8, latent_channels]; the log variance is clipped to [-30, 20] as in diffusers.

        Raises:
          ValueError: for sides that the factor does not divide.
        """
        if images.shape[1] % self.config.factor or images.shape[2] % self.config.factor:
            raise ValueError(
                f"pictures of {images.shape[1]}x{images.shape[2]} cannot be encoded: make both sides "
                f"multiples of {self.config.factor}"
            )
        mean, logvar = jnp.split(self.encoder(images).astype(jnp.float32), 2, axis=-1)
        return mean, jnp.clip(logvar, -30.0, 20.0)

    def decode(self, latents: jax.Array) -> jax.Array:
        """Raw latents [B, H/8, W/8, latent_channels] -> float32 pictures [B, H, W, out_channels], not clipped."""
        return self.decoder(latents).astype(jnp.float32)

    def scale_latents(self, latents: jax.Array) -> jax.Array:
        """Raw latents -> those the transformer is trained on."""
        return (latents - self.config.shift_factor) * self.config.scaling_factor

    def unscale_latents(self, latents: jax.Array) -> jax.Array:
        """The inverse of ``scale_latents``."""
        return latents / self.config.scaling_factor + self.config.shift_factor
