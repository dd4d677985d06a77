"""Makes PNG files from prompts, as the pipeline's own inference does, with converted weights or a checkpoint of a run.

python -m srpo_jax.generate --model=models/flux-dev --prompts=prompts.txt --out=images --checkpoint=runs/hps

A job of several processes starts the command in each, and the first one writes: on TPUs and under SLURM they find each
other, elsewhere give --coordinator, --process-id and --process-count.
"""

import argparse
import dataclasses
import itertools
import os
import pathlib
import re
import sys
import types

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.sharding import Mesh
from PIL import Image

from srpo_jax import (
    architectures,
    command,
    distributed,
    errors,
    program,
    reading,
    record,
    sampling,
    sharding,
    storage,
    stored_weights,
    terminal,
    text,
)
from srpo_jax.config import QUANTIZE
from srpo_jax.data import sources
from srpo_jax.errors import UserError
from srpo_jax.evaluation import history
from srpo_jax.families.base import TRANSFORMER, Family
from srpo_jax.models import lora as models_lora
from srpo_jax.models.compute import Compute, Params, join, path_name
from srpo_jax.models.lora import Lora
from srpo_jax.weights import engine, folder
from srpo_jax.weights import lora as weights_lora
from srpo_jax.weights.files import Spec


def read_transformer(
    path: pathlib.Path,
    network: str,
    compute: Compute,
    mesh: Mesh,
    trained: Params | None,
    lora: Lora | None = None,
) -> tuple:
    """(graph definition, parameters on the mesh) of a pipeline's transformer, or with ``trained`` parameters.

    These stand in its place or, where ``lora`` says so, are factors beside it, which is then stored as ``lora`` says.
    Raises UserError if they are not of this transformer.
    """
    place = sharding.of(mesh, network)
    if trained is None:
        return folder.load(path, network, compute, place)[1:]
    config = folder.read_config(path, network)[1]

    def read(key: tuple, array: stored_weights.StoredArray) -> jax.Array:
        how = ocp.ArrayRestoreArgs(sharding=place(path_name(key), array.shape), dtype=compute.param_dtype)
        return array.read(how)

    if lora is not None:
        shapes = {name: Spec(shape, np.dtype(np.float32)) for name, shape in folder.shapes(network, config).items()}
        weights_lora.check(shapes, engine.flatten(trained), lora, path)
        graphdef, _ = models_lora.abstract(folder.constructor(network, config, compute), lora)
        factors = jax.tree_util.tree_map_with_path(read, trained)
        return graphdef, join(factors, program.load_transformer(path, network, compute, mesh, lora.quantized))
    graphdef, like = folder.abstract(network, config, compute)
    wanted, found = ({name: leaf.shape for name, leaf in engine.flatten(tree).items()} for tree in (like, trained))
    if wrong := sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)):
        raise UserError(f"the checkpoint is not of {path}: {len(wrong)} parameters differ, as {wrong[0]}")
    return graphdef, jax.tree_util.tree_map_with_path(read, trained)


def prompt_length(family: Family, model: str | os.PathLike) -> int:
    """The tokens of a prompt in inference: what the tokenizer says, at most what the family takes."""
    name = next(name for name, tokenizer in family.tokenizers.items() if tokenizer.array is not None)
    return min(family.text_length, text.load_tokenizer(pathlib.Path(model) / name).model_max_length)


