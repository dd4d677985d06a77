"""Recipes with sizes that need no files: what ``benchmark`` measures unless it is given a recipe."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

from ml_collections import ConfigDict

from srpo_jax import architectures
from srpo_jax import config as config_lib
from srpo_jax.architectures import Architecture
from srpo_jax.errors import UserError
from srpo_jax.families.flux import FLUX
from srpo_jax.models.autoencoder import AutoencoderConfig
from srpo_jax.models.clip import ClipConfig, ClipTextConfig, ClipVisionConfig
from srpo_jax.models.flux import FluxConfig


class Preset(NamedTuple):
    """A recipe and the sizes of its networks."""

    config: ConfigDict
    architecture: Architecture


def _small() -> Preset:
    """The recipe and the sizes of the embedded world (configs/emoji.py, srpo_jax/emoji)."""
    c = config_lib.default()
    c.model.dtype = "float32"
    c.data.text_length, c.data.height, c.data.width = 16, 64, 64
    c.rollout.steps, c.rollout.guidance, c.rollout.noise = 10, 2.5, "per_sample"
    c.reward.models.hps.weight, c.reward.models.clip.weight = 0.0, 1.0
    return Preset(
        c,
        Architecture(
            FLUX,
            FluxConfig(
                in_channels=64, out_channels=64, num_layers=2, num_single_layers=4, attention_head_dim=32,
                num_attention_heads=6, joint_attention_dim=128, pooled_projection_dim=128, guidance_embeds=True,
                axes_dims_rope=(8, 12, 12),
            ),
            AutoencoderConfig(block_out_channels=(16, 32, 64, 128), layers_per_block=1, norm_num_groups=4),
            {},  # no text encoders: they are no part of an update
            {
                "clip": ClipConfig(
                    ClipTextConfig(3240, 128, 512, 2, 4, 16, eos_token_id=3239),
                    ClipVisionConfig(160, 640, 5, 5, 64, 16),
                    projection_dim=64,
                )
            },
        ),
    )  # fmt: skip


def _medium() -> Preset:
    """Twice the blocks, wider, and pictures of 256x256, where the decoder has most of the work of a CPU."""
    c, small = _small()
    c.data.text_length, c.data.height, c.data.width = 64, 256, 256
    c.rollout.steps = 8
    clip = small.rewards["clip"]
    text = dataclasses.replace(clip.text_config, max_position_embeddings=77)
    reward = dataclasses.replace(clip, text_config=text, vision_config=ClipVisionConfig(256, 1024, 8, 8, 224, 14))
    transformer = dataclasses.replace(
        small.transformer, num_layers=4, num_single_layers=8, num_attention_heads=8, joint_attention_dim=256
    )
    autoencoder = AutoencoderConfig(block_out_channels=(32, 64, 128, 128), layers_per_block=2, norm_num_groups=8)
    return Preset(c, small._replace(transformer=transformer, autoencoder=autoencoder, rewards={"clip": reward}))


def _full() -> Preset:
    c = config_lib.default()
    return Preset(c, architectures.published(c, "flux-dev"))


def _wide() -> Preset:
    full = _full()
    return full._replace(architecture=shallow(full.architecture, (4, 8)))


PRESETS: dict[str, Callable[[], Preset]] = {"small": _small, "medium": _medium, "wide": _wide, "full": _full}
# Samples a device takes at a time unless told otherwise: the small model needs some to have work.
DEVICE_BATCH = {"small": 8, "medium": 2}


def shallow(architecture: Architecture, depth: tuple[int, ...]) -> Architecture:
    """The same widths with other numbers of blocks. Raises UserError if the family has not so many kinds of them."""
    return architecture._replace(transformer=architecture.family.with_blocks(architecture.transformer, depth))


def depth(words: list[str]) -> tuple[int, int]:
    """The numbers of blocks in a flag ``--depth=DOUBLE,SINGLE``. Raises UserError."""
    if len(words) != 2 or not all(word.isdigit() and int(word) for word in words):
        raise UserError(f"--depth={','.join(words)}: give two numbers of blocks, as --depth=4,8")
    return int(words[0]), int(words[1])
