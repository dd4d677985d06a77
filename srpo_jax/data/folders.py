"""Pictures with captions in a folder, and in folders below it and linked into it.

    fox.png, fox.txt      a caption beside its picture, or in fox.caption
    metadata.jsonl        an object a line with "file_name", a path from the folder that this file is in, and a caption
    metadata.csv          the same as a table; as Hugging Face's imagefolder
    metadata.parquet      the same

Folders and files whose names begin with a point are not looked at. Where a folder has a metadata file, of the pictures
in it and below it only those that a file names are used; how many are not is said.
"""

import functools
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from srpo_jax import reading, terminal
from srpo_jax.data import plain, sources, tables
from srpo_jax.errors import UserError

EXTENSIONS = (
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif", ".jp2"),
)
# Pictures that cannot be decoded here: named, and not passed over.
STRANGE = (".heic", ".heif", ".jxl", ".svg", ".psd", ".xcf", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2")
METADATA, FILE_NAME = ("metadata.jsonl", "metadata.csv", "metadata.parquet"), "file_name"
SIDECARS = (".txt", ".caption")
# What holds pictures by the hundred: to be unpacked first.
ARCHIVES = (".tar", ".zip", ".parquet", ".arrow", ".tfrecord", ".7z")


class Picture(NamedTuple):
    """A picture that is not read yet: its name for people, its caption, and ``content()``, the file's bytes."""

    name: str
    caption: str
    content: Callable[[], bytes]


def read(folder: pathlib.Path, column: str | None, outside: bool, largest: int) -> Iterator[Picture | str]:
    """The pictures of a folder, those without a caption too, and what is wrong with others, a line each.

    Args:
      folder: where they lie.
      column: of the captions, in metadata files.
      outside: whether metadata files may name pictures outside of the folder, by ``..``, absolute paths or links.
      largest: bytes of a picture's file that are read at most.

    Raises UserError if the folder holds no picture, cannot be read, or a metadata file cannot.
    """
    files = sorted(_walk(folder, set()))
    metadata = [file for file in files if file.name in METADATA]
    if not metadata and column is not None:
        raise UserError(
            f"{folder} has no {METADATA[0]}: captions are text files, without columns; leave out {column!r}"
        )
    homes = [file.parent for file in metadata]
    if twice := next((home for home in homes if homes.count(home) > 1), None):
        names = " and ".join(file.name for file in metadata if file.parent == twice)
        raise UserError(f"{twice} has {names}; keep one of them")
    named = set()
    for file in metadata:
        for path, picture in _read_metadata(file, column, None if outside else folder, largest):
            named.add(path)
            yield picture
    pictures = [file for file in files if file.suffix.lower() in (*EXTENSIONS, *STRANGE)]
    if not pictures and not metadata:
        raise UserError(f"{folder} holds no picture ({', '.join(EXTENSIONS)}){_unpack(files)}")
    unnamed = []
    for file in [file for file in pictures if str(file) not in named]:
        if any(home in file.parents for home in homes):
            unnamed.append(file)
        else:
            yield _beside(file, largest)
    if unnamed:
        terminal.warn(f"{len(unnamed)} pictures that no metadata file names are left out, as {unnamed[0]}")


def _walk(folder: pathlib.Path, seen: set[str]) -> Iterator[pathlib.Path]:
    """All files, each folder once however it is linked, under its own name rather than a link's."""
    seen.add(os.path.realpath(folder))
    try:
        there = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error.strerror}") from error
    inner = []
    for path in there:
        if path.is_dir():
            inner.append(path)
        else:
            yield path
    for path in sorted(inner, key=pathlib.Path.is_symlink):
        if os.path.realpath(path) not in seen:
            yield from _walk(path, seen)


def _unpack(files: Iterable[pathlib.Path]) -> str:
    found = next((file for file in files if file.suffix.lower() in ARCHIVES), None)
    return f"; {found} is not looked into: unpack it into pictures with a caption beside each" if found else ""


def _content(file: pathlib.Path, largest: int) -> Callable[[], bytes]:
    return functools.partial(reading.content, file, largest)