def generate(
    model: str | os.PathLike,
    prompts: list[str],
    out: str | os.PathLike,
    *,
    height: int,
    width: int,
    steps: int,
    guidance: float,
    seed: int = 0,
    latents: np.ndarray | None = None,
    trained: Params | None = None,
    lora: Lora | None = None,
    dtype: str = "float32",
    attention: str = "auto",
    batch_size: int | None = None,
    text_length: int | None = None,
    mesh: Mesh | None = None,
) -> list[pathlib.Path]:
    """Makes one image a prompt and writes ``OUT/0000-words-of-the-prompt.png`` and so on; process 0 does, of a job.

    Args:
      model: pipeline folder in our format.
      prompts: at least one.
      out: folder, made if there is none.
      height, width: pixels, multiples of the family's ``cell``.
      steps: of the Euler sampler; the noise schedule is that of the pipeline's scheduler file.
      guidance: scale; not used by a transformer without that input.
      seed: of the initial noise; image i has its own whatever the batch.
      latents: initial noise [len(prompts), N, C], packed, instead.
      trained: the transformer's parameters from ``stored_weights.load_params`` instead of the folder's.
      lora: from ``record.lora``: that ``trained`` are factors beside the folder's, and how that is stored.
      dtype: of all weights and matrix products.
      attention: backend of the transformer, see ``models.attention.choose``.
      batch_size: images at a time; default is one a device.
      text_length: tokens of a prompt, padding included; default is ``prompt_length``.
      mesh: default is all devices along "fsdp".

    Returns:
      The files.

    Raises UserError for a folder that is not right, sizes that do not fit, an ``out`` that holds anything but pictures
    of these prompts, which are drawn anew, and ``sampling.NotFinite``.
    """
    model, out = pathlib.Path(model), storage.path(out)
    files = [out / f"{index:04d}-{_words(prompt)}.png" for index, prompt in enumerate(prompts)]
    storage.check_writable(out, "--out")
    _check_out(out, {file.name for file in files})
    family, sizes = architectures.read_pipeline(model)
    family.check_size(height, width, ("--height", "--width"))
    length = text_length or prompt_length(family, model)
    family.check_text_length("--text-length", length)
    family.schedule(model, steps, height, width)  # what is wrong with its file is told before weights are read
    shape = (len(prompts), *family.token_shape(height, width))
    if latents is not None and latents.shape != shape:
        raise UserError(
            f"the latents have shape {latents.shape}; {len(prompts)} prompts at {height}x{width} need {shape}: "
            f"[images, (height / {family.cell}) * (width / {family.cell}), {shape[2]}]"
        )
    mesh = mesh or sharding.make_mesh(types.SimpleNamespace(data=1, fsdp=-1, tensor=1))
    compute, frozen = sampling.computes(mesh, dtype, attention)
    platform = mesh.devices.flat[0].platform
    terminal.say(f"{mesh.devices.size} {platform} device(s), {dtype}, attention {compute.attention}")
    with terminal.doing("loading the transformer"):
        graphdef, params = read_transformer(model / TRANSFORMER, family.network, compute, mesh, trained, lora)
    with terminal.doing("loading the autoencoder and the text encoders"):
        tools = sampling.read_tools(model, mesh, family, sizes.transformer, frozen, length)
    look, at_once = sampling.Look(height, width, steps, guidance), batch_size or sharding.batch_parts(mesh)
    painter = sampling.Painter(
        mesh, family, graphdef, tools.autoencoder, model, look, at_once=min(at_once, len(prompts))
    )
    with terminal.doing("encoding the prompts"):
        chunks = painter.prepare(tools.encode, prompts, seed=seed, noise=latents)
    pending, writes = iter(files), jax.process_index() == 0
    painted = painter.paint(params, tools.params, chunks)
    with terminal.doing(f"compiling, and the first {chunks[0].count} of {len(prompts)}"):
        first = next(painted)
    with terminal.bar(len(prompts), "image", "drawing", shown=writes) as bar:
        for images in itertools.chain([first], painted):
            for image in images if writes else ():
                sampling.save_image(Image.fromarray(image), next(pending))
            bar.update(len(images))
    return files


def _check_out(out: epath.Path, names: set[str]) -> None:
    """Raises UserError for a folder in which pictures would lie among others."""
    there = sorted(path.name for path in out.iterdir() if not path.name.startswith(".")) if out.is_dir() else []
    if others := [name for name in there if name not in names and name != storage.FRESH_DISK]:
        raise UserError(
            f"--out={out} holds {len(others)} files that are not pictures of these prompts, as {others[0]}; choose "
            "another folder"
        )


