"""Comparing files and folders of weights byte by byte."""

import pathlib

from srpo_jax.weights.files import SafetensorsFile


def tensors(path):
    """All tensors in a file or in the files of a folder, as raw bytes with shape and dtype."""
    path = pathlib.Path(path)
    found = {}
    for file in [path] if path.is_file() else sorted(path.glob("*.safetensors")):
        source = SafetensorsFile(file)
        found |= {name: (spec, source.read(name).tobytes()) for name, spec in source.specs.items()}
    return found


def same_files(a, b):
    """Every file of two folders, byte by byte."""
    names = sorted(p.relative_to(a) for p in a.rglob("*") if p.is_file())
    return names == sorted(p.relative_to(b) for p in b.rglob("*") if p.is_file()) and all(
        (a / name).read_bytes() == (b / name).read_bytes() for name in names
    )
