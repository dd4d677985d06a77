"""FLUX.1 (Black Forest Labs): MM-DiT with two streams and one, T5 and CLIP-L text, 16 latent channels, an embedded
guidance scale (dev) or none (schnell)."""

import dataclasses
import os
import pathlib
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

from srpo_jax import schema
from srpo_jax.algorithm import flow
from srpo_jax.costs.flops import Factors, Forward, Work
from srpo_jax.errors import UserError
from srpo_jax.families import flux_costs
from srpo_jax.families.base import (
    AUTOENCODER,
    SCHEDULER,
    TRANSFORMER,
    Component,
    Condition,
    Family,
    PlaceOf,
    Sizes,
    Tokenizer,
)
from srpo_jax.families.flux_text import FluxTextEncoders
from srpo_jax.models import block_cache
from srpo_jax.models.autoencoder import AutoencoderConfig
from srpo_jax.models.clip import LEGACY_EOS_TOKEN_ID, ClipTextConfig
from srpo_jax.models.compute import Compute
from srpo_jax.models.flux import Flux, FluxConfig, Modulations, is_modulation
from srpo_jax.models.lora import Lora
from srpo_jax.models.t5 import T5Config
from srpo_jax.schema import Range, Size
from srpo_jax.weights.files import read_json

# black-forest-labs/FLUX.1-dev, from the config.json files beside its weights.
DEV = Sizes(
    transformer=FluxConfig(
        in_channels=64,
        out_channels=64,
        num_layers=19,
        num_single_layers=38,
        attention_head_dim=128,
        num_attention_heads=24,
        joint_attention_dim=4096,
        pooled_projection_dim=768,
        guidance_embeds=True,
        axes_dims_rope=(16, 56, 56),
    ),
    autoencoder=AutoencoderConfig(),
    text={
        "text_encoder": ClipTextConfig(
            hidden_size=768,
            intermediate_size=3072,
            num_hidden_layers=12,
            num_attention_heads=12,
            eos_token_id=LEGACY_EOS_TOKEN_ID,
        ),
        "text_encoder_2": T5Config(vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64),
    },
)

