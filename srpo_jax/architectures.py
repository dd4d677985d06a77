"""The sizes of a run's networks: read from the folders that a configuration names, or published ones.

A run reads its sizes from converted folders; ``preflight`` and ``benchmark`` can work before anything was downloaded,
by the published sizes that families and rewards know.
"""

import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from srpo_jax import families
from srpo_jax.families.base import AUTOENCODER, TRANSFORMER, Family, Sizes
from srpo_jax.rewards import REWARDS
from srpo_jax.weights import folder


class Architecture(NamedTuple):
    """The sizes of the networks of a run, and the family that its pipeline belongs to.

    ``text`` are the text encoders' by folder, ``rewards`` by name those in use.
    """

    family: Family
    transformer: Any
    autoencoder: Any
    text: Mapping[str, Any]
    rewards: Mapping[str, Any]


class UsedReward(NamedTuple):
    """An entry of ``config.reward.models`` that has a weight."""

    kind: str
    path: str | None
    weight: float


def used_rewards(config: ConfigDict) -> dict[str, UsedReward]:
    """The rewards of a configuration that have a weight, by name."""
    models = config.reward.models
    used = {name: UsedReward(models[name].kind, models[name].path, models[name].weight) for name in sorted(models)}
    return {name: reward for name, reward in used.items() if reward.weight}


def read(config: ConfigDict) -> Architecture:
    """The sizes of the folders that a configuration names. Raises UserError for a folder that is not right."""
    family, sizes = read_pipeline(config.model.path)
    rewards = {
        name: folder.read_config(reward.path, REWARDS[reward.kind].network)[1]
        for name, reward in used_rewards(config).items()
    }
    return Architecture(family, *sizes, rewards)


def read_pipeline(path: str | os.PathLike) -> tuple[Family, Sizes]:
    """The family and the sizes of a pipeline folder. Raises UserError if it is not one, or does not fit together."""
    family, path = families.of_pipeline(path), pathlib.Path(path)
    found = {part: folder.read_config(path / part, what.network)[1] for part, what in family.components.items()}
    sizes = Sizes(found[TRANSFORMER], found[AUTOENCODER], {part: found[part] for part in family.text_folders})
    family.check(sizes, path)
    return family, sizes


def published(config: ConfigDict, name: str) -> Architecture:
    """The published sizes: pipeline ``name`` of a family's, and the rewards that ``config`` gives a weight."""
    family = families.of_published(name)
    rewards = {name: REWARDS[reward.kind].published for name, reward in used_rewards(config).items()}
    return Architecture(family, *family.published[name], rewards)