def _words(prompt: str) -> str:
    """A prompt as a part of a file name."""
    return re.sub(r"[^\w]+", "-", prompt)[:40].strip("-") or "image"


def _parser() -> command.Parser:
    parser = command.parser("generate", __doc__)
    add = parser.add_argument
    add("--model", type=command.path, required=True, help="pipeline folder made by `python -m srpo_jax.convert import`")
    what = parser.add_mutually_exclusive_group(required=True)
    words = "prompts: a file, a pattern of files or tfds:NAME[:SPLIT], as config.data.prompts"
    what.add_argument("--prompts", type=command.path, help=words)
    what.add_argument("--prompt", help="one prompt")
    add("--column", help="of --prompts, where there are several (default: prompt, caption or text)")
    add("--out", type=command.path, required=True, help="folder for the images, local or gs://BUCKET/PATH")
    words = "workdir of a training run, whose transformer replaces the model's"
    add("--checkpoint", type=command.path, help=words)
    add("--step", type=command.update, help="of the checkpoint, or best, by checkpoint.best (default: the newest)")
    add("--ema", action="store_true", help="take the checkpoint's moving average")
    words = "how a LoRA's base is stored: none (in --dtype), int8, nf4, or as it was trained (default: none)"
    add("--quantize", choices=(*QUANTIZE, "trained"), default="none", help=words)
    words = "npz file with the initial noise, `latents` [images, tokens, features], packed"
    add("--latents", type=command.path, help=words)
    command.add_drawing(parser)
    command.add_mesh(parser)
    command.add_job(parser)
    return parser


def _read_latents(path: str) -> np.ndarray:
    try:
        reading.check(path)
        with np.load(path) as file:
            found = file["latents"]
    except Exception as error:  # of a broken file numpy and zipfile raise whatever they stumble over
        words = getattr(error, "strerror", None) or error
        raise UserError(f"--latents={path}: {words}; expected an npz file with an array `latents`") from error
    if found.dtype.kind != "f" or not np.isfinite(found).all():
        raise UserError(f"--latents={path}: `latents` must be finite floating-point numbers, not {found.dtype}")
    return found


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line. Raises UserError."""
    args = _parser().parse_args(arguments)
    logging.set_verbosity(logging.ERROR)
    if args.prompts is None and args.column is not None:
        raise UserError(f"--column={args.column} is of --prompts; leave it out")
    if args.checkpoint is None and (args.step is not None or args.ema):
        raise UserError("--step and --ema choose from a --checkpoint; give one")
    with distributed.job(args.coordinator, args.process_id, args.process_count):
        _run(args)


def _run(args: argparse.Namespace) -> None:
    lora = None if args.checkpoint is None else record.lora(args.checkpoint)
    if lora is None and args.quantize != "none":
        raise UserError(f"--quantize={args.quantize} is for the base of a LoRA run; give one as --checkpoint")
    if lora is not None and args.quantize != "trained":
        lora = dataclasses.replace(lora, quantized=args.quantize)
    step = None if args.checkpoint is None else history.best(args.checkpoint, args.step)
    prompts = [args.prompt] if args.prompts is None else sources.read(args.prompts, args.column)
    files = generate(
        args.model,
        prompts,
        args.out,
        height=args.height,
        width=args.width,
        steps=args.steps,
        guidance=args.guidance,
        seed=args.seed,
        latents=None if args.latents is None else _read_latents(args.latents),
        trained=None if args.checkpoint is None else stored_weights.load_params(args.checkpoint, step, args.ema),
        lora=lora,
        dtype=args.dtype or sampling.default_dtype(),
        attention=args.attention,
        batch_size=args.batch,
        text_length=args.text_length,
        mesh=sharding.make_mesh(args),
    )
    if jax.process_index() == 0:
        print(f"{len(files)} images in {args.out}")


if __name__ == "__main__":
    sys.exit(errors.run(main))
