"""The prompts that pictures are judged on, each with a category to sort them by; 100 of our own come with the package.

Their head is a mixture of all categories, so that a few of them say something too.
"""

import os
import pathlib
from typing import NamedTuple

from srpo_jax.data import sources
from srpo_jax.errors import UserError

SHIPPED = pathlib.Path(__file__).with_name("prompts.csv")
CATEGORY = "category"  # the column that is taken where none is named


class Prompt(NamedTuple):
    """A prompt and its category, "" if there is none."""

    text: str
    category: str


def read(
    spec: str | os.PathLike = SHIPPED, column: str | None = None, category: str | None = None, count: int | None = None
) -> list[Prompt]:
    """The prompts of a source in its order, each once.

    Args:
      spec: as ``data.sources`` has it.
      column: of the prompts, where there are several.
      category: column of the categories. None takes the column ``CATEGORY`` where there is one, and else, of a pattern
        of several files, the names of the files.
      count: only so many from the head.

    Raises UserError as ``sources.read``.
    """
    first: dict[str, Prompt] = {}
    for prompt in _read(os.fspath(spec), column, category):
        first.setdefault(prompt.text, prompt)
    return list(first.values())[:count]


def _read(spec: str, column: str | None, category: str | None) -> list[Prompt]:
    if category is not None:
        return [Prompt(text, str(value or "")) for text, value in sources.read_beside(spec, column, category)]
    plain = [Prompt(text, "") for text in sources.read(spec, column)]  # what is wrong with the source is told here
    try:
        return [Prompt(text, str(value or "")) for text, value in sources.read_beside(spec, column, CATEGORY)]
    except UserError:  # no such column
        pass
    if not spec.startswith(sources.TFDS) and not os.path.isdir(spec) and len(files := sources.files(spec)) > 1:
        return [Prompt(text, file.stem) for file in files for text in sources.read(file, column)]
    return plain
