"""Safetensors files, read and written tensor by tensor, so that memory holds a tensor and never a model.

The format (https://github.com/huggingface/safetensors#format): 8 bytes with the header's length, little endian; a JSON
header ``{name: {"dtype", "shape", "data_offsets"}, "__metadata__": {str: str}}``; then the tensors' bytes, C order.
"""

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import re
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any

import ml_dtypes
import numpy as np

from srpo_jax import reading, schema, storage
from srpo_jax.errors import UserError

CODES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
DTYPES = {code: np.dtype(dtype) for code, dtype in CODES.items()}
_CODE_OF = {dtype: code for code, dtype in DTYPES.items()}
_LARGEST_HEADER = 100_000_000  # bytes; the reference implementation's own limit
_CHUNK = 64 << 20  # bytes copied at once when an array has to be rearranged or cast on its way to the disk


@dataclasses.dataclass(frozen=True)
class Spec:
    """Shape and dtype of a tensor that is not in memory."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Number of bytes."""
        return self.size * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class _Entry:
    """Of a tensor in a file's header; numpy has no arrays of more than 64 axes."""

    dtype: str
    shape: Annotated[tuple[int, ...], schema.Range(0, 64)]
    data_offsets: tuple[int, int]


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """A JSON object from a file. Raises UserError if the file is missing, is no JSON or holds something else."""
    try:
        content = schema.parse(reading.content(path))
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON: {getattr(error, 'strerror', None) or error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object")
    return content


def foreign_kind(path: pathlib.Path) -> str | None:
    """What a file that should hold weights is instead, in words, or None if its first bytes do not tell.

    Raises OSError, as for a device.
    """
    reading.check(path)
    with open(path, "rb") as file:
        head = file.read(512)
    text = head.lstrip().lower()
    if not head:
        return "an empty file"
    if head.startswith(b"version https://git-lfs.github.com"):
        return "a git-lfs pointer, not the file itself: run `git lfs pull` or download the file"
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page, probably a login or an error page: download the file again"
    if head.startswith(b"GGUF"):
        return "a GGUF file, which is quantised: use the original weights"
    return None


class SafetensorsFile:
    """A safetensors file. Its header is read and checked at once, its tensors when they are asked for.

    Attributes:
      path: the file.
      specs: ``{name: Spec}`` in the order of the file's bytes.
      metadata: the header's ``__metadata__``.

    Raises UserError if the file is not one, is cut short, or contradicts itself; FileNotFoundError if there is none.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = pathlib.Path(path)
        kind = foreign_kind(self.path)
        if kind:
            raise UserError(f"{self.path} is {kind}")
        header, start = self._read_header()
        notes = header.pop("__metadata__", None) or {}
        if not isinstance(notes, dict):
            raise UserError(f"{self.path} is not a safetensors file: its __metadata__ is no object")
        self.metadata: dict[str, str] = {key: text for key, text in notes.items() if isinstance(text, str)}
        self.specs: dict[str, Spec] = {}
        self._offsets: dict[str, int] = {}
        end = 0
        try:
            entries = {name: schema.read(_Entry, entry, f"tensor {name}") for name, entry in header.items()}
        except ValueError as error:
            raise UserError(f"{self.path} is not a safetensors file: its header has another layout: {error}") from error
        for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
            if entry.dtype not in DTYPES:
                raise UserError(f"{self.path}: tensor {name} has dtype {entry.dtype}, which is not supported")
            spec = Spec(entry.shape, DTYPES[entry.dtype])
            first, last = entry.data_offsets
            if first != end or last - first != spec.nbytes:
                raise UserError(f"{self.path} is damaged: the place of tensor {name} contradicts its shape")
            self.specs[name] = spec
            self._offsets[name] = start + first
            end = last
        size = self.path.stat().st_size
        if size != start + end:
            what = "cut short" if size < start + end else "longer than its header says"
            raise UserError(
                f"{self.path} is {what} ({size} bytes instead of {start + end}): download it, or convert it, again"
            )

    def _read_header(self) -> tuple[dict[str, Any], int]:
        with open(self.path, "rb") as file:
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or not 2 <= length <= _LARGEST_HEADER:
                raise UserError(f"{self.path} is not a safetensors file")
            text = file.read(length)
        if len(text) < length and text.startswith(b"{"):
            raise UserError(f"{self.path} is cut short inside its header: download it, or convert it, again")
        try:
            header = schema.parse(text)
        except ValueError as error:
            raise UserError(f"{self.path} is not a safetensors file ({error})") from error
        if not isinstance(header, dict):
            raise UserError(f"{self.path} is not a safetensors file")
        return header, 8 + length

    def read(self, name: str) -> np.ndarray:
        """A tensor as a read-only view of the file; its pages leave memory with the last reference to the array."""
        spec = self.specs[name]
        if not spec.size:
            return np.empty(spec.shape, spec.dtype)
        return np.memmap(self.path, dtype=spec.dtype, mode="r", offset=self._offsets[name], shape=spec.shape)

    def read_layer(self, name: str, layer: int) -> np.ndarray:
        """``read(name)[layer]``: of the file, only these pages are touched."""
        return self.read(name)[layer]


class SafetensorsWriter:
    """Writes a safetensors file whose tensors arrive one by one, or slice by slice, in any order.

    Use as a context manager. The bytes go to a temporary name beside ``path``; the file takes its place only when the
    block ends without an exception and every tensor was written completely (ValueError otherwise), else it is removed.

    Args:
      path: the file to make; an existing one is replaced.
      specs: all tensors with their shapes and dtypes.
      metadata: strings for the header.
      progress: called with the number of bytes after each piece that was written.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        specs: Mapping[str, Spec],
        metadata: Mapping[str, str] | None = None,
        progress: Callable[[int], object] = lambda count: None,
    ):
        self.path = pathlib.Path(path)
        self.specs = dict(specs)
        self._temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.partial")
        self._progress = progress
        self._missing = {name: spec.nbytes for name, spec in self.specs.items()}
        self._offsets: dict[str, int] = {}
        header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
        end = 0
        # Larger elements first, so that every tensor starts at a multiple of its element size; then by name, so that
        # equal tensors make equal files.
        for name in sorted(self.specs, key=lambda name: (-self.specs[name].dtype.itemsize, name)):
            spec = self.specs[name]
            first, end = end, end + spec.nbytes
            header[name] = {"dtype": _CODE_OF[spec.dtype], "shape": list(spec.shape), "data_offsets": [first, end]}
            self._offsets[name] = first
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._prefix = len(text).to_bytes(8, "little") + text

    def __enter__(self) -> "SafetensorsWriter":
        self._file = open(self._temporary, "wb")
        try:
            self._file.write(self._prefix)
        except BaseException:
            self._discard()
            raise
        return self

    def write(self, name: str, array: np.ndarray, index: int | None = None) -> None:
        """Writes a tensor, or with ``index`` the slice ``tensor[index]``; casts to the tensor's dtype.

        Raises ValueError if the shape is not the announced one, UserError for a number beyond the dtype's largest.
        """
        spec = self.specs[name]
        shape = spec.shape if index is None else spec.shape[1:]
        if array.shape != shape:
            raise ValueError(f"{name}: got {array.shape} for {shape}")
        nbytes = math.prod(shape) * spec.dtype.itemsize
        self._file.seek(len(self._prefix) + self._offsets[name] + (index or 0) * nbytes)
        for piece in _pieces(array):
            flat = _cast(piece, spec.dtype, name).reshape(-1)
            self._file.write(flat.view(np.uint8))
            self._progress(flat.nbytes)
        self._missing[name] -= nbytes

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        incomplete = [name for name, missing in self._missing.items() if missing]
        if kind is not None or incomplete:
            self._discard()
            if kind is None:
                raise ValueError(f"{self.path}: tensors not written completely: {', '.join(incomplete)}")
            return
        try:
            self._file.close()
            os.replace(self._temporary, self.path)
        except BaseException:
            self._discard()
            raise

    def _discard(self) -> None:
        self._file.close()
        self._temporary.unlink(missing_ok=True)


