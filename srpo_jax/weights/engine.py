"""Runs conversion tables: strictly, and one tensor at a time.

Strictly: every foreign tensor is used exactly once, every parameter is filled exactly once, and all shapes agree;
otherwise nothing is converted and one UserError lists all that is wrong. The check comes before the first byte.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from srpo_jax.errors import UserError
from srpo_jax.models import compute
from srpo_jax.weights.files import Spec
from srpo_jax.weights.rules import Rule, Table

Params = compute.Params
_LISTED = 6  # names that an error message lists of each kind of fault


class Source(Protocol):
    """Tensors by name, read when they are asked for. ``path`` names the place in error messages."""

    path: Any
    specs: Mapping[str, Spec]

    def read(self, name: str) -> np.ndarray:
        """One tensor, perhaps a view of a file."""


class ParameterSource(Source, Protocol):
    """Our parameters by path; those of stacked blocks can be had layer by layer."""

    def read_layer(self, name: str, layer: int) -> np.ndarray:
        """``read(name)[layer]``, without the other layers where these need not be read."""


class MemorySource:
    """Arrays, or what ``numpy.asarray`` makes arrays of: a stack is made once and let go with its last layer."""

    def __init__(self, tensors: Mapping[str, Any], path: str = "the tensors in memory"):
        self.path = path
        self._tensors = tensors
        self._stacks: dict[str, np.ndarray] = {}
        self.specs = {name: Spec(tuple(a.shape), np.dtype(a.dtype)) for name, a in tensors.items()}

    def read(self, name: str) -> np.ndarray:
        """One tensor on the host."""
        return np.asarray(self._tensors[name])

    def read_layer(self, name: str, layer: int) -> np.ndarray:
        """One layer of a stack. Layers are expected in order."""
        stack = self._stacks.pop(name, None)
        if stack is None:
            stack = self.read(name)
        if layer + 1 < len(stack):
            self._stacks[name] = stack
        return stack[layer]


def flatten(params: Params) -> dict[str, Any]:
    """``{dotted path: leaf}`` of nested parameters."""
    return {compute.path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


def unflatten(leaves: Mapping[str, Any], like: Params) -> Params:
    """The inverse of ``flatten``; ``like`` has the nesting (numbered entries of lists have integer keys)."""
    return jax.tree_util.tree_map_with_path(lambda path, _: leaves[compute.path_name(path)], like)


def _layers(rule: Rule) -> range:
    return range(1 if rule.layers is None else rule.layers)


def _layer_shapes(rule: Rule, shapes: Mapping[str, tuple[int, ...]]) -> list[tuple[int, ...]]:
    """The shapes of a rule's targets for one layer. Raises ValueError if a stack has another number of layers."""
    found = [tuple(shapes[name]) for name in rule.targets]
    if rule.layers is None:
        return found
    for name, shape in zip(rule.targets, found, strict=True):
        if not shape or shape[0] != rule.layers:
            raise ValueError(f"{name} has shape {shape}: it is not a stack of {rule.layers} layers")
    return [shape[1:] for shape in found]


def _blank(shape: tuple[int, ...]) -> np.ndarray:
    """An array that has a shape and next to no memory, for asking a transform what it does to shapes."""
    return np.broadcast_to(np.zeros((), np.bool_), shape)


