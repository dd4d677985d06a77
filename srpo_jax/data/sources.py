"""Prompts as people have them: text, CSV, JSON, JSON Lines, Parquet and tensorflow-datasets.

    prompts.txt            one prompt a line, as any file whose name ends in none of the following
    prompts.csv, .tsv      with a line of column names; separated by commas, semicolons, tabs or |
    prompts.jsonl          an object or a string a line (also .ndjson)
    prompts.json           a list of strings (HPDv2's benchmark), or of objects: HPDv2's train.json ("prompt"), the
                           videos2caption.json of SRPO, DanceGRPO and FastVideo ("caption")
    data/*.parquet         a pattern: all files that match, sorted by name
    tfds:NAME[:SPLIT]      a prepared data set of tensorflow-datasets, or the folder of one
    FOLDER                 the same, if FOLDER holds a dataset_info.json

Files may be packed: prompts.txt.gz, prompts.csv.xz. Where there are columns, one of them is named, or exactly one of
``COLUMNS`` is among them, in capital letters or not: a column of another name may hold numbers, or be a prompt itself.
"""

import contextlib
import glob
import io
import os
import pathlib
import string
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from srpo_jax import reading, schema
from srpo_jax.data import plain, tables
from srpo_jax.errors import UserError
from srpo_jax.values import TFDS

LONGEST = 255  # bytes of a file's name
COLUMNS = ("prompt", "caption", "text")  # taken where no column is named
FLAGS = "--column=NAME (of a recipe, --config.data.column=NAME or --config.sample.column=NAME)"


def read(spec: str | os.PathLike, column: str | None = None) -> list[str]:
    """The prompts of a source in its order, as ``plain.prompt`` has them; empty ones are dropped.

    Args:
      spec: as above.
      column: of the text, where there are columns.

    Raises UserError if the source is missing or is not what its name says, has no such column, or holds no prompt.
    """
    return [prompt for where, values in _parts(spec, column) for prompt, _ in _texts(values, where)]


def read_beside(spec: str | os.PathLike, column: str | None, beside: str) -> list[tuple[str, Any]]:
    """The prompts as ``read``, each with what another column, ``beside``, has for it.

    Raises UserError as ``read``, and if there is no such column.
    """
    found = []
    for (where, values), (_, others) in zip(_parts(spec, column), _parts(spec, beside), strict=True):
        by_place = {place: value for value, place in others}
        for place, value in by_place.items():
            if isinstance(value, str):
                plain.check(value, f"{where}, {place}")
        found += [(prompt, by_place[place]) for prompt, place in _texts(values, where)]
    return found


def files(spec: str | os.PathLike) -> list[pathlib.Path]:
    """The file of a source, or those that match a pattern, sorted by name. Raises UserError if none does."""
    spec = os.fspath(spec)
    if os.path.exists(spec) or not glob.has_magic(spec):
        return [pathlib.Path(spec)]
    if not (found := sorted(glob.glob(spec))):
        raise UserError(f"{spec} matches no file")
    return [pathlib.Path(file) for file in found]


def _parts(spec: str | os.PathLike, column: str | None) -> Iterator[tuple[Any, Iterable[tuple[Any, Any]]]]:
    """Where prompts are read from, and the values there with their places, of each file of a source."""
    spec = os.fspath(spec)
    path = pathlib.Path(spec)
    if len(os.fsencode(path.name)) > LONGEST:
        raise UserError(f"{spec[:60]!r}... is too long for the name of a file; a prompt itself is given by --prompt")
    if spec.startswith(TFDS):
        yield spec, read_tfds(spec.removeprefix(TFDS), column)
    elif is_tfds(path):
        yield spec, read_tfds(spec, column)
    elif path.is_dir():
        words = plain.folder_hint(path) or "; expected a file of prompts or a tensorflow-datasets folder"
        raise UserError(f"{path} cannot be read: it is a folder{words}")
    else:
        for file in files(spec):
            yield file, _read_file(file, column)


def is_tfds(path: pathlib.Path) -> bool:
    """Whether a path is the folder of a prepared data set of tensorflow-datasets, and not of Hugging Face's datasets,
    whose ``save_to_disk`` writes a file of the same name."""
    return (path / "dataset_info.json").exists() and not (path / "state.json").exists()


