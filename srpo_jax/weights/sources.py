"""Opens the weight files that users have as lazy sources: safetensors (one file or shards) and torch pickles.

Torch is imported for pickles only, and these are read "weights only": a file that would run code is refused.
"""

import functools
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from srpo_jax.errors import UserError
from srpo_jax.weights.engine import Source
from srpo_jax.weights.files import SafetensorsFile, Spec, foreign_kind, read_json

# Where a component's folder keeps its weights, in the order of preference.
WEIGHT_FILES = (
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors",
    "model.safetensors.index.json",
    "model.safetensors",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "diffusion_pytorch_model.bin.index.json",
    "diffusion_pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
    "open_clip_pytorch_model.bin",
    "ImageReward.pt",
)
_INDEX = re.compile(r"\.index(\.\w+)?\.json$")
# Wrappers that put their own word before every name: torch's data parallelism, and ComfyUI's saving nodes.
WRAPPERS = ("module.", "model.diffusion_model.")


class ShardedSource:
    """Tensors spread over several files, as an index json says: ``{"weight_map": {name: file}}``.

    Raises UserError if the index and the files do not agree.
    """

    def __init__(self, index: str | os.PathLike):
        self.path = pathlib.Path(index)
        names = read_json(self.path).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(file, str) for file in names.values()):
            raise UserError(f"{self.path} has no weight_map: it is not the index of a sharded checkpoint")
        files = sorted(set(names.values()))
        if odd := [file for file in files if not _is_plain(file) or _INDEX.search(file)]:
            raise UserError(f"{self.path} names {odd[0]!r}, which is no file of weights beside it")
        # os.path knows of names that no file can have, as too long ones.
        if missing := [file for file in files if not os.path.isfile(self.path.parent / file)]:
            raise UserError(f"{self.path} names files that are not there: {', '.join(missing)}; download them")
        self._shards = {file: open_file(self.path.parent / file) for file in files}
        self._file_of = {name: file for file, shard in self._shards.items() for name in shard.specs}
        if wrong := sorted(name for name, file in names.items() if name not in self._shards[file].specs):
            raise UserError(f"{self.path}: {len(wrong)} tensors are not in their files, as {wrong[0]}")
        if doubled := sum(len(shard.specs) for shard in self._shards.values()) - len(self._file_of):
            raise UserError(f"{self.path}: its files hold {doubled} tensors twice")
        self.specs = {name: self._shards[file].specs[name] for name, file in self._file_of.items()}

    def read(self, name: str) -> np.ndarray:
        """One tensor, as a view of its file."""
        return self._shards[self._file_of[name]].read(name)


def _is_plain(name: str) -> bool:
    """Whether a name in a file is that of another one in the same folder, or below it, and leads nowhere else."""
    place = pathlib.PurePath(name)
    return bool(place.parts) and not place.is_absolute() and ".." not in place.parts and "\0" not in name