def source_shapes(table: Table, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The foreign tensors, ``{name: shape}``, that belong to parameters of the given shapes.

    Raises ValueError if table and parameters do not cover each other: a fault of the table.
    """
    named = {name for rule in table.rules for name in rule.targets}
    if named != set(shapes):
        raise ValueError(f"the table and the network differ in {sorted(named ^ set(shapes))}")
    result = {}
    for rule in table.rules:
        blanks = rule.transform.inverse([_blank(shape) for shape in _layer_shapes(rule, shapes)])
        for layer in _layers(rule):
            names = rule.layer_sources(layer)
            result.update(zip(names, (blank.shape for blank in blanks), strict=True))
    return result


def check(
    table: Table, source: Source, shapes: Mapping[str, tuple[int, ...]], network: str, remark: str = ""
) -> dict[str, str]:
    """Checks that a source holds exactly what a network's parameters need.

    Args:
      table: the rules.
      source: the foreign tensors.
      shapes: of all parameters, by path.
      network: what the network is called in messages.
      remark: added to the message.

    Returns:
      For every foreign tensor of the table the name under which this source has it (another one only for aliases).

    Raises UserError with all faults: missing, unused, mismatching and integer tensors, tied tensors that differ.
    """
    expected = source_shapes(table, shapes)
    place = {name: name for name in expected if name in source.specs}
    kinds = ("missing", "wrong shape", "not of floating point", "tied but different", "not used")
    faults: dict[str, list[str]] = {kind: [] for kind in kinds}
    for alias, name in table.aliases.items():
        if alias not in source.specs:
            continue
        if name not in place:
            place[name] = alias
        elif not _same(source.read(alias), source.read(name)):
            faults["tied but different"].append(f"{alias} and {name}")
    for name, shape in expected.items():
        if name not in place:
            faults["missing"].append(name)
        elif source.specs[place[name]].shape != shape:
            faults["wrong shape"].append(f"{name} {list(source.specs[place[name]].shape)} instead of {list(shape)}")
        elif not jnp.issubdtype(source.specs[place[name]].dtype, jnp.floating):
            faults["not of floating point"].append(f"{name} ({source.specs[place[name]].dtype.name})")
    known = set(expected) | set(table.aliases) | table.ignored
    faults["not used"] = [name for name in source.specs if name not in known and not name.startswith(table.unread)]
    listed = "; ".join(f"{len(names)} {fault}: {_shorten(names)}" for fault, names in faults.items() if names)
    if listed:
        raise UserError(f"{source.path} does not hold this {network} network{remark}: {listed}")
    return place


def unread(table: Table, source: Source) -> list[str]:
    """The names of what a source holds that the network does not have (``Table.unread``)."""
    return [name for name in source.specs if name.startswith(table.unread)]


def _shorten(names: list[str]) -> str:
    rest = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f" and {rest} more" if rest > 0 else "")


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal bit for bit."""
    return a.shape == b.shape and a.dtype == b.dtype and np.array_equal(_bits(a), _bits(b))


def _bits(array: np.ndarray) -> np.ndarray:
    return array.view(np.dtype(f"u{array.dtype.itemsize}"))


def kept_dtype(dtypes: list[np.dtype]) -> np.dtype:
    """The dtype that holds tensors of these dtypes without loss: their own if they agree, else float32 or float64."""
    if len(set(dtypes)) == 1:
        return dtypes[0]
    return np.dtype(np.float64 if np.dtype(np.float64) in dtypes else np.float32)


def target_specs(
    table: Table,
    source: Source,
    place: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
    dtype: np.dtype | None,
) -> dict[str, Spec]:
    """Shape and dtype of every parameter; ``dtype`` None keeps what the source has."""
    specs = {}
    for rule in table.rules:
        names = [name for layer in _layers(rule) for name in rule.layer_sources(layer)]
        kept = dtype or kept_dtype([source.specs[place[name]].dtype for name in names])
        specs.update({target: Spec(tuple(shapes[target]), kept) for target in rule.targets})
    return specs


def imported(table: Table, source: Source, place: Mapping[str, str]) -> Iterator[tuple[str, int | None, np.ndarray]]:
    """Yields (parameter path, layer or None, array) for all parameters; a stack comes layer by layer.

    The arrays are views of the source's tensors where the transform allows; nothing is held between steps.
    """
    for rule in table.rules:
        for layer in _layers(rule):
            arrays = [source.read(place[name]) for name in rule.layer_sources(layer)]
            index = None if rule.layers is None else layer
            for target, array in zip(rule.targets, rule.transform.forward(_agreeing(arrays)), strict=True):
                yield target, index, array


def exported(table: Table, source: ParameterSource) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (foreign name, array) for all foreign tensors; ``source`` holds our parameters by path."""
    for rule in table.rules:
        for layer in _layers(rule):
            if rule.layers is None:
                arrays = [source.read(name) for name in rule.targets]
            else:
                arrays = [source.read_layer(name, layer) for name in rule.targets]
            yield from zip(rule.layer_sources(layer), rule.transform.inverse(_agreeing(arrays)), strict=True)


def _agreeing(arrays: list[np.ndarray]) -> list[np.ndarray]:
    """Brings arrays that a transform may put together to one dtype, losslessly."""
    dtype = kept_dtype([array.dtype for array in arrays])
    return [array if array.dtype == dtype else array.astype(dtype) for array in arrays]


def exported_specs(table: Table, specs: Mapping[str, Spec], dtype: np.dtype | None) -> dict[str, Spec]:
    """Shape and dtype of every foreign tensor that parameters of ours make; ``dtype`` None keeps ours."""
    shapes = source_shapes(table, {name: spec.shape for name, spec in specs.items()})
    result = {}
    for rule in table.rules:
        kept = dtype or kept_dtype([specs[name].dtype for name in rule.targets])
        for layer in _layers(rule):
            result.update({name: Spec(shapes[name], kept) for name in rule.layer_sources(layer)})
    return result


def to_params(table: Table, tensors: Mapping[str, Any], like: Params, network: str = "given") -> Params:
    """Foreign tensors in memory -> nested parameters (numpy arrays, dtypes kept), strictly.

    ``like`` has the parameters' nesting and shapes (``compute.abstract``). Raises UserError as ``check`` does.
    """
    source = MemorySource(tensors)
    shapes = {path: tuple(leaf.shape) for path, leaf in flatten(like).items()}
    place = check(table, source, shapes, network)
    specs = target_specs(table, source, place, shapes, None)
    arrays = {path: np.empty(spec.shape, spec.dtype) for path, spec in specs.items()}
    for path, layer, array in imported(table, source, place):
        arrays[path][... if layer is None else layer] = array
    return unflatten(arrays, like)


def from_params(table: Table, params: Params) -> dict[str, np.ndarray]:
    """Nested parameters -> foreign tensors in memory (contiguous numpy arrays): the inverse of ``to_params``."""
    source = MemorySource(flatten(params), "the parameters")
    source_shapes(table, {path: spec.shape for path, spec in source.specs.items()})
    return {name: np.array(array, order="C") for name, array in exported(table, source)}
