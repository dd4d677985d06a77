"""Converts the weights that users have into ours and back.

    python -m srpo_jax.convert import --source FLUX.1-dev --target models/flux-dev
    python -m srpo_jax.convert import --source HPS_v2.1_compressed.pt --target hps --tokenizer FLUX.1-dev/tokenizer
    python -m srpo_jax.convert import --source clip-vit-large-patch14 --head sac+logos+ava1.pth --target aesthetic
    python -m srpo_jax.convert export --source models/flux-dev --target out --format diffusers [--checkpoint WORKDIR]
    python -m srpo_jax.convert inspect PATH

``import`` reads a diffusers FLUX pipeline folder, a folder or file of one of its components, Black Forest Labs' single
files, CLIP in the names of transformers or open_clip (HPS-v2.1, PickScore), T5, ImageReward.pt, and aesthetic scores:
the folder of a CLIP or SigLIP and, by ``--head``, the file of the score's head. ``export`` writes what diffusers
(``--format diffusers``), Black Forest Labs' code (``bfl``) and ComfyUI (``comfyui``) read, and of LoRA runs the
factors alone, as diffusers (``lora-diffusers``) and ComfyUI (``lora-comfyui``) read them. Both are strict (every
tensor is used once, or nothing is written and one message says what is wrong), exact, and hold one tensor in memory.
"""

import argparse
import os
import pathlib
import re
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence

import ml_dtypes
import numpy as np

from srpo_jax import command, errors, families, record, terminal
from srpo_jax.errors import UserError
from srpo_jax.exporting import FLOAT8, MAX_SHARD_SIZE, STYLES, export_folder, export_lora
from srpo_jax.families.base import INDEX, TRANSFORMER
from srpo_jax.importing import import_folder, parts_of_ours, pipeline_parts
from srpo_jax.weights import engine, folder, formats
from srpo_jax.weights import lora as weights_lora
from srpo_jax.weights.files import Spec

DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype(np.float32), "keep": None}
EXPORT_DTYPES = DTYPES | {"float16": np.dtype(np.float16), "float8": FLOAT8}


# --- inspect ---


def describe(path: str | os.PathLike) -> Iterator[str]:
    """Lines about a file or folder: what it is, how many parameters, which dtypes and shapes. Raises UserError."""
    path = pathlib.Path(path)
    ours = folder.is_ours(path / TRANSFORMER)
    if ours or (path / INDEX).is_file():
        family = families.of_pipeline(path) if ours else families.of_index(path)
        yield f"{path}: {family.name} pipeline, {'our format' if ours else 'diffusers folder'}"
        for part in parts_of_ours(path, family) if ours else pipeline_parts(path, family):
            if part in family.components:
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
    size = float(match[1]) * {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}[match[2].upper()] if match else 0
    if not 1 <= size <= 1e18:
        raise argparse.ArgumentTypeError(f"={text}: must be a size, as 10GB or 500MB")
    return int(size)


def _parser() -> command.Parser:
    parser = command.parser("convert", __doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    def add(name: str, words: str) -> Callable[..., argparse.Action]:
        return commands.add_parser(name, help=words, allow_abbrev=False).add_argument

    take = add("import", "others' files -> our format")
    take("--source", type=command.path, required=True, help="pipeline folder, component folder or weight file")
    take("--target", type=command.path, required=True, help="folder to make")
    take("--network", choices=folder.NETWORKS, help="which network the source must be")
    take("--format", choices=sorted({form.name for form in formats.FORMATS}), help="of the source")
    take("--dtype", choices=DTYPES, default="keep", help="to store in (default: the source's)")
    take("--config", type=command.path, help="the network's config.json, where it is not beside the weights")
    take("--tokenizer", type=command.path, help="tokenizer folder to take along, for a reward that comes without")
    take("--head", type=command.path, help="weights of an aesthetic score's head; its tower is the source")
    give = add("export", "our format -> others' files")
    give("--source", type=command.path, required=True, help="folder that import made")
    give("--target", type=command.path, required=True, help="folder to make")
    words = "lora-...: the factors of a LoRA run alone; the others merge them into the weights"
    give("--format", choices=(*STYLES, *weights_lora.FORMATS), required=True, help=words)
    words = "to store in (default: ours); float8 is e4m3, for the matrices of the transformer and T5 in ComfyUI"
    give("--dtype", choices=EXPORT_DTYPES, default="keep", help=words)
    give("--max-shard-size", type=_size, default=MAX_SHARD_SIZE, help="of diffusers files (default: 10GB)")
    words = "workdir of a training run, whose transformer replaces the source's"
    give("--checkpoint", type=command.path, help=words)
    give("--step", type=command.update, help="of the checkpoint, or best, by checkpoint.best (default: the newest)")
    give("--ema", action="store_true", help="take the checkpoint's moving average")
    look = add("inspect", "say what a file or folder is")
    look("path", type=command.path)
    return parser


def _wrote(target: str, networks: Sequence[Mapping[str, Spec]]) -> str:
    """What a command has made, in a line: how many networks, bytes, and dtypes, the one of the most bytes first."""
    sizes: dict[str, int] = {}
    for spec in (spec for specs in networks for spec in specs.values()):
        sizes[spec.dtype.name] = sizes.get(spec.dtype.name, 0) + spec.nbytes
    count = "1 network" if len(networks) == 1 else f"{len(networks)} networks"
    dtypes = " and ".join(sorted(sizes, key=sizes.get, reverse=True))
    return f"wrote {target}: {count}, {terminal.in_bytes(sum(sizes.values()))}, {dtypes}"


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line. Raises UserError."""
    args = _parser().parse_args(arguments)
    if args.command == "import":
        written = import_folder(
            args.source,
            args.target,
            args.network,
            args.format,
            DTYPES[args.dtype],
            args.config,
            args.tokenizer,
            args.head,
        )
        print(_wrote(args.target, written))
    elif args.command == "export":
        if args.checkpoint is None and (args.step is not None or args.ema):
            raise UserError("--step and --ema choose from a --checkpoint; give one")
        transformer = lora = None
        if args.checkpoint is not None:
            import jax
            from absl import logging

            from srpo_jax import stored_weights
            from srpo_jax.evaluation import history

            # On a worker of a TPU slice, JAX would wait for the others to use chips that nothing here needs.
            jax.config.update("jax_platforms", "cpu")
            logging.set_verbosity(logging.ERROR)  # Orbax warns of a file that one item of a checkpoint never has
            step = history.best(args.checkpoint, args.step)
            transformer = stored_weights.load_params(args.checkpoint, step, args.ema)
            lora = record.lora(args.checkpoint)
        dtype = EXPORT_DTYPES[args.dtype]
        if args.format in weights_lora.FORMATS:
            if lora is None:
                what = "no --checkpoint is given" if transformer is None else f"{args.checkpoint} trained all weights"
                raise UserError(f"--format {args.format} is for a run with config.lora.rank; {what}")
            written = [export_lora(args.source, args.target, args.format, transformer, lora, dtype)]
        else:
            size = args.max_shard_size
            written = export_folder(args.source, args.target, args.format, dtype, size, transformer, lora)
        print(_wrote(args.target, written))
    else:
        for line in describe(args.path):
            print(line)


if __name__ == "__main__":
    # A polite kill unwinds like Ctrl-C, so that nothing half-written stays.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(errors.run(main))
