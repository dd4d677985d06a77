"""Checksums of what was saved, so that a bit that has turned over is noticed before it is trained with.

    STEP/checksums-P-of-N.json                            of a checkpoint: what process P of N has read of its files
    checksums.json beside a network's weights.safetensors

Each holds ``{"files": {path: {"size": bytes, "crc32c": [of every CHUNK bytes]}}, "crc32c": of the former}``. They are
made from the files themselves when these are complete. CRC-32C finds every flip of up to three bits in a chunk, and
every burst of 32; processors have an instruction for it, so that the disk decides how long a check takes
(docs/faults.md). The processes of a job each read a share. Of an object of a bucket, its size and the checksum that the
bucket itself keeps of it are taken, for which nothing is read; what lies in a bucket is watched over there.
"""

import concurrent.futures
import functools
import json
import os
import re
from collections.abc import Collection, Iterator
from typing import Any

import google_crc32c
from etils import epath

from srpo_jax import distributed, storage
from srpo_jax.errors import UserError

CHUNK = 64 << 20
BLOCK = 1 << 20  # bytes read at once
READERS = 8  # threads
PART = re.compile(r"checksums-(\d+)-of-(\d+)\.json")
BESIDE = "checksums.json"


# --- of a folder ------------------------------------------------------------------------------------------------------


def seal(folder: epath.Path) -> None:
    """Writes this process's share of the checksums of a folder whose files are complete; every process has to."""
    process, count = distributed.place()
    # The largest first: shares are then of about the same size.
    files = sorted(_sizes(folder).items(), key=lambda item: (-item[1], item[0]))[process::count]
    found = {name: {"size": size, "crc32c": _checksums(folder / name, size)} for name, size in files}
    storage.write(folder / f"checksums-{process}-of-{count}.json", _packed(found))


def sealed(folder: epath.Path) -> bool:
    """Whether the checksums of a folder are all there and can be read themselves."""
    return _sealed(folder) is not None


def damage(folder: epath.Path, within: Collection[str] = ()) -> str:
    """What is wrong with a sealed folder, as far as this process's share goes, in words; "" if nothing is.

    Args:
      folder: a folder without checksums has nothing wrong.
      within: names of folders in it; others are not looked at. None of them is all of it.
    """
    found = _sealed(folder) or {}
    wanted = {name: entry for name, entry in found.items() if not within or name.split("/")[0] in within}
    return _damage(folder, wanted)


def _sealed(folder: epath.Path) -> dict[str, Any] | None:
    parts = [match for path in folder.iterdir() if (match := PART.fullmatch(path.name))] if folder.is_dir() else []
    for count in {match[2] for match in parts}:
        contents = [_unpacked(folder / match[0]) for match in parts if match[2] == count]
        if len(contents) == int(count) and None not in contents:
            return {name: entry for content in contents for name, entry in content.items()}
    return None


def _sizes(folder: epath.Path) -> dict[str, int]:
    """Of all files of a folder by their paths in it, without checksums."""

    def walk(place: epath.Path, prefix: str) -> Iterator[tuple[str, int]]:
        for path in place.iterdir():
            if path.is_dir():
                yield from walk(path, f"{prefix}{path.name}/")
            elif prefix or not PART.fullmatch(path.name):
                yield prefix + path.name, path.stat().length

    return dict(walk(folder, ""))


# --- of a file --------------------------------------------------------------------------------------------------------


def seal_file(file: str | os.PathLike) -> None:
    """Writes the checksums of a complete file of this machine beside it."""
    file = epath.Path(file)
    size = file.stat().length
    storage.write(file.with_name(BESIDE), _packed({file.name: {"size": size, "crc32c": _checksums(file, size)}}))


def break_seal(file: str | os.PathLike) -> None:
    """Removes the checksums of a file that is about to change."""
    epath.Path(file).with_name(BESIDE).unlink(missing_ok=True)


def check_file(file: str | os.PathLike) -> None:
    """Checks this process's share of a file that ``seal_file`` was called for; others pass.

    Raises UserError that names the file if it is not what it was.
    """
    file = epath.Path(os.path.abspath(file))
    found = (_unpacked(file.with_name(BESIDE)) if file.with_name(BESIDE).exists() else None) or {}
    if words := _damage(file.parent, {name: entry for name, entry in found.items() if name == file.name}):
        raise UserError(f"{words}; bring back a copy of it, or convert it again")


# --- numbers ----------------------------------------------------------------------------------------------------------


def _checksums(file: epath.Path, size: int) -> list[str]:
    if storage.in_bucket(file):
        return [storage.checksum(file)]
    with concurrent.futures.ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(lambda start: _crc(file, start), range(0, size, CHUNK)))


def _crc(file: epath.Path, start: int) -> str:
    """Of a file's chunk that starts there."""
    value = 0
    with open(file, "rb", buffering=0) as stream:
        stream.seek(start)
        left = CHUNK
        while left and (block := stream.read(min(BLOCK, left))):
            value = google_crc32c.extend(value, block)
            left -= len(block)
    return f"{value:08x}"


def _crc_once(file: epath.Path, start: int) -> str:
    """The same of a file that is checked: a command that opens it again does not read it again, unless it was written
    to since."""
    status = os.stat(file)
    return _cached_crc(epath.Path(os.path.abspath(file)), start, status.st_mtime_ns, status.st_size)


@functools.cache
def _cached_crc(file: epath.Path, start: int, *_: int) -> str:
    return _crc(file, start)


def _damage(folder: epath.Path, files: dict[str, Any]) -> str:
    for name, entry in files.items():
        if not (folder / name).exists():
            return f"{folder / name} is missing"
        if (size := (folder / name).stat().length) != entry["size"]:
            return f"{folder / name} has {size} bytes instead of {entry['size']}"
    process, count = distributed.place()
    chunks = [(name, index, crc) for name in sorted(files) for index, crc in enumerate(files[name]["crc32c"])]

    def differs(chunk: tuple[str, int, str]) -> str:
        name, index, crc = chunk
        if storage.in_bucket(folder):
            return "" if storage.checksum(folder / name) == crc else f"{folder / name} is not what was saved"
        if _crc_once(folder / name, index * CHUNK) == crc:
            return ""
        return (
            f"{folder / name} is damaged: its checksum differs between bytes {index * CHUNK} and {(index + 1) * CHUNK}"
        )

    with concurrent.futures.ThreadPoolExecutor(READERS) as pool:
        return next(filter(None, pool.map(differs, chunks[process::count])), "")


def _packed(files: dict[str, Any]) -> bytes:
    return f"{json.dumps({'files': files, 'crc32c': _of_json(files)}, indent=1)}\n".encode()


def _unpacked(file: epath.Path) -> dict[str, Any] | None:
    """The files of a list of checksums; None if the list itself cannot be trusted."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return content["files"] if content["crc32c"] == _of_json(content["files"]) else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _of_json(files: dict[str, Any]) -> str:
    return f"{google_crc32c.value(json.dumps(files, sort_keys=True).encode()):08x}"