def choose_column(names: Sequence[str], column: str | None, where: Any) -> str:
    """The column to read of those that there are. Raises UserError, with their names, if that is not clear."""
    listed = ", ".join(map(repr, names)) or "none"
    if column is not None and column not in names:
        raise UserError(f"{where} has no column {column!r}; there are {listed}")
    known = _known(names) if column is None else [column]
    if len(set(known)) != 1:
        raise UserError(f"{where}: name the column of the prompts by {FLAGS}; there are {listed}")
    if list(names).count(known[0]) > 1:
        raise UserError(f"{where} has several columns {known[0]!r}; give them different names")
    return known[0]


def _texts(values: Iterable[tuple[Any, Any]], where: Any) -> list[tuple[str, Any]]:
    """Checked and stripped prompts of ``(value, its place)`` pairs, with their places."""
    prompts = []
    for value, place in values:
        if value is None:
            continue
        if not isinstance(value, str):
            raise UserError(f"{where}, {place}: expected text, found {schema.shown(value)}")
        if prompt := plain.prompt(value, f"{where}, {place}"):
            prompts.append((prompt, place))
    if not prompts:
        raise UserError(f"{where} holds no prompt")
    return prompts


# --- files ------------------------------------------------------------------------------------------------------------


def _read_file(path: pathlib.Path, column: str | None) -> Iterator[tuple[Any, str]]:
    return _READERS.get(plain.kind(path), _read_lines)(path, column)


def _read_lines(path: pathlib.Path, column: str | None) -> Iterator[tuple[Any, str]]:
    if column is not None:
        raise UserError(f"{path} is read as one prompt a line, without columns; leave out the column {column!r}")
    for number, line in enumerate(plain.lines(plain.read_text(path, pipe=True)), 1):
        yield line, f"line {number}"


def _read_table(path: pathlib.Path, column: str | None) -> Iterator[tuple[Any, str]]:
    def good(names: Sequence[str]) -> bool:
        return column in names if column is not None else len(set(_known(names))) == 1

    names, rows = tables.read(path, good, pipe=True)
    if column is None and len(names) == 1 and not good(names):
        raise UserError(
            f"{path} begins with {names[0]!r}, a prompt or the name of a column: if it is a prompt, put a line "
            f"with {COLUMNS[0]} before it; if it is the name, say so by {FLAGS}"
        )
    place = names.index(choose_column(names, column, path))
    for row, line in rows:
        yield row[place], line


def _known(names: Sequence[str]) -> list[str]:
    return [name for name in names if name.lower() in COLUMNS]


def _read_json_lines(path: pathlib.Path, column: str | None) -> Iterator[tuple[Any, str]]:
    return _fields(json_lines(path, pipe=True), path, column)


def json_lines(path: pathlib.Path, pipe: bool = False) -> Iterator[tuple[Any, str]]:
    """The values of a JSON Lines file with their places, as "line 3". Raises UserError for a line that is not JSON."""
    for number, line in enumerate(plain.lines(plain.read_text(path, pipe)), 1):
        if line := line.strip(string.whitespace + plain.INVISIBLE):
            try:
                yield schema.parse(line), f"line {number}"
            except ValueError as error:
                raise UserError(f"{path}, line {number}, is not JSON: {error}") from error


def _read_json(path: pathlib.Path, column: str | None) -> Iterator[tuple[Any, str]]:
    try:
        content = schema.parse(plain.read_text(path, pipe=True))
    except ValueError as error:
        hint = "; a file with one object a line is named .jsonl" if "Extra data" in str(error) else ""
        raise UserError(f"{path} is not JSON: {error}{hint}") from error
    if not isinstance(content, list):
        raise UserError(f"{path} holds {type(content).__name__}; expected a list of strings or of objects")
    return _fields(((item, f"item {number}") for number, item in enumerate(content)), path, column)


def _fields(items: Iterable[tuple[Any, str]], path: pathlib.Path, column: str | None) -> Iterator[tuple[Any, str]]:
    """The texts of strings, or of one key of objects; objects may lack it only as null."""
    chosen = None
    for item, place in items:
        if isinstance(item, dict):
            if chosen is None or chosen not in item:
                chosen = choose_column(list(item), column or chosen, f"{path}, {place}")
            yield item[chosen], place
        elif column is not None:
            raise UserError(f"{path}, {place}: expected an object with {column!r}, found {schema.shown(item)}")
        else:
            yield item, place


def _read_parquet(path: pathlib.Path, column: str | None) -> Iterator[tuple[Any, str]]:
    return read_parquet(path, choose_column(parquet_columns(path), column, path))


