"""Which weights and which tokenizer: a short text that other ones do not have, found without reading all of them.

Of a network's file, its config, the name, shape and dtype of every tensor, and up to 1 MiB of each tensor's bytes,
evenly spread over it, are hashed (SHA-256): 9 MB of T5-XXL's 9.5 GB. Training, fine-tuning, merging and casting
change values everywhere, so they change what is hashed; an edit of a few numbers by hand may not. Of a tokenizer, all
files are hashed whole.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Iterable

import numpy as np

from srpo_jax.errors import UserError
from srpo_jax.weights import folder

BLOCK, BLOCKS = 1024, 1024  # bytes read at a place of a tensor, and places


def of_network(path: str | os.PathLike) -> str:
    """Of a network's folder in our format, 16 hexadecimal digits. Raises UserError if the folder is not one."""
    network, config, source = folder.open_weights(path)
    digest = hashlib.sha256(json.dumps([network, dataclasses.asdict(config)], sort_keys=True).encode())
    for name, spec in sorted(source.specs.items()):
        digest.update(json.dumps([name, spec.shape, str(spec.dtype)]).encode())
        values = source.read(name).reshape(-1).view(np.uint8)
        for start in _places(values.size):
            digest.update(values[start : start + BLOCK].tobytes())
    return digest.hexdigest()[:16]


def of_tokenizer(path: str | os.PathLike) -> str:
    """Of a tokenizer's folder, 16 hexadecimal digits; what a desktop or a download leaves in it (.DS_Store) does not
    count. Raises UserError if it is missing or empty."""
    path = pathlib.Path(path)
    there = path.iterdir() if path.is_dir() else ()
    files = sorted(file for file in there if file.is_file() and not file.name.startswith("."))
    if not files:
        raise UserError(f"{path} holds no tokenizer")
    digest = hashlib.sha256()
    for file in files:
        content = file.read_bytes()
        digest.update(json.dumps([file.name, len(content)]).encode() + content)
    return digest.hexdigest()[:16]


def of_parts(path: str | os.PathLike, networks: Iterable[str], tokenizers: Iterable[str]) -> dict[str, str]:
    """Of some networks and tokenizers of a folder, by the names of their own folders in it."""
    path = pathlib.Path(path)
    found = {part: of_tokenizer(path / part) for part in tokenizers}
    return found | {part: of_network(path / part) for part in networks}


def joined(parts: Iterable[str]) -> str:
    """One fingerprint of several, in their order."""
    return hashlib.sha256(json.dumps(list(parts)).encode()).hexdigest()[:16]


def _places(size: int) -> list[int]:
    """Where to read a tensor of ``size`` bytes: all of it, or ``BLOCKS`` places from its first to its last byte."""
    if size <= BLOCK * BLOCKS:
        return list(range(0, size, BLOCK))
    return [place * (size - BLOCK) // (BLOCKS - 1) for place in range(BLOCKS)]
