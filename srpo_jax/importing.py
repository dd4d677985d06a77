"""Takes the weights that users have into our format: a pipeline folder, or one network with what belongs to it."""

import os
import pathlib
import re
import shutil
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from srpo_jax import families, schema, terminal, text, tokens
from srpo_jax.errors import UserError
from srpo_jax.families.base import INDEX, TRANSFORMER, Family
from srpo_jax.rewards import REWARDS
from srpo_jax.rewards.base import Reward
from srpo_jax.weights import engine, folder, formats
from srpo_jax.weights.files import Spec, new_folder, read_json
from srpo_jax.weights.rules import Table

TOKENIZER = "tokenizer"  # of a reward's folder
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
)
VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt")


def check_room(label: str, total: int, where: pathlib.Path) -> None:
    """Raises UserError if so many bytes have no room on the disk of a folder."""
    free = shutil.disk_usage(where).free
    if total > free:
        raise UserError(f"{where.parent} has {free / 1e9:.1f} GB free; {label} needs {total / 1e9:.1f} GB")


def byte_bar(label: str, specs: Mapping[str, Spec], where: pathlib.Path) -> terminal.Bar:
    """A progress bar over the bytes of some tensors. Raises UserError if they do not fit on the disk."""
    total = sum(spec.nbytes for spec in specs.values())
    check_room(label, total, where)
    return terminal.bar(total, "B", label, scale=True)


def import_folder(
    source: str | os.PathLike,
    target: str | os.PathLike,
    network: str | None = None,
    format: str | None = None,
    dtype: np.dtype | None = None,
    config: str | os.PathLike | None = None,
    tokenizer: str | os.PathLike | None = None,
    head: str | os.PathLike | None = None,
) -> list[Mapping[str, Spec]]:
    """Converts a pipeline or a single network into our format.

    Args:
      source: a pipeline folder, a component's folder, or a weight file.
      target: the folder to make; a pipeline becomes a subfolder per component.
      network: which network the source must be; None takes what it is.
      format: which format the source must be in; None takes what it is. For folders that hold the same network twice.
      dtype: to store in; None keeps the source's.
      config: a config.json to use instead of the one beside the weights.
      tokenizer: a tokenizer folder that goes along with a reward that reads words; by default the tokenizer beside the
        weights. A note is printed if there is none, or if it replaces another.
      head: the file of an aesthetic score's head, whose tower the source is.

    What a source holds that the network has no use for, as a text tower beside a score of pictures, is named.

    Returns:
      The parameters of each network that was written.

    Raises UserError, and writes nothing, if the source is not what it should be or does not fit exactly, or a
    tokenizer is of another network.
    """
    source = pathlib.Path(source)
    if folder.is_ours(source) or (source / TRANSFORMER).is_dir() and folder.is_ours(source / TRANSFORMER):
        raise UserError(f"{source} is in our format already")
    if not (source / INDEX).is_file():
        with new_folder(target) as out:
            opened = _open(source, network, format, config, head)
            words, notes = [], []
            kind = next((kind for kind in REWARDS.values() if kind.network == opened.form.network), None)
            if kind is not None and kind.tokenizer_of:
                words, notes = _tokenizer_files(source, tokenizer, kind, opened.config, target)
            elif tokenizer:
                raise UserError(
                    f"--tokenizer is for rewards that read words; {source} is a network of the kind "
                    f"{opened.form.network}, which has none"
                )
            if unread := engine.unread(opened.table, opened.weights):
                notes = [f"left out, which the score does not read: {_summary(unread)}", *notes]
            written = [_write(opened, out, dtype)]
            if words:
                (out / TOKENIZER).mkdir()
            for file in words:
                shutil.copy(file, out / TOKENIZER / file.name)
        for note in notes:
            print(f"note: {note}")
        return written
    given = {"--network": network, "--format": format, "--config": config, "--tokenizer": tokenizer, "--head": head}
    for flag, value in given.items():
        if value is not None:
            raise UserError(f"{source} is a whole pipeline, for which {flag} has no meaning; give one of its folders")
    family = families.of_index(source)
    parts, components = pipeline_parts(source, family), family.components
    with new_folder(target) as out:
        networks = {
            part: _open(source / part, components[part].network, None, None) for part in parts if part in components
        }
        for name, tokenizer in family.tokenizers.items():
            if tokenizer.encoder in networks and name in parts:
                tokens.check(text.load_tokenizer(source / name), networks[tokenizer.encoder].config, source / name)
        sizes = [spec.nbytes for opened in networks.values() for spec in _specs(opened, dtype).values()]
        check_room("the pipeline", sum(sizes), out)
        written = []
        for part in parts:
            if part in networks:
                (out / part).mkdir()
                written.append(_write(networks[part], out / part, dtype))
            else:
                shutil.copytree(source / part, out / part)
        shutil.copy(source / INDEX, out / INDEX)
    return written


