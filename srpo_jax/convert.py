"""Converts the weights that users have into ours and back.

    python -m srpo_jax.convert import --source FLUX.1-dev --target models/flux-dev
    python -m srpo_jax.convert import --source HPS_v2.1_compressed.pt --target hps --tokenizer FLUX.1-dev/tokenizer
    python -m srpo_jax.convert export --source models/flux-dev --target out --format diffusers [--checkpoint WORKDIR]
    python -m srpo_jax.convert inspect PATH

``import`` reads a diffusers FLUX pipeline folder, a folder or file of one of its components, Black Forest Labs' single
files, CLIP in the names of transformers or open_clip (HPS-v2.1, PickScore), and T5. ``export`` writes what diffusers
(``--format diffusers``), Black Forest Labs' code (``bfl``) and ComfyUI (``comfyui``) read, and of LoRA runs the
factors alone, as diffusers (``lora-diffusers``) and ComfyUI (``lora-comfyui``) read them. Both are strict (every
tensor is used once, or nothing is written and one message says what is wrong), exact, and hold one tensor in memory.
"""

import argparse
import contextlib
import json
import os
import pathlib
import re
import shutil
import signal
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import tqdm

from srpo_jax import errors
from srpo_jax.errors import UserError
from srpo_jax.models.compute import Params
from srpo_jax.models.lora import Lora
from srpo_jax.weights import engine, folder, formats
from srpo_jax.weights import lora as weights_lora
from srpo_jax.weights.files import SafetensorsWriter, Spec, new_folder, read_json

# A pipeline folder's networks by their subfolder, and what goes along as it is.
COMPONENTS = {"transformer": "flux", "vae": "autoencoder", "text_encoder": "clip_text", "text_encoder_2": "t5"}
COPIED = ("tokenizer", "tokenizer_2", "scheduler")
INDEX = "model_index.json"
CLASSES = {
    "transformer": ["diffusers", "FluxTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "T5EncoderModel"],
}
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype(np.float32), "keep": None}
STYLES = ("diffusers", "bfl", "comfyui")
# Where a style puts a network's weights: folder and file name without suffix.
PLACES = {
    ("bfl", "flux"): ("", "flux1"),
    ("bfl", "autoencoder"): ("", "ae"),
    ("comfyui", "flux"): ("diffusion_models", "flux1"),
    ("comfyui", "autoencoder"): ("vae", "ae"),
    ("comfyui", "clip_text"): ("text_encoders", "clip_l"),
    ("comfyui", "t5"): ("text_encoders", "t5xxl"),
}
MAX_SHARD_SIZE = 10 * 1000**3  # bytes, diffusers' own


# --- writing ---


def _bar(label: str, specs: Mapping[str, Spec], where: pathlib.Path) -> tqdm.tqdm:
    """A progress bar over the bytes of some tensors. Raises UserError if they do not fit on the disk."""
    total = sum(spec.nbytes for spec in specs.values())
    free = shutil.disk_usage(where).free
    if total > free:
        raise UserError(f"{where.parent} has {free / 1e9:.1f} GB free; {label} needs {total / 1e9:.1f} GB")
    return tqdm.tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1000, desc=label, disable=None)


# --- import ---


def import_folder(
    source: str | os.PathLike,
    target: str | os.PathLike,
    network: str | None = None,
    format: str | None = None,
    dtype: np.dtype | None = None,
    config: str | os.PathLike | None = None,
    tokenizer: str | os.PathLike | None = None,
) -> None:
    """Converts a pipeline or a single network into our format.

    Args:
      source: a pipeline folder, a component's folder, or a weight file.
      target: the folder to make; a pipeline becomes a subfolder per component.
      network: which network the source must be; None takes what it is.
      format: which format the source must be in; None takes what it is. For folders that hold the same network twice.
      dtype: to store in; None keeps the source's.
      config: a config.json to use instead of the one beside the weights.
      tokenizer: a tokenizer folder that goes along with a CLIP reward; by default the tokenizer beside the weights.

    Raises UserError, and writes nothing, if the source is not what it should be or does not fit exactly.
    """
    source = pathlib.Path(source)
    if folder.is_ours(source) or (source / "transformer").is_dir() and folder.is_ours(source / "transformer"):
        raise UserError(f"{source} is in our format already")
    if not (source / INDEX).is_file():
        with new_folder(target) as out:
            found = _import_network(source, out, network, format, dtype, config)
            if found == "clip":
                _copy_tokenizer(source, pathlib.Path(tokenizer) if tokenizer else None, out)
            elif tokenizer:
                raise UserError(f"--tokenizer is for CLIP rewards; {source} is a {found} network")
        return
    for value, flag in ((network, "--network"), (format, "--format"), (config, "--config"), (tokenizer, "--tokenizer")):
        if value is not None:
            raise UserError(f"{source} is a whole pipeline, for which {flag} has no meaning; give one of its folders")
    parts = _pipeline_parts(source)
    with new_folder(target) as out:
        for part in parts:
            if part in COMPONENTS:
                (out / part).mkdir()
                _import_network(source / part, out / part, COMPONENTS[part], None, dtype, None)
            else:
                shutil.copytree(source / part, out / part)
        shutil.copy(source / INDEX, out / INDEX)


