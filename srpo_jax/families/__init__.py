"""The model families, by the name of their transformer's network in ``weights.folder.NETWORKS``."""

import os
import pathlib

from srpo_jax.errors import UserError
from srpo_jax.families.base import INDEX, TRANSFORMER, Component, Family
from srpo_jax.families.flux import FLUX
from srpo_jax.weights import folder
from srpo_jax.weights.files import read_json

FAMILIES: dict[str, Family] = {family.network: family for family in (FLUX,)}


def of_pipeline(path: str | os.PathLike) -> Family:
    """The family of a pipeline folder in our format. Raises UserError for a folder that is not one."""
    return of_transformer(pathlib.Path(path) / TRANSFORMER)


def of_transformer(path: pathlib.Path) -> Family:
    """The family of a transformer's folder in our format. Raises UserError for a folder that is not one."""
    network, _ = folder.read_config(path)
    if network not in FAMILIES:
        raise UserError(f"{path} holds a {network} network; expected the transformer of {names()}")
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


def of_index(path: pathlib.Path) -> Family:
    """The family of a diffusers pipeline folder, by its ``model_index.json``. Raises UserError for another pipeline."""
    found = read_json(path / INDEX).get("_class_name")
    for family in FAMILIES.values():
        if family.pipeline == found:
            return family
    expected = " or ".join(family.pipeline for family in FAMILIES.values())
    words = f"a {found}" if isinstance(found, str) else "no pipeline"
    raise UserError(f"{path / INDEX} describes {words}; expected a {expected}")


def component_of(network: str) -> Component | None:
    """What a network is in a pipeline; None for one that is none's."""
    for family in FAMILIES.values():
        for component in family.components.values():
            if component.network == network:
                return component
    return None


def names() -> str:
    """For people."""
    return ", ".join(family.name for family in FAMILIES.values())
