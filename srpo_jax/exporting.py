"""Writes networks of ours as others read them: whole pipelines, single networks, and a LoRA's factors alone."""

import contextlib
import json
import os
import pathlib
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from srpo_jax import families, schema, terminal
from srpo_jax.errors import UserError
from srpo_jax.families.base import INDEX, SCHEDULER, TRANSFORMER, Family
from srpo_jax.importing import byte_bar, parts_of_ours
from srpo_jax.models.compute import Params
from srpo_jax.models.lora import Lora
from srpo_jax.weights import engine, folder, formats
from srpo_jax.weights import lora as weights_lora
from srpo_jax.weights.files import SafetensorsWriter, Spec, new_folder, read_json

STYLES = ("diffusers", "bfl", "comfyui")
MAX_SHARD_SIZE = 10 * 1000**3  # bytes, diffusers' own
FLOAT8, HALF = np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.bfloat16)


def export_folder(
    source: str | os.PathLike,
    target: str | os.PathLike,
    format: str,
    dtype: np.dtype | None = None,
    max_shard_size: int = MAX_SHARD_SIZE,
    transformer: Params | None = None,
    lora: Lora | None = None,
) -> list[Mapping[str, Spec]]:
    """Writes a pipeline or a single network of ours in a format that others read.

    Args:
      source: a folder that ``import_folder`` made.
      target: the folder to make.
      format: "diffusers" (folders as ``FluxPipeline.from_pretrained`` reads them), "bfl" (``flux1.safetensors`` and
        ``ae.safetensors``) or "comfyui" (the same and the text encoders, in the folders of ComfyUI's ``models``).
      dtype: to store in; None keeps ours. ``FLOAT8`` is for the matrices of the transformer and T5, in files for
        ComfyUI; everything else is bfloat16 then.
      max_shard_size: in bytes; larger diffusers networks are cut into several files with an index.
      transformer: trained parameters to write instead of the source's transformer.
      lora: that these are low-rank factors, to be merged into the source's transformer (whose merged kernels are then
        float32 unless ``dtype`` says otherwise); from ``record.lora``.

    Returns:
      The tensors of each network that was written.

    Raises UserError, and writes nothing, if the source is not in our format, the trained parameters do not fit it, or
    a number is beyond what ``dtype`` holds.
    """
    source = pathlib.Path(source)
    if format not in STYLES:
        raise UserError(f"format {format!r} is unknown; choose {', '.join(STYLES)}")
    if dtype == FLOAT8 and format == "diffusers":
        raise UserError("--dtype float8 is for --format comfyui and bfl: diffusers computes in the dtype of the files")
    whole = not folder.is_ours(source)
    if whole and not folder.is_ours(source / TRANSFORMER):
        raise UserError(f"{source} is not a folder made by `python -m srpo_jax.convert import`")
    family = families.of_pipeline(source) if whole else None
    parts = parts_of_ours(source, family) if whole else [""]
    if not whole and formats.written_as(folder.read_config(source)[0], format) is None:
        network = folder.read_config(source)[0]
        remedy = "use --format diffusers" if formats.written_as(network, "diffusers") else "keep what it was made of"
        raise UserError(f"{format} has no place for {source}, a {network} network; {remedy}")
    written = []
    with new_folder(target) as out:
        for part in parts:
            expected = family.components[part].network if whole else None
            network, config, weights = folder.open_weights(source / part, expected)
            if transformer is not None and network in families.FAMILIES:
                weights = _trained(transformer, weights) if lora is None else _merged(transformer, lora, weights)
            elif transformer is not None and not whole:
                raise UserError(f"{source} is a {network} network: a checkpoint has none to put there")
            specs = _export_network(network, config, weights, out, part, format, dtype, max_shard_size)
            written += [] if specs is None else [specs]
        if whole and format == "diffusers":
            for name in family.copied:
                if (source / name).is_dir():
                    shutil.copytree(source / name, out / name)
            (out / INDEX).write_text(json.dumps(_index(source, family, parts), indent=2) + "\n")
        elif format == "diffusers" and (source / "tokenizer").is_dir():
            for file in (source / "tokenizer").iterdir():
                shutil.copy(file, out / file.name)
    return written


def _index(source: pathlib.Path, family: Family, parts: list[str]) -> dict[str, Any]:
    """The pipeline's ``model_index.json``: as imported, or made for a folder that was put together by hand."""
    if (source / INDEX).is_file():
        return read_json(source / INDEX)
    index: dict[str, Any] = {"_class_name": family.pipeline}
    for part in parts:
        index[part] = [family.components[part].library, family.components[part].published]
    for name in family.tokenizers:
        if (source / name).is_dir():
            file = source / name / "tokenizer_config.json"
            kind = read_json(file).get("tokenizer_class")
            if not isinstance(kind, str):
                raise UserError(f"{file}: tokenizer_class={schema.shown(kind)} must be text; export needs it")
            index[name] = ["transformers", kind]
    if (source / SCHEDULER).is_dir():
        index[SCHEDULER] = ["diffusers", family.scheduler]
    return index


