"""What is read from files is of the kinds, and within the ranges, that dataclasses declare, whatever they hold.

    @dataclasses.dataclass(frozen=True)
    class Sizes:
        width: Size
        layers: Annotated[int, Range(1, 64)]
        rates: Annotated[tuple[float, ...], Range(1, 3)]   # one to three of them

Plain whole numbers are not negative and at most ``LARGEST``; all numbers are finite. What annotations cannot say, as
that one number divides another, a dataclass's own methods check.
"""

import dataclasses
import functools
import json
import math
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple

LARGEST = 2**48  # of a whole number: no size, count or id is larger


class Range(NamedTuple):
    """Of a number, or of the length of a list: the ends belong to it."""

    least: float
    most: float


LARGEST_SIZE = 2**20
Size = Annotated[int, Range(1, LARGEST_SIZE)]  # a width, a number of heads or channels, pixels, a vocabulary
Side = Annotated[int, Range(1, 4096)]  # of a tower's picture or patch, in pixels
Layers = Annotated[int, Range(1, 1024)]
Widths = Annotated[tuple[Size, ...], Range(1, 16)]  # of one layer after the other
Epsilon = Annotated[float, Range(0, 1)]


def parse(text: str | bytes) -> Any:
    """The value that JSON stands for. Raises ValueError for what is none, or is nested too deeply to be read."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def take(kind: type, content: Any, where: Any) -> dict[str, Any]:
    """The entries of a JSON object that are fields of a dataclass; others are left alone, lists become tuples.

    Args:
      kind: the dataclass.
      content: what a file holds. A field that is a dataclass itself has an object, which is not looked into.
      where: what it is or where it stands, for the message.

    Raises ValueError that names the key, its value and what it must be.
    """
    if not isinstance(content, Mapping):
        raise ValueError(f"{where}: expected an object, found {shown(content)}")
    found = {}
    for name, declared in _hints(kind).items():
        if name not in content:
            continue
        value = content[name]
        if not _fits(value, declared, Mapping):
            raise ValueError(f"{where}: {name}={shown(value)} must be {_words(declared)}")
        found[name] = tuple(value) if isinstance(value, list) else value
    return found


def read(kind: type, content: Any, where: Any) -> Any:
    """A dataclass from a JSON object, whose other entries are left alone. Raises ValueError as ``take`` does, and for a
    key that is missing."""
    found = take(kind, content, where)
    needed = [
        field.name
        for field in dataclasses.fields(kind)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if missing := [name for name in needed if name not in found]:
        raise ValueError(f"{where}: {', '.join(map(repr, missing))} {'are' if missing[1:] else 'is'} missing")
    return kind(**found)


def rebuild(kind: type, content: Any, where: Any) -> Any:
    """A dataclass, with those that it holds, from the JSON that ``dataclasses.asdict`` gives. Raises ValueError for
    what it never gives: an entry too few or too many, or a value of another kind."""
    try:
        found = _rebuilt(kind, content)
    except (TypeError, AttributeError) as error:
        raise ValueError(f"{where}: {error}") from error
    if words := wrong(found):
        raise ValueError(f"{where}: {words}")
    return found


def _rebuilt(kind: Any, value: Any) -> Any:
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        hints = _hints(kind)
        return kind(**{name: _rebuilt(hints.get(name, Any), item) for name, item in value.items()})
    if origin is Annotated:
        return _rebuilt(parts[0], value)
    if origin is tuple and isinstance(value, list):
        return tuple(value)
    if origin is list and isinstance(value, list):
        return [_rebuilt(parts[0], item) for item in value]
    if origin is dict and isinstance(value, dict):
        return {name: _rebuilt(parts[1], item) for name, item in value.items()}
    return value


def wrong(found: Any) -> str:
    """What of a dataclass made from a file is not as its annotations say, in words; "" if nothing is."""
    for name, declared in _hints(type(found)).items():
        value = getattr(found, name)
        if not _fits(value, declared, None):
            return f"{name}={shown(value)} must be {_words(declared)}"
        if dataclasses.is_dataclass(value) and (words := wrong(value)):
            return f"{name}: {words}"
    return ""


def shown(value: Any) -> str:
    """A value of a file in a message: its first 60 characters."""
    try:
        words = repr(value)
    except (ValueError, RecursionError):  # a number of thousands of digits; lists in lists in lists
        return f"a {type(value).__name__} that is too large to be shown"
    return words[:60] + "..." if len(words) > 60 else words


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    hints = typing.get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _fits(value: Any, kind: Any, nested: type | None) -> bool:
    """Whether a value is of a declared kind; ``nested`` is what stands for a dataclass, None is itself."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return True
    if origin is Annotated:
        base, (least, most) = parts
        if base is int:
            return _whole(value) and least <= value <= most
        return _fits(value, base, nested) and least <= (value if base is float else len(value)) <= most
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, part, nested) for part in parts)
    if origin is tuple:
        if not isinstance(value, tuple | list):
            return False
        if parts[1:] == (Ellipsis,):
            return all(_fits(item, parts[0], nested) for item in value)
        return len(value) == len(parts) and all(
            _fits(item, part, nested) for item, part in zip(value, parts, strict=True)
        )
    if origin is list:
        return isinstance(value, list) and all(_fits(item, parts[0], nested) for item in value)
    if origin is not None and isinstance(origin, type) and issubclass(origin, Mapping):
        return isinstance(value, Mapping) and all(
            _fits(key, parts[0], nested) and _fits(item, parts[1], nested) for key, item in value.items()
        )
    if kind is int:
        return _whole(value) and 0 <= value <= LARGEST
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf
    if dataclasses.is_dataclass(kind):
        return isinstance(value, nested) if nested else isinstance(value, kind) and not wrong(value)
    return isinstance(value, kind) if isinstance(kind, type) else True


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _words(kind: Any) -> str:
    names = {
        int: "a whole number, not negative",
        float: "a finite number",
        bool: "true or false",
        str: "text",
        type(None): "null",
        dict: "an object",
        list: "a list",
    }
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if kind in names:
        return names[kind]
    if origin is Annotated:
        least, most = (f"{end:.12g}" for end in parts[1])
        bounds = f"from {least} to {most}"
        if typing.get_origin(parts[0]) is tuple:
            return f"{_words(parts[0])}; {bounds} of them"
        return f"{'a whole number' if parts[0] is int else 'a number'} {bounds}"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_words(part) for part in parts)
    if origin in (tuple, list):
        if parts[1:] == (Ellipsis,) or origin is list:
            return f"a list, each {_words(parts[0])}"
        return f"a list of {len(parts)}: {', '.join(_words(part) for part in parts)}"
    if dataclasses.is_dataclass(kind) or (isinstance(origin, type) and issubclass(origin, Mapping)):
        return "an object" + (f", each entry {_words(parts[1])}" if parts else "")
    return str(kind)