def _pipeline_parts(source: pathlib.Path) -> list[str]:
    """The subfolders of a pipeline that matter. Raises UserError if it is not FLUX's or is incomplete."""
    index = read_json(source / INDEX)
    if index.get("_class_name") != "FluxPipeline":
        raise UserError(f"{source / INDEX} describes a {index.get('_class_name')}; expected a FluxPipeline")
    parts = [name for name in (*COMPONENTS, *COPIED) if (index.get(name) or [None])[0] is not None]
    if missing := [name for name in parts if not (source / name).is_dir()]:
        raise UserError(f"{source} lacks the folders {', '.join(missing)} that its {INDEX} names")
    return parts


def _import_network(
    source: pathlib.Path,
    out: pathlib.Path,
    network: str | None,
    format: str | None,
    dtype: np.dtype | None,
    config: Any,
) -> str:
    """Converts one network into an existing folder; returns which it is."""
    form, weights = formats.open_network(source, network, format)
    values, remark = formats.find_config(form, source, weights, config)
    table = form.table(values)
    shapes = folder.shapes(form.network, values)
    place = engine.check(table, weights, shapes, form.network, remark)
    specs = engine.target_specs(table, weights, place, shapes, dtype)
    with _bar(form.network, specs, out) as bar, folder.writer(out, specs, bar.update) as file:
        for path, layer, array in engine.imported(table, weights, place):
            file.write(path, array, layer)
    folder.write_config(out, form.network, values)
    return form.network


def _copy_tokenizer(source: pathlib.Path, tokenizer: pathlib.Path | None, out: pathlib.Path) -> None:
    """Puts tokenizer files into ``out/tokenizer``. Raises UserError if the folder that was named has none."""
    place = tokenizer or source
    if place.is_file():
        return
    files = [place / name for name in TOKENIZER_FILES if (place / name).is_file()]
    if not any(file.name in ("tokenizer.json", "vocab.json") for file in files):
        if tokenizer:
            raise UserError(f"{tokenizer} holds no tokenizer (tokenizer.json, or vocab.json and merges.txt)")
        return
    (out / "tokenizer").mkdir()
    for file in files:
        shutil.copy(file, out / "tokenizer" / file.name)


# --- export ---


def export_folder(
    source: str | os.PathLike,
    target: str | os.PathLike,
    format: str,
    dtype: np.dtype | None = None,
    max_shard_size: int = MAX_SHARD_SIZE,
    transformer: Params | None = None,
    lora: Lora | None = None,
) -> None:
    """Writes a pipeline or a single network of ours in a format that others read.

    Args:
      source: a folder that ``import_folder`` made.
      target: the folder to make.
      format: "diffusers" (folders as ``FluxPipeline.from_pretrained`` reads them), "bfl" (``flux1.safetensors`` and
        ``ae.safetensors``) or "comfyui" (the same and the text encoders, in the folders of ComfyUI's ``models``).
      dtype: to store in; None keeps ours.
      max_shard_size: in bytes; larger diffusers networks are cut into several files with an index.
      transformer: trained parameters to write instead of the source's transformer.
      lora: that these are low-rank factors, to be merged into the source's transformer (whose merged kernels are then
        float32 unless ``dtype`` says otherwise); from ``checkpoint.lora``.

    Raises UserError, and writes nothing, if the source is not in our format or the trained parameters do not fit it.
    """
    source = pathlib.Path(source)
    if format not in STYLES:
        raise UserError(f"format {format!r} is unknown; choose {', '.join(STYLES)}")
    whole = not folder.is_ours(source)
    if whole and not folder.is_ours(source / "transformer"):
        raise UserError(f"{source} is not a folder made by `python -m srpo_jax.convert import`")
    parts = _parts_of_ours(source) if whole else [""]
    if not whole and formats.written_as(folder.read_config(source)[0], format) is None:
        raise UserError(f"{format} has no place for {source}; use --format diffusers")
    with new_folder(target) as out:
        for part in parts:
            network, config, weights = folder.open_weights(source / part, COMPONENTS.get(part))
            if transformer is not None and network == "flux":
                weights = _trained(transformer, weights) if lora is None else _merged(transformer, lora, weights)
            elif transformer is not None and not whole:
                raise UserError(f"{source} is a {network} network: a checkpoint has none to put there")
            _export_network(network, config, weights, out, part, format, dtype, max_shard_size)
        if whole and format == "diffusers":
            for name in COPIED:
                if (source / name).is_dir():
                    shutil.copytree(source / name, out / name)
            (out / INDEX).write_text(json.dumps(_index(source, parts), indent=2) + "\n")
        elif format == "diffusers" and (source / "tokenizer").is_dir():
            for file in (source / "tokenizer").iterdir():
                shutil.copy(file, out / file.name)


