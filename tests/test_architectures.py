"""The published sizes: against the published numbers of parameters."""

import math

import pytest
from helpers import tiny

from srpo_jax import architectures
from srpo_jax import config as config_lib
from srpo_jax.errors import UserError
from srpo_jax.models.clip import VIT_H_14
from srpo_jax.weights import folder


@pytest.mark.parametrize(
    ("network", "config", "parameters"),
    [
        ("flux", architectures.FLUX_DEV, 11_901_408_320),
        ("autoencoder", architectures.FLUX_VAE, 83_819_683),
        ("clip_text", architectures.CLIP_L_TEXT, 123_060_480),
        ("t5", architectures.T5_XXL, 4_762_310_656),
        ("clip", architectures.REWARDS["hps"], 986_109_441),
        ("clip", architectures.REWARDS["pickscore"], 986_109_441),
        ("clip", architectures.REWARDS["clip"], 986_109_441),
    ],
)
def test_networks_have_the_published_number_of_parameters(network, config, parameters):
    assert sum(math.prod(shape) for shape in folder.shapes(network, config).values()) == parameters


def test_published_sizes_cover_the_rewards_in_use():
    config = config_lib.default()
    config.reward.models.pickscore.weight = 0.5
    architecture, text = architectures.published(config, "flux-dev")
    assert architecture == (architectures.FLUX_DEV, architectures.FLUX_VAE, {"hps": VIT_H_14, "pickscore": VIT_H_14})
    assert text.t5.d_model == architecture.transformer.joint_attention_dim
    assert text.clip.hidden_size == architecture.transformer.pooled_projection_dim


def test_sizes_of_folders(models):
    config = tiny.config(models)
    architecture, text = architectures.read(config)
    assert (architecture.transformer, architecture.autoencoder) == (tiny.FLUX, tiny.VAE)
    assert {name: sizes.projection_dim for name, sizes in architecture.rewards.items()} == {"clip": 16}
    assert (text.clip.hidden_size, text.t5.d_model) == (16, 32)
    config.model.path = str(models / "clip")
    with pytest.raises(UserError, match="text_encoder is not a folder"):
        architectures.read(config)