def parquet_columns(path: pathlib.Path) -> list[str]:
    """The names of a Parquet file's columns. Raises UserError if it is none."""
    with _parquet(path) as file:
        return list(file.schema_arrow.names)


def read_parquet(path: pathlib.Path, column: str) -> Iterator[tuple[Any, str]]:
    """The values of a column with their places, as "row 3". Raises UserError if the file cannot be read, or the column
    holds no text."""
    from pyarrow import types

    number = 0
    with _parquet(path) as file:
        kind = file.schema_arrow.field(file.schema_arrow.names.index(column)).type
        text = kind.value_type if types.is_dictionary(kind) else kind
        if str(text) not in ("string", "large_string", "string_view", "null"):
            raise UserError(f"{path}: the column {column!r} holds {kind}, not text; name another column")
        # Batch by batch and this column alone: the others may hold images.
        for batch in file.iter_batches(columns=[column]):
            for value in batch.column(batch.schema.names.index(column)):
                try:
                    found = value.as_py()
                except UnicodeDecodeError as error:
                    words = f"{path}, row {number}, is not UTF-8; write the file again from text"
                    raise UserError(words) from error
                yield found, f"row {number}"
                number += 1


@contextlib.contextmanager
def _parquet(path: pathlib.Path) -> Iterator[Any]:
    """An open Parquet file, ``pyarrow.parquet.ParquetFile``; what is wrong with it is a UserError."""
    import pyarrow
    from pyarrow import parquet

    packed = path.suffix.lower() in plain.PACKED
    try:
        reading.check(path)
        with parquet.ParquetFile(io.BytesIO(plain.read_bytes(path)) if packed else path) as file:
            yield file
    except (OSError, ValueError, IndexError, pyarrow.ArrowException) as error:
        words = getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} cannot be read as Parquet: {words}") from error


_READERS: dict[str, Callable[[pathlib.Path, str | None], Iterator[tuple[Any, str]]]] = {
    ".csv": _read_table,
    ".tsv": _read_table,
    ".json": _read_json,
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".parquet": _read_parquet,
}


# --- tensorflow-datasets ----------------------------------------------------------------------------------------------


def open_tfds(spec: str) -> tuple[Any, str]:
    """(builder, split) of ``NAME[:SPLIT]`` or ``FOLDER[:SPLIT]``; "train" or the only split where none is named.

    TensorFlow is not needed. Raises UserError if the data set is unknown, was not prepared, or has no such split.
    """
    import tensorflow_datasets as tfds

    name, _, split = spec.partition(":")
    try:
        if pathlib.Path(name).is_dir():
            builder = tfds.builder_from_directory(name)
        else:
            builder = tfds.builder(name)
    except Exception as error:  # the library raises what its data set's code raises
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"tfds:{name} cannot be opened ({reason}); name a data set or the folder of one") from error
    splits = list(builder.info.splits)
    if not splits:
        raise UserError(
            f"tfds:{name} is not prepared in {builder.data_dir}; run "
            f"tfds.builder({name!r}).download_and_prepare(file_format='array_record') first"
        )
    if not split:
        split = "train" if "train" in splits else splits[0] if len(splits) == 1 else ""
    if split not in splits:
        raise UserError(f"tfds:{name} has no split {split!r}; write tfds:{name}:SPLIT, there are {', '.join(splits)}")
    return builder, split


def read_tfds(spec: str, column: str | None) -> Iterator[tuple[str, str]]:
    """Texts of a data set with their places, for one text feature of it; nothing else is decoded."""
    import tensorflow_datasets as tfds

    builder, split = open_tfds(spec)
    features = builder.info.features
    # Sorted, since a data set's file has its features in no order.
    names = sorted(name for name, feature in features.items() if isinstance(feature, tfds.features.Text))
    chosen = choose_column(names, column, f"tfds:{spec}")
    alone = tfds.features.FeaturesDict({chosen: features[chosen]})
    try:
        source = builder.as_data_source(split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)
    except NotImplementedError as error:
        raise UserError(
            f"tfds:{spec} is stored as {builder.info.file_format.value}; prepare it with file_format='array_record'"
        ) from error
    for index in range(len(source)):
        try:
            text = alone.deserialize_example_np(source[index])[chosen].decode("utf-8")
        except Exception as error:  # of a damaged file the library raises whatever it stumbles over
            words = " ".join(str(error).split())[:200] or type(error).__name__
            raise UserError(f"tfds:{spec}, example {index}, cannot be read: {words}") from error
        yield text, f"example {index}"