SCHEDULER_CLASS = "FlowMatchEulerDiscreteScheduler"
# What changes the schedule in ways that FLUX.1 does not use.
SCHEDULER_FIXED = {
    "time_shift_type": "exponential", "invert_sigmas": False, "shift_terminal": None, "use_karras_sigmas": False,
    "use_exponential_sigmas": False, "use_beta_sigmas": False, "stochastic_sampling": False,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Scheduler:
    """What is read of a ``scheduler_config.json``; the defaults are what diffusers takes where the file is silent.

    With ``use_dynamic_shifting`` the shift is ``exp(mu)``, mu linear in the number of tokens: ``base_shift`` at
    ``base_image_seq_len`` and ``max_shift`` at ``max_image_seq_len``; else it is ``shift``.
    """

    shift: Annotated[float, Range(1e-3, 1e3)] = 1.0
    use_dynamic_shifting: bool = False
    base_shift: Annotated[float, Range(-10, 10)] = 0.5
    max_shift: Annotated[float, Range(-10, 10)] = 1.15
    base_image_seq_len: Size = 256
    max_image_seq_len: Size = 4096

    def __post_init__(self):
        if self.base_image_seq_len >= self.max_image_seq_len:
            raise ValueError(
                f"base_image_seq_len={self.base_image_seq_len} must be less than max_image_seq_len="
                f"{self.max_image_seq_len}"
            )


class FluxFamily(Family):
    """FLUX.1; sizes of the transformer are ``models.flux.FluxConfig``."""

    name = "FLUX.1"
    pipeline = "FluxPipeline"
    components = {
        TRANSFORMER: Component(
            "flux",
            "diffusers",
            "FluxTransformer2DModel",
            {"bfl": ("", "flux1"), "comfyui": ("diffusion_models", "flux1")},
            matrices=True,
        ),
        AUTOENCODER: Component(
            "autoencoder", "diffusers", "AutoencoderKL", {"bfl": ("", "ae"), "comfyui": ("vae", "ae")}
        ),
        "text_encoder": Component(
            "clip_text", "transformers", "CLIPTextModel", {"comfyui": ("text_encoders", "clip_l")}
        ),
        "text_encoder_2": Component(
            "t5", "transformers", "T5EncoderModel", {"comfyui": ("text_encoders", "t5xxl")}, matrices=True
        ),
    }
    tokenizers = {
        "tokenizer_2": Tokenizer("T5", "text_encoder_2", "text"),
        "tokenizer": Tokenizer("CLIP", "text_encoder", None),
    }
    scheduler = SCHEDULER_CLASS
    published = {"flux-dev": DEV}
    factor, channels, patch = 8, 16, 2
    text_length = 512

    def check(self, sizes: Sizes, path: Any) -> None:
        """Raises UserError if the networks of the pipeline ``path`` do not fit each other."""
        super().check(sizes, path)
        for part, found, wanted in (
            ("text_encoder", sizes.text["text_encoder"].hidden_size, sizes.transformer.pooled_projection_dim),
            ("text_encoder_2", sizes.text["text_encoder_2"].d_model, sizes.transformer.joint_attention_dim),
        ):
            if found != wanted:
                raise UserError(f"{path}/{part} has width {found}; the transformer beside it expects {wanted}")

    def condition(self, transformer: FluxConfig, text_length: int) -> dict[str, tuple[int, ...]]:
        """T5's features ``text`` [T, 4096] and CLIP-L's vector ``pooled`` [768]."""
        return {
            "text": (text_length, transformer.joint_attention_dim),
            "pooled": (transformer.pooled_projection_dim,),
        }

    def text_encoders(
        self, path: str | os.PathLike, transformer: FluxConfig, compute: Compute, place: PlaceOf | None = None
    ) -> FluxTextEncoders:
        """CLIP-L and T5."""
        return FluxTextEncoders(path, compute, place)

    def prepare(self, transformer: Flux, condition: Condition, time: jax.Array, guidance: jax.Array) -> Modulations:
        """Shifts, scales and gates of every block, which read the pooled text, the time and the guidance."""
        scale = guidance if transformer.config.guidance_embeds else None
        return transformer.modulations(condition["pooled"], time, scale)

    def velocity(
        self, transformer: Flux, x: jax.Array, condition: Condition, prepared: Modulations, height: int, width: int
    ) -> jax.Array:
        """One pass; the guidance is in the modulations."""
        return transformer.modulated(*self._inputs(x, condition, prepared, height, width))

    def no_change(self, transformer: Flux, x: jax.Array, condition: Condition) -> jax.Array:
        """See ``block_cache.no_change``."""
        return block_cache.no_change(transformer, len(x), condition["text"].shape[1] + x.shape[1])

    def cached_velocity(
        self,
        transformer: Flux,
        x: jax.Array,
        condition: Condition,
        prepared: Modulations,
        height: int,
        width: int,
        change: jax.Array,
        renew: jax.Array,
        ends: tuple[int, int],
    ) -> tuple[jax.Array, jax.Array]:
        """See ``block_cache.velocity``."""
        inputs = self._inputs(x, condition, prepared, height, width)
        return block_cache.velocity(transformer, inputs, change, renew, ends)

    def _inputs(self, x: jax.Array, condition: Condition, prepared: Modulations, height: int, width: int) -> tuple:
        ids = image_ids(height // self.cell, width // self.cell), text_ids(condition["text"].shape[1])
        return x, condition["text"], prepared, *map(jnp.asarray, ids)

    def is_modulation(self, path: str) -> bool:
        """See ``models.flux.is_modulation``."""
        return is_modulation(path)

    def shift(self, height: int, width: int) -> float:
        """exp(mu), mu linear in the number of tokens: the dynamic shift of FLUX.1's published scheduler."""
        return shift_by_size(self.token_shape(height, width)[0], Scheduler())

    def schedule(self, path: str | os.PathLike, steps: int, height: int, width: int) -> np.ndarray:
        """Of diffusers' ``FlowMatchEulerDiscreteScheduler``, by the pipeline's own file."""
        with np.errstate(invalid="ignore"):
            levels = pipeline_schedule(steps, self.token_shape(height, width)[0], read_scheduler(path))
        if not (np.diff(levels) < 0).all():
            raise UserError(
                f"{path}/{SCHEDULER}: {steps} steps for pictures of {height}x{width} have noise levels that do not "
                "fall; take fewer steps, or the scheduler_config.json that the model came with"
            )
        return levels

    def forward(self, transformer: FluxConfig, image_tokens: int, text_tokens: int) -> Forward:
        """FLOPs of one sample's pass, embedders and modulations included."""
        return flux_costs.transformer(transformer, image_tokens, text_tokens)

    def preparation(self, transformer: FluxConfig) -> float:
        """FLOPs of all blocks' modulations."""
        return flux_costs.modulations(transformer)

    def blocks(self, transformer: FluxConfig) -> tuple[int, ...]:
        """(double, single)."""
        return transformer.num_layers, transformer.num_single_layers

    def with_blocks(self, transformer: FluxConfig, blocks: tuple[int, ...]) -> FluxConfig:
        """With (double, single) blocks."""
        if len(blocks) != 2:
            raise UserError(f"{self.name} has two kinds of block, double and single; got {','.join(map(str, blocks))}")
        return transformer.with_blocks(*blocks)

    def kept(self, transformer: FluxConfig, image_tokens: int, text_tokens: int) -> dict[str, int]:
        """See ``flux_costs.kept``."""
        return flux_costs.kept(transformer, image_tokens, text_tokens)

    def factors(self, transformer: FluxConfig, lora: Lora, image_tokens: int, text_tokens: int) -> Factors:
        """Numbers and FLOPs of the low-rank factors."""
        return flux_costs.factors(transformer, lora, image_tokens, text_tokens)

    def adapted(
        self, transformer: FluxConfig, lora: Lora, image_tokens: int, text_tokens: int, *, remat: str, attention: str
    ) -> Work:
        """FLOPs of a forward and a backward pass in which factors alone are trained."""
        return flux_costs.adapted(transformer, lora, image_tokens, text_tokens, remat=remat, attention=attention)


def image_ids(rows: int, columns: int) -> np.ndarray:
    """Position ids ``[N, 3]`` of image tokens, (0, row, column), float32."""
    row, column = np.mgrid[0:rows, 0:columns]
    return np.stack([np.zeros_like(row), row, column], axis=-1).reshape(-1, 3).astype(np.float32)


def text_ids(length: int) -> np.ndarray:
    """Position ids ``[length, 3]`` of text tokens: all zero."""
    return np.zeros((length, 3), np.float32)


def read_scheduler(path: str | os.PathLike) -> Scheduler:
    """The scheduler of a pipeline folder.

    Raises UserError if the file is missing or asks for a schedule that is not computed here.
    """
    file = pathlib.Path(path) / SCHEDULER / "scheduler_config.json"
    found = read_json(file)
    if found.get("_class_name", SCHEDULER_CLASS) != SCHEDULER_CLASS:
        raise UserError(f"{file}: {found['_class_name']!s:.60} is not supported; FLUX.1 has {SCHEDULER_CLASS}")
    for key, value in SCHEDULER_FIXED.items():
        if found.get(key, value) not in (value, None):
            raise UserError(f"{file}: {key}={schema.shown(found[key])} is not supported; FLUX.1 has {value!r}")
    try:
        return schema.read(Scheduler, found, "scheduler")
    except ValueError as error:
        raise UserError(f"{file}: {error}") from error


def shift_by_size(tokens: int, scheduler: Scheduler) -> float:
    """``exp(mu)``, mu linear in the number of image tokens."""
    slope = scheduler.max_shift - scheduler.base_shift
    slope /= scheduler.max_image_seq_len - scheduler.base_image_seq_len
    with np.errstate(over="ignore"):
        return float(np.exp(scheduler.base_shift + slope * (tokens - scheduler.base_image_seq_len)))


def pipeline_schedule(steps: int, tokens: int, scheduler: Scheduler) -> np.ndarray:
    """The noise levels ``[steps + 1]`` of FLUX.1's inference pipeline for an image of ``tokens`` tokens, float32.

    Args:
      steps: Euler steps.
      tokens: image tokens, N.
      scheduler: of the pipeline.
    """
    sigmas = np.linspace(1.0, 1.0 / steps, steps)
    if scheduler.use_dynamic_shifting:
        shift = shift_by_size(tokens, scheduler)
    else:
        shift = scheduler.shift
    return np.append(flow.time_shift(sigmas, shift), 0.0).astype(np.float32)


FLUX = FluxFamily()