def _parts_of_ours(source: pathlib.Path) -> list[str]:
    """The subfolders of a pipeline of ours that are networks."""
    return [part for part in COMPONENTS if (source / part).is_dir()]


def _index(source: pathlib.Path, parts: list[str]) -> dict[str, Any]:
    """The pipeline's ``model_index.json``: as imported, or made for a folder that was put together by hand."""
    if (source / INDEX).is_file():
        return read_json(source / INDEX)
    index: dict[str, Any] = {"_class_name": "FluxPipeline"} | {part: CLASSES[part] for part in parts}
    for name in ("tokenizer", "tokenizer_2"):
        if (source / name).is_dir():
            index[name] = ["transformers", read_json(source / name / "tokenizer_config.json")["tokenizer_class"]]
    if (source / "scheduler").is_dir():
        index["scheduler"] = ["diffusers", "FlowMatchEulerDiscreteScheduler"]
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
) -> None:
    """Writes low-rank factors in a format that others read, a file in a new folder.

    Args:
      source: the pipeline or transformer that they adapt, a folder that ``import_folder`` made.
      target: the folder to make.
      format: of ``weights.lora.FORMATS``.
      factors, lora: from ``checkpoint.load_params`` and ``checkpoint.lora``.
      dtype: to store in; None is float32.

    Raises UserError, and writes nothing, if the factors are not of the source's transformer.
    """
    source = pathlib.Path(source)
    path = source if folder.is_ours(source) else source / "transformer"
    _, config, weights = folder.open_weights(path, "flux")
    leaves = engine.flatten(factors)
    weights_lora.check(weights.specs, leaves, lora, weights.path)
    tensors = dict(weights_lora.exported(config, leaves, lora, format))
    specs = {name: Spec(tensor.shape, dtype or np.dtype(np.float32)) for name, tensor in tensors.items()}
    subfolder, stem = weights_lora.PLACES[format]
    with new_folder(target) as out:
        (out / subfolder).mkdir(exist_ok=True)
        with SafetensorsWriter(out / subfolder / f"{stem}.safetensors", specs, {"format": "pt"}) as file:
            for name, tensor in tensors.items():
                file.write(name, tensor)


def _export_network(
    network: str,
    config: Any,
    weights: engine.ParameterSource,
    out: pathlib.Path,
    part: str,
    style: str,
    dtype: np.dtype | None,
    max_shard_size: int,
) -> None:
    """Writes one network of ours into the folder of an export."""
    form = formats.written_as(network, style)
    if form is None:  # of a pipeline; what is asked for by itself was refused before
        return
    table = form.table(config)
    specs = engine.exported_specs(table, weights.specs, dtype)
    if style == "diffusers":
        place, stem = out / part, form.weights
        place.mkdir(exist_ok=True)
        (place / "config.json").write_text(json.dumps(formats.foreign_config(network, config), indent=2) + "\n")
    else:
        subfolder, stem = PLACES[style, network]
        place = out / subfolder
        place.mkdir(exist_ok=True)
        max_shard_size = sys.maxsize
    with _bar(network, specs, out) as bar, _shards(place, stem, specs, max_shard_size, bar) as writers:
        for name, array in engine.exported(table, weights):
            writers[name].write(name, array)


