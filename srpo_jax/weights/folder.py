"""Our own files: a folder per network with ``config.json``, ``weights.safetensors`` and ``checksums.json``.

    config.json           {"format": "srpo_jax/1", "network": "flux", "config": {...}}   the network's config dataclass
    weights.safetensors   parameters by dotted path, shapes as in the network (blocks stacked on a leading axis)
    checksums.json        of the weights, see ``integrity``; folders of earlier versions have none and are not checked

Loading maps the file into memory and hands every device the slice that its sharding asks for, so a host reads what its
devices hold, once.
"""

import dataclasses
import functools
import importlib
import json
import math
import os
import pathlib
import types
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from srpo_jax import integrity, reading, schema
from srpo_jax.errors import UserError
from srpo_jax.models import compute as models_compute
from srpo_jax.models.compute import Compute, Params
from srpo_jax.weights import engine
from srpo_jax.weights.files import SafetensorsFile, SafetensorsWriter, Spec, read_json

FORMAT = "srpo_jax/1"
CONFIG, WEIGHTS = "config.json", "weights.safetensors"
DEFAULT = Compute()
# network: (module, class of its config, class of the network). A config is a frozen dataclass with ``from_dict``; a
# network is made by ``Class(config, compute, rngs=rngs)`` and has the table ``RULES`` of ``sharding``, a transformer
# also ``STACKS``, the names of its stacks of blocks.
NETWORKS = {
    "flux": ("srpo_jax.models.flux", "FluxConfig", "Flux"),
    "autoencoder": ("srpo_jax.models.autoencoder", "AutoencoderConfig", "Autoencoder"),
    "clip": ("srpo_jax.models.clip", "ClipConfig", "Clip"),
    "blip": ("srpo_jax.models.blip", "BlipConfig", "Blip"),
    "aesthetic": ("srpo_jax.models.aesthetic", "ClipAestheticConfig", "ClipAesthetic"),
    "aesthetic_v25": ("srpo_jax.models.aesthetic", "SiglipAestheticConfig", "SiglipAesthetic"),
    "clip_text": ("srpo_jax.models.clip", "ClipTextConfig", "ClipText"),
    "t5": ("srpo_jax.models.t5", "T5Config", "T5Encoder"),
}


def classes(network: str) -> tuple[Any, Any]:
    """(config class, network class) by the network's name. Raises ValueError for an unknown one."""
    if network not in NETWORKS:
        raise ValueError(f"network {network!r} is unknown; known: {', '.join(NETWORKS)}")
    module, config, constructor = NETWORKS[network]
    module = importlib.import_module(module)
    return getattr(module, config), getattr(module, constructor)


def constructor(network: str, config: Any, compute: Compute = DEFAULT) -> Callable[[nnx.Rngs], nnx.Module]:
    """Makes the network, with random parameters, from their generator."""
    make = classes(network)[1]
    return lambda rngs: make(config, compute, rngs=rngs)


def abstract(network: str, config: Any, compute: Compute = DEFAULT) -> tuple[nnx.GraphDef, Params]:
    """Graph definition and ``ShapeDtypeStruct`` parameters of a network. Uses no memory."""
    return models_compute.abstract(constructor(network, config, compute))


@functools.cache
def shapes(network: str, config: Any) -> Mapping[str, tuple[int, ...]]:
    """The shape of every parameter of a network, by dotted path."""
    leaves = engine.flatten(abstract(network, config)[1])
    return types.MappingProxyType({name: tuple(leaf.shape) for name, leaf in leaves.items()})


def parameters(network: str, config: Any) -> int:
    """How many numbers a network's parameters are."""
    return sum(math.prod(shape) for shape in shapes(network, config).values())


def is_ours(path: str | os.PathLike) -> bool:
    """Whether a folder is in our format."""
    try:
        marker = schema.parse(reading.content(pathlib.Path(path) / CONFIG))
    except (OSError, ValueError):
        return False
    return isinstance(marker, dict) and str(marker.get("format", "")).startswith("srpo_jax/")


def make_config(network: str, values: Any, where: Any) -> Any:
    """A network's config from the values of a file. Raises UserError naming ``where`` if they do not fit."""
    if not isinstance(values, Mapping):
        raise UserError(f"{where}: expected an object with the sizes of the network, found {schema.shown(values)}")
    try:
        found = classes(network)[0].from_dict(values)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error
    if words := schema.wrong(found):
        raise UserError(f"{where}: {words}")
    return found


