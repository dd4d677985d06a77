"""The analytic FLOPs of scores against what XLA counts, at true widths with few blocks; nothing runs."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from helpers.counting import array, counted, network

from srpo_jax.models.aesthetic import ClipAestheticConfig, SiglipAestheticConfig
from srpo_jax.models.blip import BlipConfig
from srpo_jax.models.compute import bind
from srpo_jax.rewards import REWARDS
from srpo_jax.rewards.image_reward import LENGTH


def shallow(config):
    """Two blocks in every tower, and an activation of few operations: of an error function, which is no product, XLA
    counts some 60 for every number, a hundredth of ViT-L's work."""
    towers = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name.endswith("_config")}
    changes = {"num_hidden_layers": 2, "hidden_act": "quick_gelu"}
    towers = {name: dataclasses.replace(tower, **changes) for name, tower in towers.items()}
    return dataclasses.replace(config, **towers)


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
@pytest.mark.parametrize(
    ("kind", "config"),
    [("image_reward", BlipConfig()), ("aesthetic", ClipAestheticConfig()), ("aesthetic_v25", SiglipAestheticConfig())],
)
def test_looking(kind, config, remat):
    config = shallow(config)
    graphdef, params = network(REWARDS[kind].network, config, remat=remat)
    size = config.vision_config.image_size

    def run(pixels, params):
        return bind(graphdef, params).vision(pixels).sum()

    pixels, work = array(1, size, size, 3), REWARDS[kind](config, None).look_cost()
    assert work.total == pytest.approx(counted(run, pixels, params), rel=0.01)
    found = counted(jax.grad(run), pixels, params)
    assert work.gradient(trained=False, remat=remat, attention="xla").hardware == pytest.approx(found, rel=0.015)


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_reading(remat):
    """ImageReward's text encoder under a picture, differentiated by the picture."""
    config = shallow(BlipConfig())
    graphdef, params = network("blip", config, remat=remat)
    mask = jax.ShapeDtypeStruct((1, LENGTH), jnp.bool_)

    def run(image, words, mask, params):
        return bind(graphdef, params)(words, mask, image).sum()

    arguments = array(1, 197, 1024), array(1, LENGTH, 768), mask, params
    work = REWARDS["image_reward"](config, None).score_cost()
    assert work.total == pytest.approx(counted(run, *arguments), rel=0.01)
    found = counted(jax.grad(run), *arguments)
    assert work.gradient(trained=False, remat=remat, attention="xla").hardware == pytest.approx(found, rel=0.015)
