"""The networks that ``train_flow`` trains: a small FLUX transformer with a small T5 and a small CLIP text encoder."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from srpo_jax.emoji import pictures
from srpo_jax.families.flux import image_ids, text_ids
from srpo_jax.models.clip import ClipText, ClipTextConfig
from srpo_jax.models.compute import Compute, Params, bind, build
from srpo_jax.models.flux import Flux, FluxConfig
from srpo_jax.models.t5 import T5Config, T5Encoder

LENGTH = 16  # text tokens; the world's longest prompt has 7
SIDE = pictures.SIZE // 8  # of the latents
TEXT_WIDTH = 128
FLUX = FluxConfig(
    in_channels=64,
    out_channels=64,
    num_layers=2,
    num_single_layers=4,
    attention_head_dim=32,
    num_attention_heads=6,
    joint_attention_dim=TEXT_WIDTH,
    pooled_projection_dim=TEXT_WIDTH,
    guidance_embeds=True,
    axes_dims_rope=(8, 12, 12),
)


@dataclasses.dataclass(frozen=True)
class FlowNetworks:
    """The three networks that are trained: graph definitions and configs under the names of the pipeline's folders."""

    graphdefs: dict
    configs: dict

    def encode(self, params: Params, t5_ids: jax.Array, clip_ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Token ids [B, 16] -> (text [B, 16, C], pooled [B, P])."""
        tokens = bind(self.graphdefs["text_encoder_2"], params["text_encoder_2"])(t5_ids)
        return tokens, bind(self.graphdefs["text_encoder"], params["text_encoder"])(clip_ids)

    def velocity(self, params: Params, x: jax.Array, sigma: jax.Array, guidance: jax.Array, encoded) -> jax.Array:
        """The transformer's velocity at packed latents [B, 16, 64], noise levels [B], guidances [B]."""
        flux = bind(self.graphdefs["transformer"], params["transformer"])
        ids = image_ids(SIDE // 2, SIDE // 2), text_ids(LENGTH)
        return flux(x, *encoded, sigma, guidance, *ids).astype(jnp.float32)


def make_flow_networks(clip_words: int, t5_words: int, seed: int) -> tuple[FlowNetworks, Params]:
    """The networks for vocabularies of these sizes, with random parameters.

    Modulations and the last layer start at zero, so that every block starts as the identity and the velocity as 0; the
    guidance input starts without effect.
    """
    configs = {
        "transformer": FLUX,
        "text_encoder": ClipTextConfig(
            vocab_size=clip_words,
            hidden_size=TEXT_WIDTH,
            intermediate_size=2 * TEXT_WIDTH,
            num_hidden_layers=1,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
            eos_token_id=clip_words - 1,
        ),
        "text_encoder_2": T5Config(
            vocab_size=t5_words, d_model=TEXT_WIDTH, d_kv=32, d_ff=2 * TEXT_WIDTH, num_layers=1, num_heads=4
        ),
    }
    kinds = {"transformer": Flux, "text_encoder": ClipText, "text_encoder_2": T5Encoder}
    built = {
        name: build(functools.partial(_construct, kind, configs[name]), seed + index)
        for index, (name, kind) in enumerate(kinds.items())
    }
    params = {name: parameters for name, (_, parameters) in built.items()}
    silent = ("img_mod", "txt_mod", "mod", "final_mod", "final_out", "guidance_in")

    def start(path: tuple, leaf: jax.Array) -> jax.Array:
        keys = [entry.key for entry in path]
        ends = keys[-2] in silent or keys[-3:-1] == ["guidance_in", "out_layer"]
        return jnp.zeros_like(leaf) if ends else leaf

    params["transformer"] = jax.tree_util.tree_map_with_path(start, params["transformer"])
    return FlowNetworks({name: graphdef for name, (graphdef, _) in built.items()}, configs), params


def _construct(kind: type, config, rngs):
    return kind(config, Compute(), rngs=rngs)