def read_config(path: str | os.PathLike, network: str | None = None) -> tuple[str, Any]:
    """(network, its config) of a folder in our format.

    Raises UserError if the folder is not one, or holds another network than ``network``, if that is given.
    """
    path = pathlib.Path(path)
    if not path.is_dir():
        raise UserError(f"{path} is not a folder; expected one made by `python -m srpo_jax.convert import`")
    if not (path / CONFIG).exists():
        raise UserError(f"{path / CONFIG} does not exist; expected a folder of one network, made by `convert import`")
    content = read_json(path / CONFIG)
    if content.get("format") != FORMAT:
        raise UserError(
            f"{path} is not in the format {FORMAT} (its {CONFIG} says {content.get('format')!r}); "
            "convert it with `python -m srpo_jax.convert import`"
        )
    if content.get("network") not in list(NETWORKS):
        raise UserError(f"{path / CONFIG}: network {content.get('network')!r} is unknown")
    found = content["network"]
    if network is not None and found != network:
        raise UserError(f"{path} holds a {found} network; expected {network}")
    return found, make_config(found, content.get("config", {}), path / CONFIG)


def finish(path: pathlib.Path, network: str, config: Any) -> None:
    """Adds to the weights of a folder in our format its ``config.json`` and ``checksums.json``."""
    content = {"format": FORMAT, "network": network, "config": dataclasses.asdict(config)}
    temporary = path / f".{CONFIG}.{os.getpid()}.partial"
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path / CONFIG)
    integrity.seal_file(path / WEIGHTS)


def writer(path: pathlib.Path, specs: dict[str, Spec], progress: Callable[[int], object]) -> SafetensorsWriter:
    """The writer of a folder's ``weights.safetensors``."""
    return SafetensorsWriter(path / WEIGHTS, specs, {"format": FORMAT}, progress)


def save(path: str | os.PathLike, network: str, config: Any, params: Params, dtype: Any = None) -> None:
    """Writes a folder in our format; files of an earlier save are replaced.

    Args:
      path: the folder, made if there is none.
      network: its name, see ``NETWORKS``.
      config: the network's config.
      params: nested parameters, numpy or fully addressable jax arrays.
      dtype: to store in; None keeps each parameter's own.

    Raises ValueError if the parameters are not those of the network.
    """
    path = pathlib.Path(path)
    leaves = engine.flatten(params)
    expected = shapes(network, config)
    found = {name: tuple(leaf.shape) for name, leaf in leaves.items()}
    if found != expected:
        wrong = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        raise ValueError(f"these are not the parameters of this {network} network: {', '.join(wrong[:6])}")
    specs = {name: Spec(found[name], np.dtype(dtype or leaf.dtype)) for name, leaf in leaves.items()}
    path.mkdir(parents=True, exist_ok=True)
    integrity.break_seal(path / WEIGHTS)
    with writer(path, specs, lambda count: None) as out:
        for name, leaf in leaves.items():
            out.write(name, np.asarray(leaf))
    finish(path, network, config)


def open_weights(path: str | os.PathLike, network: str | None = None) -> tuple[str, Any, SafetensorsFile]:
    """(network, config, parameters as a lazy source) of a folder in our format, checked against the network's shapes.

    Raises UserError if the folder is not in our format, is not the ``network`` asked for, its weights do not fit it, or
    are not what was written (``integrity.check_file``).
    """
    path = pathlib.Path(path)
    found, config = read_config(path, network)
    if not (path / WEIGHTS).exists():
        raise UserError(f"{path / WEIGHTS} does not exist; convert the weights again")
    source = SafetensorsFile(path / WEIGHTS)
    integrity.check_file(path / WEIGHTS)
    expected = shapes(found, config)
    stored = {name: spec.shape for name, spec in source.specs.items()}
    wrong = sorted(name for name in expected.keys() | stored.keys() if expected.get(name) != stored.get(name))
    if wrong:
        raise UserError(f"{source.path} does not fit its {CONFIG}: {len(wrong)} parameters differ, as {wrong[0]}")
    return found, config, source


def load(
    path: str | os.PathLike,
    network: str | None = None,
    compute: Compute = DEFAULT,
    sharding: Callable[[str, tuple[int, ...]], jax.sharding.Sharding] | None = None,
) -> tuple[Any, nnx.GraphDef, Params]:
    """Reads a network in our format.

    Args:
      path: the folder.
      network: the expected one; None takes any.
      compute: execution options; parameters are cast to the dtypes that the network gives them under these.
      sharding: called with (dotted path, shape) for where each parameter goes, each device reading its slice only; None
        puts whole arrays on the default device.

    Returns:
      (config, graph definition, nested parameters as jax arrays).

    Raises UserError as ``open_weights`` does.
    """
    network, config, source = open_weights(path, network)
    graphdef, like = abstract(network, config, compute)

    def read(key_path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name = models_compute.path_name(key_path)
        if sharding is None:
            return jnp.array(source.read(name), leaf.dtype)
        return jax.make_array_from_callback(
            leaf.shape, sharding(name, leaf.shape), lambda index: np.asarray(source.read(name)[index], leaf.dtype)
        )

    return config, graphdef, jax.tree_util.tree_map_with_path(read, like)