def _cast(array: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """A contiguous array in a dtype. Raises UserError for a number that becomes infinite, or in float8 none at all."""
    with np.errstate(over="ignore"):
        cast = np.ascontiguousarray(array, dtype=dtype)
    if dtype != array.dtype and not np.isfinite(cast).all() and np.isfinite(array).all():
        largest = np.abs(array.astype(np.float32)).max()
        raise UserError(
            f"{name} holds {largest:g}, and {dtype.name} ends at {float(ml_dtypes.finfo(dtype).max):g}; "
            "choose bfloat16 or float32"
        )
    return cast


def _pieces(array: np.ndarray) -> list[np.ndarray]:
    """Cuts a large array along its first axis, so that a rearranged copy of it never exists as a whole."""
    if array.nbytes <= _CHUNK or not array.ndim:
        return [array]
    rows = max(1, _CHUNK * array.shape[0] // array.nbytes)
    return [array[start : start + rows] for start in range(0, array.shape[0], rows)]


@contextlib.contextmanager
def new_folder(target: str | os.PathLike) -> Iterator[pathlib.Path]:
    """A folder to fill, which becomes ``target`` when the block ends well and vanishes if it does not (also on Ctrl-C).

    An empty folder that is there already may be a disk of its own (a mount point, a volume of a container), and the
    only place of that disk where one may write: what is made lies in it from the start, and its parts get their names
    last. A link stands for the folder that it leads to. What a process of this machine that was killed has left of the
    same target is removed first, which is said.

    Raises UserError if the target exists and is not an empty folder.
    """
    target = pathlib.Path(os.path.realpath(target))
    home = target if target.is_dir() else target.parent
    try:
        home.mkdir(parents=True, exist_ok=True)
        _remove_left(home, target.name)
        if target.exists() and (
            not target.is_dir() or any(path.name != storage.FRESH_DISK for path in target.iterdir())
        ):
            raise UserError(f"{target} exists already; choose another target")
        prefix = f".{target.name}.{socket.gethostname()}-{os.getpid()}."
        temporary = pathlib.Path(tempfile.mkdtemp(prefix=prefix, suffix=".partial", dir=home))
    except OSError as error:
        raise UserError(f"{target} cannot be made: {error.strerror}") from error
    try:
        yield temporary
        if home == target:
            for part in sorted(temporary.iterdir()):
                os.replace(part, target / part.name)
            temporary.rmdir()
        else:
            temporary.chmod(0o777 & ~_umask())
            os.replace(temporary, target)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(f"{target} cannot be written: {error}") from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _remove_left(home: pathlib.Path, target: str) -> None:
    """Removes folders of ``new_folder`` in ``home`` for a target of that name whose process is gone."""
    name = re.compile(rf"\.{re.escape(target)}\.{re.escape(socket.gethostname())}-(\d+)\.\w+\.partial")
    for path in list(home.iterdir()):
        if (match := name.fullmatch(path.name)) and not _runs(int(match[1])):
            shutil.rmtree(path, ignore_errors=True)
            print(f"{path}, which a process that was killed has left, is removed", file=sys.stderr)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True


def _umask() -> int:
    """The process's mask of file permissions; mkdtemp ignores it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
