"""Prompts as people have them: text, CSV, JSON, JSON Lines, Parquet and tensorflow-datasets.

    prompts.txt            one prompt a line, as any file whose name ends in none of the following
    prompts.csv, .tsv      with a line of column names
    prompts.jsonl          an object or a string a line (also .ndjson)
    prompts.json           a list of strings (HPDv2's benchmark), or of objects: HPDv2's train.json ("prompt"), the
                           videos2caption.json of SRPO, DanceGRPO and FastVideo ("caption")
    data/*.parquet         a pattern: all files that match, sorted by name
    tfds:NAME[:SPLIT]      a prepared data set of tensorflow-datasets, or the folder of one
    FOLDER                 the same, if FOLDER holds a dataset_info.json

Where there are several columns, one of them is named, or exactly one of ``COLUMNS`` is among them.
"""

import csv
import glob
import io
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from srpo_jax import reading, schema
from srpo_jax.errors import UserError
from srpo_jax.values import TFDS

LONGEST = 255  # bytes of a file's name
COLUMNS = ("prompt", "caption", "text")  # taken where no column is named


def read(spec: str | os.PathLike, column: str | None = None) -> list[str]:
    """The prompts of a source in its order; white space around a prompt and empty prompts are dropped.

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
    elif path.is_dir() and (path / "dataset_info.json").exists():
        yield spec, read_tfds(spec, column)
    else:
        for file in files(spec):
            yield file, _read_file(file, column)


def choose_column(names: Sequence[str], column: str | None, where: Any) -> str:
    """The column to read of those that there are. Raises UserError, with their names, if that is not clear."""
    listed = ", ".join(map(repr, names)) or "none"
    if column is not None:
        if column not in names:
            raise UserError(f"{where} has no column {column!r}; there are {listed}")
        return column
    known = [name for name in COLUMNS if name in names]
    if len(known) == 1:
        return known[0]
    if len(names) == 1:
        return names[0]
    raise UserError(f"{where}: name the column of the prompts; there are {listed}")


def _texts(values: Iterable[tuple[Any, Any]], where: Any) -> list[tuple[str, Any]]:
    """Checked and stripped prompts of ``(value, its place)`` pairs, with their places."""
    prompts = []
    for value, place in values:
        if value is None:
            continue
        if not isinstance(value, str):
            raise UserError(f"{where}, {place}: expected text, found {schema.shown(value)}")
        if value.strip():
            prompts.append((value.strip(), place))
    if not prompts:
        raise UserError(f"{where} holds no prompt")
    return prompts


# --- files ------------------------------------------------------------------------------------------------------------


def _read_file(path: pathlib.Path, column: str | None) -> Iterator[tuple[Any, str]]:
    return _READERS.get(path.suffix.lower(), _read_lines)(path, column)


def read_text(path: pathlib.Path, pipe: bool = False) -> str:
    """A file's text; ``pipe`` lets it be a pipe, as a shell's ``<(...)``. Raises UserError if it cannot be read or is
    not UTF-8 (names the line)."""
    try:
        data = reading.content(path, pipe=pipe)
    except OSError as error:
        hint = "; expected a file of prompts or a tensorflow-datasets folder" if path.is_dir() else ""
        raise UserError(f"{path} cannot be read: {error.strerror}{hint}") from error
    try:
        # utf-8-sig: editors on Windows put a byte order mark in front.
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise UserError(f"{path} is not UTF-8 (line {line}); save it as UTF-8") from error


def _read_lines(path: pathlib.Path, column: str | None) -> Iterator[tuple[Any, str]]:
    if column is not None:
        raise UserError(f"{path} is read as one prompt a line, without columns; leave out the column {column!r}")
    # Not splitlines(): it also splits at characters that a prompt may hold, as a form feed or U+2028.
    for number, line in enumerate(read_text(path, pipe=True).split("\n"), 1):
        yield line, f"line {number}"


def _read_table(path: pathlib.Path, column: str | None) -> Iterator[tuple[Any, str]]:
    csv.field_size_limit(1 << 30)
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    rows = csv.reader(io.StringIO(read_text(path, pipe=True), newline=""), delimiter=delimiter, strict=True)
    try:
        names = next(rows, [])
        place = names.index(choose_column(names, column, path))
        for row in rows:
            if row and len(row) != len(names):
                raise UserError(
                    f"{path}, line {rows.line_num}: {len(row)} fields under {len(names)} columns; "
                    "put quotes around text that holds the separator"
                )
            if row:
                yield row[place], f"line {rows.line_num}"
    except csv.Error as error:
        raise UserError(f"{path}, line {rows.line_num}: {error}") from error


def _read_json_lines(path: pathlib.Path, column: str | None) -> Iterator[tuple[Any, str]]:
    return _fields(json_lines(path, pipe=True), path, column)


def json_lines(path: pathlib.Path, pipe: bool = False) -> Iterator[tuple[Any, str]]:
    """The values of a JSON Lines file with their places, as "line 3". Raises UserError for a line that is not JSON."""
    for number, line in enumerate(read_text(path, pipe).split("\n"), 1):
        if line.strip():
            try:
                yield schema.parse(line), f"line {number}"
            except ValueError as error:
                raise UserError(f"{path}, line {number}, is not JSON: {error}") from error


def _read_json(path: pathlib.Path, column: str | None) -> Iterator[tuple[Any, str]]:
    try:
        content = schema.parse(read_text(path, pipe=True))
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
                chosen = choose_column(list(item), column or chosen, f"{path}, {place},")
            yield item[chosen], place
        elif column is not None:
            raise UserError(f"{path}, {place}: expected an object with {column!r}, found {schema.shown(item)}")
        else:
            yield item, place


def _read_parquet(path: pathlib.Path, column: str | None) -> Iterator[tuple[Any, str]]:
    import pyarrow
    from pyarrow import parquet, types

    number = 0
    try:
        reading.check(path)
        with parquet.ParquetFile(path) as file:
            chosen = choose_column(file.schema_arrow.names, column, path)
            kind = file.schema_arrow.field(file.schema_arrow.names.index(chosen)).type
            plain = kind.value_type if types.is_dictionary(kind) else kind
            if str(plain) not in ("string", "large_string", "string_view", "null"):
                raise UserError(f"{path}: the column {chosen!r} holds {kind}, not text; name another column")
            # Batch by batch and this column alone: the others may hold images.
            for batch in file.iter_batches(columns=[chosen]):
                for value in batch.column(batch.schema.names.index(chosen)):
                    yield value.as_py(), f"row {number}"
                    number += 1
    except UnicodeDecodeError as error:
        raise UserError(f"{path}, row {number}, is not UTF-8; write the file again from text") from error
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
