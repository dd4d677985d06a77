"""The published sizes: against the published numbers of parameters."""

import math

import pytest
from helpers import tiny

from srpo_jax import architectures
from srpo_jax import config as config_lib
from srpo_jax.errors import UserError
from srpo_jax.families.flux import DEV, FLUX
from srpo_jax.models.clip import VIT_H_14
from srpo_jax.rewards import REWARDS
from srpo_jax.weights import folder


@pytest.mark.parametrize(
    ("network", "config", "parameters"),
    [
        ("flux", DEV.transformer, 11_901_408_320),
        ("autoencoder", DEV.autoencoder, 83_819_683),
        ("clip_text", DEV.text["text_encoder"], 123_060_480),
        ("t5", DEV.text["text_encoder_2"], 4_762_310_656),
        ("clip", REWARDS["hps"].published, 986_109_441),
        ("clip", REWARDS["pickscore"].published, 986_109_441),
        ("clip", REWARDS["clip"].published, 986_109_441),
    ],
)
def test_networks_have_the_published_number_of_parameters(network, config, parameters):
    assert sum(math.prod(shape) for shape in folder.shapes(network, config).values()) == parameters


def test_published_sizes_cover_the_rewards_in_use():
    config = config_lib.default()
    config.reward.models.pickscore.weight = 0.5
    found = architectures.published(config, "flux-dev")
    assert found == (FLUX, *DEV, {"hps": VIT_H_14, "pickscore": VIT_H_14})
    FLUX.check(DEV, "flux-dev")  # they fit each other
    with pytest.raises(UserError, match="'flux-huge' is unknown; choose one of flux-dev"):
        architectures.published(config, "flux-huge")


def test_sizes_of_folders(models):
    config = tiny.config(models)
    architecture = architectures.read(config)
    text = architecture.text
    assert (architecture.transformer, architecture.autoencoder) == (tiny.FLUX, tiny.VAE)
    assert {name: sizes.projection_dim for name, sizes in architecture.rewards.items()} == {"clip": 16}
    assert (text["text_encoder"].hidden_size, text["text_encoder_2"].d_model) == (16, 32)
    config.model.path = str(models / "clip")
    with pytest.raises(UserError, match="clip/transformer is not a folder"):
        architectures.read(config)
