"""Values of flags and of a config's keys: how their text is read and what is one of a kind, in one way for both."""

import ast
import os
from typing import Any

SEED = 2**64 - 1  # the largest, of as many bits as a key has; see seeds
LARGEST = 3.4028234663852886e38  # of float32, in which the numbers of a config are computed with
TFDS = "tfds:"  # before the name or the folder of a data set

# Kind: what one is called.
NAMES = {int: "a whole number", float: "a finite number", bool: "True or False", str: "text"}
MANY = {int: "whole numbers", float: "finite numbers", bool: "True or False", str: "texts"}
WORDS = {"true": True, "t": True, "yes": True, "1": True, "false": False, "f": False, "no": False, "0": False}


def fits(value: Any, kind: type) -> bool:
    """Whether a value is of a kind of ``NAMES``. Whole numbers are floats too; nan and what float32 lacks are not."""
    if kind in (int, float) and isinstance(value, bool):
        return False
    if kind is float:
        return isinstance(value, int | float) and abs(value) <= LARGEST
    return isinstance(value, kind)


def read(text: str, kind: type) -> Any:
    """The value that a text stands for. Raises ValueError, which says what is expected, if it is not of the kind."""
    try:
        value = WORDS[text.lower()] if kind is bool else kind(text)
    except (KeyError, ValueError):
        value = None
    if not fits(value, kind):
        raise ValueError(f"must be {NAMES[kind]}")
    return value


def read_list(text: str, kind: type) -> tuple:
    """The values of a list, written ``a,b``, ``('a', 'b')`` or ``['a', 'b']``; a text with a comma needs the latter.

    Raises ValueError, which says what is expected, if one of them is not of the kind.
    """
    text = text.strip()
    try:
        if text[:1] in ("(", "["):
            found = ast.literal_eval(text)
            values = tuple(found) if isinstance(found, tuple | list) else (found,)
        else:
            words = (word.strip() for word in text.split(","))
            values = tuple(read(word.strip("'\"") if kind is str else word, kind) for word in words if word)
    except (SyntaxError, ValueError):
        values = (None,)
    if not all(fits(value, kind) for value in values):
        raise ValueError(f"must be {MANY[kind]}, as {'one,two' if kind is str else '1,2'}")
    return values


def expand(path: str) -> str:
    """A path with the home folder in the place of its ``~``, which a shell leaves alone in ``--flag=~/folder``."""
    if path.startswith(TFDS):
        return TFDS + os.path.expanduser(path.removeprefix(TFDS))
    return os.path.expanduser(path)