def _beside(file: pathlib.Path, largest: int) -> Picture | str:
    """A picture with the caption beside it; what is wrong if there is none that can be read, or two."""
    if file.suffix.lower() in STRANGE:
        return f"{file} is a picture of a kind that is not read; save it as PNG"
    texts = {}
    try:
        for sidecar in (file.with_suffix(ending) for suffix in SIDECARS for ending in (suffix, suffix.upper())):
            if sidecar.exists():
                texts[sidecar] = plain.prompt(" ".join(plain.read_text(sidecar).split()), str(sidecar))
    except UserError as error:
        return str(error)
    if len(set(texts.values())) > 1:
        return f"{file} has several captions, in {' and '.join(path.name for path in texts)}; keep one of them"
    return Picture(str(file), next(iter(texts.values()), ""), _content(file, largest))


# --- metadata files ---------------------------------------------------------------------------------------------------


def _leads_out(folder: pathlib.Path, path: pathlib.Path) -> bool:
    """Whether a path is, links followed, that of a file outside of a folder."""
    root = os.path.realpath(folder)
    try:
        return os.path.commonpath([root, os.path.realpath(path)]) != root
    except ValueError:  # no file can have this name, as reading it will tell
        return False


def _read_metadata(
    file: pathlib.Path, column: str | None, within: pathlib.Path | None, largest: int
) -> Iterator[tuple[str, Picture | str]]:
    """The path of each picture that a file names, "" if it is none, and the picture, or what is wrong with it, as being
    outside of the folder ``within``."""
    for name, caption, place in _ROWS[file.suffix](file, column):
        where = f"{file}, {place}"
        try:
            if not isinstance(name, str) or not name:
                raise UserError(f"{where}: expected an object with {FILE_NAME!r}")
            plain.check(name, where)
            if not isinstance(caption, str | None):
                raise UserError(f"{where}: the caption is not text")
            path = file.parent / name
            shown = f"{file.parent / (name if len(name) <= 255 else name[:60] + '...')} ({file.name}, {place})"
            if within is not None and _leads_out(within, path):
                raise UserError(
                    f"{shown} lies outside of {within}; copy it there, or let such pictures be read by --outside=read"
                )
            picture = Picture(shown, plain.prompt(caption or "", where), _content(path, largest))
            yield os.path.normpath(path), picture
        except UserError as error:
            yield os.path.normpath(file.parent / name) if isinstance(name, str) else "", str(error)


Rows = Iterator[tuple[Any, Any, str]]  # file name, caption, and the place, as "line 3"


def _caption_column(names: Iterable[str], column: str | None, file: pathlib.Path) -> str:
    if FILE_NAME not in names:
        raise UserError(f"{file} has no column {FILE_NAME!r}; there are {', '.join(map(repr, names)) or 'none'}")
    return sources.choose_column([name for name in names if name != FILE_NAME], column, file)


def _rows_of_json(file: pathlib.Path, column: str | None) -> Rows:
    found = list(sources.json_lines(file))
    objects = [item for item, _ in found if isinstance(item, dict)]
    names = dict.fromkeys(key for item in objects for key in item)
    chosen = _caption_column(names, column, file) if any(FILE_NAME in item for item in objects) else ""
    for item, place in found:
        item = item if isinstance(item, dict) else {}
        yield item.get(FILE_NAME), item.get(chosen), place


def _rows_of_table(file: pathlib.Path, column: str | None) -> Rows:
    names, rows = tables.read(file, lambda names: FILE_NAME in names)
    chosen = names.index(_caption_column(names, column, file))
    for row, place in rows:
        yield row[names.index(FILE_NAME)], row[chosen], place


def _rows_of_parquet(file: pathlib.Path, column: str | None) -> Rows:
    names = sources.parquet_columns(file)
    chosen = _caption_column(names, column, file)
    pairs = zip(sources.read_parquet(file, FILE_NAME), sources.read_parquet(file, chosen), strict=True)
    for (name, place), (caption, _) in pairs:
        yield name, caption, place


_ROWS = {".jsonl": _rows_of_json, ".csv": _rows_of_table, ".parquet": _rows_of_parquet}