class TorchSource:
    """The tensors of a torch pickle (.pt, .bin, .pth, .ckpt), by themselves or under the key ``state_dict``.

    The file is mapped into memory where its format allows (torch >= 1.6): tensors are read when they are asked for.
    Raises UserError if torch is missing, and if the file is damaged or holds anything but tensors.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = pathlib.Path(path)
        try:
            import torch
        except ImportError as error:
            raise UserError(f"{self.path} is a torch pickle: reading it needs torch (`pip install torch`)") from error
        with open(self.path, "rb") as file:
            mappable = file.read(4) == b"PK\x03\x04"
        try:
            content = torch.load(self.path, map_location="cpu", weights_only=True, mmap=mappable)
        except Exception as error:  # torch raises whatever its unpickler met: RuntimeError, EOFError, KeyError, ...
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            if "weights only load failed" in reason.lower():
                raise UserError(
                    f"{self.path} is refused: it holds more than tensors, and loading it could run code that is in the "
                    "file. If you trust its author, load it with torch and save its state_dict as safetensors"
                ) from error
            raise UserError(f"{self.path} cannot be read as a torch file; it may be cut short: {reason}") from error
        if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
            content = content["state_dict"]
        if not isinstance(content, Mapping) or not content:
            raise UserError(f"{self.path} holds no state dict (names with tensors) but a {type(content).__name__}")
        if odd := [str(name) for name, value in content.items() if not isinstance(value, torch.Tensor)]:
            raise UserError(f"{self.path} holds no state dict: {', '.join(odd[:6])} are not tensors")
        self._tensors = dict(content)
        self._bytes_dtype = torch.uint8
        self.specs = {name: Spec(tuple(t.shape), self._dtype(name, t)) for name, t in self._tensors.items()}

    def _dtype(self, name: str, tensor: Any) -> np.dtype:
        short = str(tensor.dtype).removeprefix("torch.")
        special = {
            "bfloat16": ml_dtypes.bfloat16,
            "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
            "float8_e5m2": ml_dtypes.float8_e5m2,
        }
        try:
            return np.dtype(special.get(short, short))
        except TypeError as error:
            raise UserError(f"{self.path}: tensor {name} has dtype {short}, which is not supported") from error

    def read(self, name: str) -> np.ndarray:
        """One tensor, where possible as a view of the file."""
        spec = self.specs[name]
        flat = self._tensors[name].detach().contiguous().reshape(-1)
        return flat.view(self._bytes_dtype).numpy().view(spec.dtype).reshape(spec.shape)


class RenamedSource:
    """Another source under names without a prefix that all its names share."""

    def __init__(self, source: Source, prefix: str):
        self.path = source.path
        self._source, self._prefix = source, prefix
        self.specs = {name.removeprefix(prefix): spec for name, spec in source.specs.items()}

    def read(self, name: str) -> np.ndarray:
        """One tensor of the source."""
        return self._source.read(self._prefix + name)


class JoinedSource:
    """A source and another one, whose names get a prefix that none of the first has."""

    def __init__(self, source: Source, other: Source, prefix: str):
        self.path = f"{source.path} with {other.path}"
        self._source, self._other, self._prefix = source, other, prefix
        self.specs = {**source.specs, **{prefix + name: spec for name, spec in other.specs.items()}}

    def read(self, name: str) -> np.ndarray:
        """One tensor of either."""
        if name.startswith(self._prefix):
            return self._other.read(name.removeprefix(self._prefix))
        return self._source.read(name)


def open_file(path: pathlib.Path) -> Source:
    """Opens one weight file, or the index of several, by what is in it and not by its name.

    Raises UserError if it is neither safetensors nor a torch pickle, or is damaged.
    """
    if _INDEX.search(path.name):
        return ShardedSource(path)
    try:
        kind = foreign_kind(path)
        with open(path, "rb") as file:
            head = file.read(9)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    if kind:
        raise UserError(f"{path} is {kind}")
    # A zip, or a bare pickle; safetensors have their header, JSON, after 8 bytes.
    is_pickle = head[:2] in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
    if not is_pickle and head[8:] != b"{" and path.suffix != ".safetensors":
        raise UserError(f"{path} is neither a torch pickle nor a safetensors file")
    source = TorchSource(path) if is_pickle else SafetensorsFile(path)
    return functools.reduce(_unwrapped, WRAPPERS, source)


def _unwrapped(source: Source, prefix: str) -> Source:
    wrapped = source.specs and all(name.startswith(prefix) for name in source.specs)
    return RenamedSource(source, prefix) if wrapped else source


def open_source(path: str | os.PathLike, names: Sequence[str] = WEIGHT_FILES) -> Source:
    """Opens a weight file, or the weights in a component's folder.

    Args:
      path: the file or folder.
      names: what to look for in a folder; the first that is there is taken, or else the first that is there as a
        variant (``variant="fp16"`` of diffusers: ``model.fp16.safetensors``, ``model.safetensors.index.fp16.json``).

    Raises UserError if there is nothing there, nothing readable, or several variants of a file.
    """
    path = pathlib.Path(path)
    if path.is_file():
        return open_file(path)
    if not path.is_dir():
        raise UserError(f"{path} does not exist")
    present = [name for name in names if (path / name).is_file()] or _variants(path, names)
    if not present:
        others = sorted(f.name for f in path.iterdir() if f.suffix in (".safetensors", ".bin", ".pt", ".pth", ".ckpt"))
        give = f"give the file itself, as {path / others[0]}" if others else "give the file itself"
        raise UserError(f"{path} holds no weights under a usual name, as {names[0]}; {give}")
    return open_file(path / present[0])


def _variants(path: pathlib.Path, names: Sequence[str]) -> list[str]:
    """The file in a folder that is a variant of the first of ``names`` that has one. Raises UserError for several."""
    files = sorted(file.name for file in path.iterdir() if file.is_file())
    for name in names:
        stem, _, rest = name.partition(".")
        start, _, end = rest.rpartition(".")
        # The word stands before the last suffix, of some older indices after the stem.
        before_last = rf"{stem}{re.escape('.' + start if start else '')}\.\w+\.{end}"
        found = [file for file in files if re.fullmatch(rf"{before_last}|{stem}\.\w+\.{re.escape(rest)}", file)]
        if len(found) > 1:
            raise UserError(f"{path} holds several variants: {', '.join(found)}; give the file itself")
        if found:
            return found
    return []
