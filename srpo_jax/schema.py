"""What is read from files of ours is of the kinds that their dataclasses declare, whatever happened to the files."""

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any

LARGEST = 2**48  # of a whole number: no size, count or id is larger


def wrong(found: Any) -> str:
    """What of a dataclass made from a file is not as its annotations say, in words; "" if nothing is.

    Whole numbers are not negative and at most ``LARGEST``; others are finite.
    """
    hints = typing.get_type_hints(type(found))
    for field in dataclasses.fields(found):
        value = getattr(found, field.name)
        if not _fits(value, hints[field.name]):
            shown = repr(value)
            return (
                f"{field.name}={shown[:60] + '...' if len(shown) > 60 else shown} must be {_words(hints[field.name])}"
            )
        if dataclasses.is_dataclass(value) and (words := wrong(value)):
            return f"{field.name}: {words}"
    return ""


def _fits(value: Any, kind: Any) -> bool:
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is tuple:
        if not isinstance(value, tuple | list):
            return False
        if parts[1:] == (Ellipsis,):
            return all(_fits(item, parts[0]) for item in value)
        return len(value) == len(parts) and all(map(_fits, value, parts))
    if origin is list:
        return isinstance(value, list) and all(_fits(item, parts[0]) for item in value)
    if origin is not None and isinstance(origin, type) and issubclass(origin, Mapping):
        return isinstance(value, Mapping) and all(_fits(k, parts[0]) and _fits(v, parts[1]) for k, v in value.items())
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LARGEST
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if dataclasses.is_dataclass(kind):
        return isinstance(value, kind) and not wrong(value)
    return isinstance(value, kind) if isinstance(kind, type) else True


def _words(kind: Any) -> str:
    names = {int: "a whole number, not negative", float: "a finite number", bool: "true or false", str: "text"}
    return names.get(kind, "null") if kind in names or kind is type(None) else str(kind).replace("typing.", "")