@contextlib.contextmanager
def _shards(
    place: pathlib.Path, stem: str, specs: Mapping[str, Spec], largest: int, bar: tqdm.tqdm
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


# --- inspect ---


def describe(path: str | os.PathLike) -> Iterator[str]:
    """Lines about a file or folder: what it is, how many parameters, which dtypes and shapes. Raises UserError."""
    path = pathlib.Path(path)
    ours = folder.is_ours(path / "transformer")
    if ours or (path / INDEX).is_file():
        yield f"{path}: FLUX pipeline, {'our format' if ours else 'diffusers folder'}"
        for part in _parts_of_ours(path) if ours else _pipeline_parts(path):
            if part in COMPONENTS:
                yield f"{part}:"
                yield from ("  " + line for line in describe(path / part))
        return
    if folder.is_ours(path):
        network, config, weights = folder.open_weights(path)
        yield f"{weights.path}: {network}, our format"
    else:
        form, weights = formats.open_network(path)
        yield f"{weights.path}: {form}"
        try:
            config, remark = formats.find_config(form, path, weights)
            engine.check(form.table(config), weights, folder.shapes(form.network, config), form.network, remark)
            yield "complete: every tensor fits" + remark
        except UserError as error:
            yield f"does not convert as it is: {error}"
            config = None
    specs = weights.specs.values()
    parts = sorted({spec.dtype.name for spec in specs})
    dtypes = ", ".join(f"{sum(spec.dtype.name == part for spec in specs)} x {part}" for part in parts)
    size, nbytes = sum(spec.size for spec in specs), sum(spec.nbytes for spec in specs)
    yield f"{size:,} parameters, {nbytes / 1e9:.3f} GB, tensors: {dtypes}"
    if config is not None:
        yield str(config)
    kinds: dict[tuple, int] = {}
    for name, spec in weights.specs.items():
        kind = (re.sub(r"(?<=\.)\d+(?=\.)", "*", name), spec.shape, spec.dtype.name)
        kinds[kind] = kinds.get(kind, 0) + 1
    for (name, shape, dtype), count in sorted(kinds.items()):
        yield f"  {count:4} x {name} {list(shape)} {dtype}"


# --- command line ---


def _size(text: str) -> int:
    """Bytes from "10GB", "500MB" or a plain number."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?)B?", text.strip(), re.IGNORECASE)
    size = int(float(match[1]) * {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}[match[2].upper()]) if match else 0
    if size <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size, as 10GB or 500MB")
    return size


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m srpo_jax.convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    take = commands.add_parser("import", help="others' files -> our format")
    take.add_argument("--source", required=True, help="pipeline folder, component folder or weight file")
    take.add_argument("--target", required=True, help="folder to make")
    take.add_argument("--network", choices=folder.NETWORKS, help="which network the source must be")
    take.add_argument("--format", choices=sorted({form.name for form in formats.FORMATS}), help="of the source")
    take.add_argument("--dtype", choices=DTYPES, default="keep", help="to store in (default: the source's)")
    take.add_argument("--config", help="the network's config.json, where it is not beside the weights")
    take.add_argument("--tokenizer", help="tokenizer folder to take along, for a reward that comes without")
    give = commands.add_parser("export", help="our format -> others' files")
    give.add_argument("--source", required=True, help="folder that import made")
    give.add_argument("--target", required=True, help="folder to make")
    words = "lora-...: the factors of a LoRA run alone; the others merge them into the weights"
    give.add_argument("--format", choices=(*STYLES, *weights_lora.FORMATS), required=True, help=words)
    give.add_argument("--dtype", choices=DTYPES, default="keep", help="to store in (default: ours)")
    give.add_argument("--max-shard-size", type=_size, default=MAX_SHARD_SIZE, help="of diffusers files (default: 10GB)")
    give.add_argument("--checkpoint", help="workdir of a training run, whose transformer replaces the source's")
    give.add_argument("--step", type=int, help="of the checkpoint (default: the latest)")
    give.add_argument("--ema", action="store_true", help="take the checkpoint's moving average")
    look = commands.add_parser("inspect", help="say what a file or folder is")
    look.add_argument("path")
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line. Raises UserError."""
    args = _parser().parse_args(arguments)
    if args.command == "import":
        import_folder(
            args.source, args.target, args.network, args.format, DTYPES[args.dtype], args.config, args.tokenizer
        )
    elif args.command == "export":
        if args.checkpoint is None and (args.step is not None or args.ema):
            raise UserError("--step and --ema choose from a --checkpoint; give one")
        transformer = lora = None
        if args.checkpoint is not None:
            import jax
            from absl import logging

            from srpo_jax import checkpoint

            # On a worker of a TPU slice, JAX would wait for the others to use chips that nothing here needs.
            jax.config.update("jax_platforms", "cpu")
            logging.set_verbosity(logging.ERROR)  # Orbax warns of a file that one item of a checkpoint never has
            transformer = checkpoint.load_params(args.checkpoint, args.step, args.ema)
            lora = checkpoint.lora(args.checkpoint)
        dtype = DTYPES[args.dtype]
        if args.format in weights_lora.FORMATS:
            if lora is None:
                what = "no --checkpoint is given" if transformer is None else f"{args.checkpoint} trained all weights"
                raise UserError(f"--format {args.format} is for a run with config.lora.rank; {what}")
            export_lora(args.source, args.target, args.format, transformer, lora, dtype)
        else:
            export_folder(args.source, args.target, args.format, dtype, args.max_shard_size, transformer, lora)
    else:
        for line in describe(args.path):
            print(line)


if __name__ == "__main__":
    # A polite kill unwinds like Ctrl-C, so that nothing half-written stays.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(errors.run(main))