def _trained(params: Params, weights: engine.ParameterSource) -> engine.ParameterSource:
    """The trained parameters as a source. Raises UserError if they are not of the network that they are to replace."""
    trained = engine.MemorySource(engine.flatten(params), "the checkpoint")
    shapes, expected = ({name: spec.shape for name, spec in s.specs.items()} for s in (trained, weights))
    if wrong := sorted(name for name in shapes.keys() | expected.keys() if shapes.get(name) != expected.get(name)):
        raise UserError(f"the checkpoint is not of {weights.path}: {len(wrong)} parameters differ, as {wrong[0]}")
    return trained


def _merged(params: Params, lora: Lora, weights: engine.ParameterSource) -> engine.ParameterSource:
    return weights_lora.MergedSource(weights, engine.flatten(params), lora)


def export_lora(
    source: str | os.PathLike,
    target: str | os.PathLike,
    format: str,
    factors: Params,
    lora: Lora,
    dtype: np.dtype | None = None,
) -> Mapping[str, Spec]:
    """Writes low-rank factors in a format that others read, a file in a new folder.

    Args:
      source: the pipeline or transformer that they adapt, a folder that ``import_folder`` made.
      target: the folder to make.
      format: of ``weights.lora.FORMATS``.
      factors, lora: from ``stored_weights.load_params`` and ``record.lora``.
      dtype: to store in; None is float32, as alphas always are.

    Returns:
      The tensors that were written.

    Raises UserError, and writes nothing, if the factors are not of the source's transformer.
    """
    if dtype == FLOAT8:
        raise UserError(f"--dtype float8 is for whole weights; --format {format} takes float32, bfloat16 or float16")
    source = pathlib.Path(source)
    path = source if folder.is_ours(source) else source / TRANSFORMER
    _, config, weights = folder.open_weights(path, families.of_transformer(path).network)
    leaves = engine.flatten(factors)
    weights_lora.check(weights.specs, leaves, lora, weights.path)
    tensors = dict(weights_lora.exported(config, leaves, lora, format))
    full = np.dtype(np.float32)
    # An alpha is one number, which a reader divides by the rank: it is not rounded.
    specs = {name: Spec(tensor.shape, (tensor.ndim and dtype) or full) for name, tensor in tensors.items()}
    subfolder, stem = weights_lora.PLACES[format]
    with new_folder(target) as out:
        (out / subfolder).mkdir(exist_ok=True)
        with SafetensorsWriter(out / subfolder / f"{stem}.safetensors", specs, {"format": "pt"}) as file:
            for name, tensor in tensors.items():
                file.write(name, tensor)
    return specs


def _export_network(
    network: str,
    config: Any,
    weights: engine.ParameterSource,
    out: pathlib.Path,
    part: str,
    style: str,
    dtype: np.dtype | None,
    max_shard_size: int,
) -> Mapping[str, Spec] | None:
    """Writes one network of ours into the folder of an export; returns its tensors, None if it has no place there."""
    form = formats.written_as(network, style)
    if form is None:  # of a pipeline; what is asked for by itself was refused before
        return None
    table, component = form.table(config), families.component_of(network)
    specs = engine.exported_specs(table, weights.specs, HALF if dtype == FLOAT8 else dtype)
    if dtype == FLOAT8 and component.matrices:
        specs = {name: Spec(spec.shape, FLOAT8) if len(spec.shape) > 1 else spec for name, spec in specs.items()}
    if style == "diffusers":
        place, stem = out / part, form.weights
        place.mkdir(exist_ok=True)
        (place / "config.json").write_text(json.dumps(formats.foreign_config(network, config), indent=2) + "\n")
    else:
        subfolder, stem = component.places[style]
        place = out / subfolder
        place.mkdir(exist_ok=True)
        max_shard_size = sys.maxsize
    with byte_bar(network, specs, out) as bar, _shards(place, stem, specs, max_shard_size, bar) as writers:
        for name, array in engine.exported(table, weights):
            writers[name].write(name, array)
    return specs


@contextlib.contextmanager
def _shards(
    place: pathlib.Path, stem: str, specs: Mapping[str, Spec], largest: int, bar: terminal.Bar
) -> Iterator[dict[str, SafetensorsWriter]]:
    """Opens the file, or the files and their index, that tensors go to; yields the writer of each tensor."""
    groups: list[dict[str, Spec]] = [{}]
    room = largest
    # By layer and not by kind, so that a block lies in one file.
    for name in sorted(specs, key=lambda name: [int(x) if x.isdigit() else x for x in re.split(r"(\d+)", name)]):
        if groups[-1] and specs[name].nbytes > room:
            groups.append({})
            room = largest
        groups[-1][name] = specs[name]
        room -= specs[name].nbytes
    count = len(groups)
    files = [f"{stem}.safetensors"]
    if count > 1:
        files = [f"{stem}-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
        index = {
            "metadata": {"total_size": sum(spec.nbytes for spec in specs.values())},
            "weight_map": {name: file for group, file in zip(groups, files, strict=True) for name in group},
        }
        (place / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    with contextlib.ExitStack() as stack:
        writers = {}
        for group, file in zip(groups, files, strict=True):
            # transformers refuses files that do not say that they are torch's.
            writer = stack.enter_context(SafetensorsWriter(place / file, group, {"format": "pt"}, bar.update))
            writers.update(dict.fromkeys(group, writer))
        yield writers
