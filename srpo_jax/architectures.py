"""The published sizes of the networks that a recipe for FLUX.1-dev names: what can be known of them without weights.

They are those of the ``config.json`` files beside the weights on the hub; tests hold them to the published numbers of
parameters. A run reads its sizes from the converted folders (``program.read_architecture``) and needs none of this;
``preflight`` and ``benchmark`` do, which work before anything was downloaded.
"""

import pathlib
from typing import NamedTuple

from ml_collections import ConfigDict

from srpo_jax import program
from srpo_jax.models.autoencoder import AutoencoderConfig
from srpo_jax.models.clip import LEGACY_EOS_TOKEN_ID, VIT_H_14, ClipConfig, ClipTextConfig
from srpo_jax.models.flux import FluxConfig
from srpo_jax.models.t5 import T5Config
from srpo_jax.program import Architecture

# black-forest-labs/FLUX.1-dev: transformer, vae, text_encoder (CLIP-L), text_encoder_2 (T5 v1.1 XXL).
FLUX_DEV = FluxConfig(
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
)
FLUX_VAE = AutoencoderConfig()
CLIP_L_TEXT = ClipTextConfig(
    hidden_size=768,
    intermediate_size=3072,
    num_hidden_layers=12,
    num_attention_heads=12,
    eos_token_id=LEGACY_EOS_TOKEN_ID,
)
T5_XXL = T5Config(vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64)

# xswu/HPSv2, yuvalkirstain/PickScore_v1 and laion/CLIP-ViT-H-14-laion2B-s32B-b79K are the same network.
REWARDS: dict[str, ClipConfig] = {"hps": VIT_H_14, "pickscore": VIT_H_14, "clip": VIT_H_14}


class TextArchitecture(NamedTuple):
    """The sizes of the text encoders of a pipeline."""

    clip: ClipTextConfig
    t5: T5Config


# name: (transformer, autoencoder, text encoders)
PIPELINES: dict[str, tuple[FluxConfig, AutoencoderConfig, TextArchitecture]] = {
    "flux-dev": (FLUX_DEV, FLUX_VAE, TextArchitecture(CLIP_L_TEXT, T5_XXL)),
}


def published(config: ConfigDict, name: str) -> tuple[Architecture, TextArchitecture]:
    """The published sizes: pipeline ``name`` of ``PIPELINES``, and the rewards that ``config`` gives a weight."""
    transformer, autoencoder, text = PIPELINES[name]
    return Architecture(transformer, autoencoder, {name: REWARDS[name] for name in program.used_rewards(config)}), text


def read(config: ConfigDict) -> tuple[Architecture, TextArchitecture]:
    """The sizes of the folders that ``config`` names. Raises UserError for a folder that is not right."""
    path = pathlib.Path(config.model.path)
    text = TextArchitecture(
        program.read_config(path / "text_encoder", "clip_text"), program.read_config(path / "text_encoder_2", "t5")
    )
    return program.read_architecture(config), text