def pipeline_parts(source: pathlib.Path, family: Family) -> list[str]:
    """The subfolders of a diffusers pipeline that matter. Raises UserError if it is incomplete."""
    index, parts = read_json(source / INDEX), []
    for name in (*family.components, *family.copied):
        entry = index.get(name)
        if entry is not None and not (isinstance(entry, list) and len(entry) == 2):
            shown = schema.shown(entry)
            raise UserError(f"{source / INDEX}: {name}={shown} must be a list of two, a library and a class, or null")
        if entry is not None and entry[0] is not None:
            parts.append(name)
    if missing := [name for name in parts if not (source / name).is_dir()]:
        raise UserError(f"{source} lacks the folders {', '.join(missing)} that its {INDEX} names")
    return parts


def parts_of_ours(source: pathlib.Path, family: Family) -> list[str]:
    """The subfolders of a pipeline of ours that are networks."""
    return [part for part in family.components if (source / part).is_dir()]


class _Opened(NamedTuple):
    """A network's weights that were found to fit: format, config, source, table, and what ``engine.check`` returns."""

    form: formats.Format
    config: Any
    weights: engine.Source
    table: Table
    place: Mapping[str, str]


def _open(
    source: pathlib.Path, network: str | None, format: str | None, config: Any, head: str | os.PathLike | None = None
) -> _Opened:
    form, weights = formats.open_network(source, network, format, None if head is None else pathlib.Path(head))
    values, remark = formats.find_config(form, source, weights, config)
    table = form.table(values)
    place = engine.check(table, weights, folder.shapes(form.network, values), form.network, remark)
    return _Opened(form, values, weights, table, place)


def _specs(opened: _Opened, dtype: np.dtype | None) -> Mapping[str, Spec]:
    """The parameters that ``_write`` writes."""
    form, config, weights, table, place = opened
    return engine.target_specs(table, weights, place, folder.shapes(form.network, config), dtype)


def _write(opened: _Opened, out: pathlib.Path, dtype: np.dtype | None) -> Mapping[str, Spec]:
    """Writes a network in our format into an existing folder, and returns its parameters."""
    form, config, weights, table, place = opened
    specs = _specs(opened, dtype)
    with byte_bar(form.network, specs, out) as bar, folder.writer(out, specs, bar.update) as file:
        for path, layer, array in engine.imported(table, weights, place):
            file.write(path, array, layer)
    folder.finish(out, form.network, config)
    return specs


def _summary(names: list[str]) -> str:
    """How many tensors each part of a file has, as ``196 tensors of text_model, logit_scale``."""
    parts: dict[str, int] = {}
    for name in names:
        part = re.match(r"(blip\.)?[^.]+", name)[0]
        parts[part] = parts.get(part, 0) + 1
    return ", ".join(part if count == 1 else f"{count} tensors of {part}" for part, count in parts.items())


def _tokenizer_files(
    source: pathlib.Path, given: str | os.PathLike | None, kind: type[Reward], config: Any, target: str | os.PathLike
) -> tuple[list[pathlib.Path], list[str]]:
    """The files of the tokenizer that goes along with a reward, and what the user should know about it.

    Raises UserError if the folder that was named holds none, or the tokenizer is not the network's.
    """

    def files_in(place: pathlib.Path) -> list[pathlib.Path]:
        files = [place / name for name in TOKENIZER_FILES if (place / name).is_file()]
        return files if any(file.name in VOCABULARIES for file in files) else []

    beside = files_in(source)  # of a file, none: what lies in its folder may be of another network
    files = files_in(pathlib.Path(given)) if given else beside
    if given and not files:
        raise UserError(f"{given} holds no tokenizer (tokenizer.json, vocab.json and merges.txt, or vocab.txt)")
    if not files:
        return [], [
            f"no tokenizer went along; a run wants it in {pathlib.Path(target) / TOKENIZER}: give --tokenizer "
            f"({kind.tokenizer_of})"
        ]
    kind.load_tokenizer(config, files[0].parent)
    if given and beside and [f.read_bytes() for f in files] != [f.read_bytes() for f in beside]:
        return files, [f"the tokenizer of {given} went along, in place of the one beside the weights in {source}"]
    return files, []
