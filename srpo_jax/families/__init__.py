"""The model families, by the name of their transformer's network in ``weights.folder.NETWORKS``."""

import os
import pathlib

from srpo_jax.errors import UserError
from srpo_jax.families.base import TRANSFORMER, Family
from srpo_jax.families.flux import FLUX
from srpo_jax.weights import folder

FAMILIES: dict[str, Family] = {family.network: family for family in (FLUX,)}


def of_pipeline(path: str | os.PathLike) -> Family:
    """The family of a pipeline folder in our format. Raises UserError for a folder that is not one."""
    where = pathlib.Path(path) / TRANSFORMER
    network, _ = folder.read_config(where)
    if network not in FAMILIES:
        raise UserError(f"{where} holds a {network} network; expected the transformer of one of {names()}")
    return FAMILIES[network]


def published() -> list[str]:
    """The names of all published sizes."""
    return [name for family in FAMILIES.values() for name in family.published]


def of_published(name: str) -> Family:
    """The family that has published sizes of this name. Raises UserError for an unknown name."""
    for family in FAMILIES.values():
        if name in family.published:
            return family
    raise UserError(f"{name!r} is unknown; choose one of {', '.join(published())}")


def names() -> str:
    """For people."""
    return ", ".join(family.name for family in FAMILIES.values())
