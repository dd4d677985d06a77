"""Tables of text: CSV and TSV as programs and people write them, with a line of column names.

The separator is what the header says and not what the name says: ``,``, ``;``, a tab or ``|``, or what Excel's first
line ``sep=;`` names.
"""

import csv
import io
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence

from srpo_jax.data import plain
from srpo_jax.errors import UserError

SEPARATORS = (",", ";", "\t", "|")
_SEP = re.compile(r'"?sep=(.)"?(\r\n|\r|\n)', re.IGNORECASE)
LARGEST_FIELD = 1 << 30  # characters


def read(
    path: pathlib.Path, good: Callable[[Sequence[str]], bool], pipe: bool = False
) -> tuple[list[str], Iterator[tuple[list[str], str]]]:
    """The column names of a table, and its rows with their places, as "line 3".

    Args:
      path: the file.
      good: whether column names are what is looked for: where several separators are possible, it decides.
      pipe: whether the file may be a pipe.

    Raises UserError if it cannot be read, or while it is read for a row that does not fit the names.
    """
    csv.field_size_limit(LARGEST_FIELD)
    text, skipped = plain.read_text(path, pipe), 0
    if found := _SEP.match(text):
        separator, text, skipped = found[1], text[found.end() :], 1
    else:
        separator = _separator(text, "\t" if plain.kind(path) == ".tsv" else ",", good)
    rows = _reader(text, separator)

    def place() -> str:
        return f"line {rows.line_num + skipped}"

    try:
        names = _names(rows)
    except csv.Error as error:
        raise UserError(f"{path}, {place()}: {error}") from error

    def rest() -> Iterator[tuple[list[str], str]]:
        try:
            for row in rows:
                if row and len(row) != len(names):
                    raise UserError(
                        f"{path}, {place()}: {len(row)} fields under {len(names)} columns; "
                        "put quotes around text that holds the separator"
                    )
                if row:
                    yield row, place()
        except csv.Error as error:
            raise UserError(f"{path}, {place()}: {error}") from error

    return names, rest()


def _reader(text: str, separator: str) -> Iterator[list[str]]:
    return csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)


def _names(rows: Iterator[list[str]]) -> list[str]:
    """The column names: the first row that is not empty."""
    return [name.replace("\ufeff", "").strip() for name in next((row for row in rows if row), [])]


def _separator(text: str, usual: str, good: Callable[[Sequence[str]], bool]) -> str:
    """The one under which the header is what is looked for; else the one that gives the most columns."""
    found = {}
    for separator in dict.fromkeys((usual, *SEPARATORS)):
        try:
            found[separator] = _names(_reader(text, separator))
        except csv.Error:
            continue
        if good(found[separator]):
            return separator
    return max(found, key=lambda separator: len(found[separator]), default=usual)
