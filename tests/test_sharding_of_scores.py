"""The rules of scores' networks at full size: every parameter has a place, every rule is used."""

import math
import re

import pytest
from jax.sharding import AbstractMesh

from srpo_jax import sharding
from srpo_jax.rewards import REWARDS
from srpo_jax.weights import engine, folder

KINDS = ("image_reward", "aesthetic", "aesthetic_v25")


def parameters(kind):
    return folder.abstract(REWARDS[kind].network, REWARDS[kind].published)[1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 8, 1), (1, 16, 4), (1, 64, 1), (1, 256, 1)])
def test_every_parameter_of_full_size_has_its_place(kind, shape):
    """Whole on every device are heads, tables of positions, patches, and what 256 does not divide of SigLIP's."""
    mesh, params = AbstractMesh(shape, sharding.AXES), parameters(kind)
    places = engine.flatten(sharding.of_tree(mesh, REWARDS[kind].network, params))
    shapes = {name: leaf.shape for name, leaf in engine.flatten(params).items()}
    held = sum(math.prod(places[name].shard_shape(shape)) for name, shape in shapes.items())
    share = held / sum(map(math.prod, shapes.values()))
    if (kind, shape[1]) == ("aesthetic_v25", 256):
        assert share == 1
    else:
        assert 0 <= share - 1 / (mesh.shape["fsdp"] * mesh.shape["tensor"]) < 0.025


@pytest.mark.parametrize("kind", KINDS)
def test_every_rule_is_used(kind):
    patterns = [pattern for pattern, _ in folder.classes(REWARDS[kind].network)[1].RULES]
    paths = engine.flatten(parameters(kind))
    assert {next(p for p in patterns if re.fullmatch(p, path)) for path in paths} == set(patterns)
