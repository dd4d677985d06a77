"""Makes PNG files from prompts, as diffusers' FluxPipeline does, with converted weights or a checkpoint of a run.

python -m srpo_jax.generate --model=models/flux-dev --prompts=prompts.txt --out=images --checkpoint=runs/hps

A job of several processes starts the command in each, and the first one writes: on TPUs and under SLURM they find each
other, elsewhere give --coordinator, --process_id and --process_count.
"""

import argparse
import dataclasses
import os
import pathlib
import re
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tqdm
from absl import logging
from jax.sharding import Mesh
from PIL import Image

from srpo_jax import checkpoint, conditions, distributed, errors, program, sampling, sharding, storage, text
from srpo_jax.algorithm import flow
from srpo_jax.config import ATTENTION, DTYPES, QUANTIZE
from srpo_jax.data import sources
from srpo_jax.errors import UserError
from srpo_jax.models import lora as models_lora
from srpo_jax.models.compute import Compute, Params, join, path_name
from srpo_jax.models.lora import Lora
from srpo_jax.weights import engine, folder
from srpo_jax.weights import lora as weights_lora
from srpo_jax.weights.files import Spec

MAX_TEXT = 512  # T5 tokens of FLUX.1-dev; also what diffusers' pipeline takes unless told otherwise


def load_transformer(
    path: pathlib.Path,
    compute: Compute,
    mesh: Mesh,
    trained: Params | None,
    lora: Lora | None = None,
) -> tuple:
    """(config, graph definition, parameters on the mesh) of a pipeline's transformer, or with ``trained`` parameters.

    These stand in its place or, where ``lora`` says so, are factors beside it, which is then stored as ``lora`` says.
    Raises UserError if they are not of this transformer.
    """
    if trained is None:
        return folder.load(path, "flux", compute, sharding.of(mesh, "flux"))
    config = program.read_config(path, "flux")
    place = sharding.of(mesh, "flux")

    def read(key: tuple, array: checkpoint.StoredArray) -> jax.Array:
        how = ocp.ArrayRestoreArgs(sharding=place(path_name(key), array.shape), dtype=compute.param_dtype)
        return array.read(how)

    if lora is not None:
        shapes = {name: Spec(shape, np.dtype(np.float32)) for name, shape in folder.shapes("flux", config).items()}
        weights_lora.check(shapes, engine.flatten(trained), lora, path)
        graphdef, _ = models_lora.abstract(config, compute, lora)
        factors = jax.tree_util.tree_map_with_path(read, trained)
        return config, graphdef, join(factors, program.load_transformer(path, compute, mesh, lora.quantized))
    graphdef, like = folder.abstract("flux", config, compute)
    wanted, found = ({name: leaf.shape for name, leaf in engine.flatten(tree).items()} for tree in (like, trained))
    if wrong := sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)):
        raise UserError(f"the checkpoint is not of {path}: {len(wrong)} parameters differ, as {wrong[0]}")
    return config, graphdef, jax.tree_util.tree_map_with_path(read, trained)


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
    attention: str = "xla",
    batch_size: int | None = None,
    text_length: int | None = None,
    mesh: Mesh | None = None,
) -> list[pathlib.Path]:
    """Makes one image a prompt and writes ``OUT/0000-words-of-the-prompt.png`` and so on; process 0 does, of a job.

    Args:
      model: pipeline folder in our format.
      prompts: at least one.
      out: folder, made if there is none.
      height, width: pixels, multiples of 16.
      steps: of the Euler sampler; the noise schedule is that of the pipeline's scheduler file.
      guidance: distilled guidance scale; not used by a transformer without that input.
      seed: of the initial noise; image i has its own whatever the batch.
      latents: initial noise [len(prompts), N, 64], packed, instead.
      trained: the transformer's parameters from ``checkpoint.load_params`` instead of the folder's.
      lora: from ``checkpoint.lora``: that ``trained`` are factors beside the folder's, and how that is stored.
      dtype: of all weights and matrix products.
      attention: backend.
      batch_size: images at a time; default is one a device.
      text_length: T5 tokens of a prompt, padding included; default is what the tokenizer says, at most 512.
      mesh: default is all devices along "fsdp".

    Returns:
      The files.

    Raises UserError for a folder that is not right, or sizes that do not fit.
    """
    model, out = pathlib.Path(model), storage.path(out)
    tokens = height // 16 * (width // 16)
    if latents is not None and latents.shape != (len(prompts), tokens, 64):
        raise UserError(
            f"the latents have shape {latents.shape}; {len(prompts)} prompts at {height}x{width} need "
            f"{(len(prompts), tokens, 64)}: [images, (height / 16) * (width / 16), 64]"
        )
    scheduler = sampling.read_scheduler(model)
    mesh = mesh or sharding.make_mesh(types.SimpleNamespace(data=1, fsdp=-1, tensor=1))
    parts = sharding.batch_parts(mesh)
    batch_size = -(-min(batch_size or parts, len(prompts)) // parts) * parts
    kind = jnp.dtype(dtype)
    compute = Compute(dtype=kind, param_dtype=kind, attention=attention, mesh=mesh, constrain=sharding.constraint(mesh))
    if text_length is None:
        text_length = min(MAX_TEXT, text.load_tokenizer(model / "tokenizer_2").model_max_length)

    config, transformer, params = load_transformer(model / program.TRANSFORMER, compute, mesh, trained, lora)
    _, autoencoder, decoder_params = folder.load(
        model / program.AUTOENCODER, "autoencoder", compute, sharding.of(mesh, "autoencoder")
    )
    encode = conditions.TextEncoders(model, compute, mesh, config, text_length)
    function = sampling.make_sampler(
        transformer,
        autoencoder,
        height=height,
        width=width,
        sigmas=flow.pipeline_schedule(steps, tokens, scheduler),
        guidance=guidance if config.guidance_embeds else None,
    )
    sampler = sampling.Sampler(mesh, function, tokens, batch_size)
    chunks = sampler.prepare(encode, prompts, seed=seed, noise=latents)
    files = [out / f"{index:04d}-{_words(prompt)}.png" for index, prompt in enumerate(prompts)]
    pending, writes = iter(files), jax.process_index() == 0
    with tqdm.tqdm(total=len(prompts), unit="image", disable=not (writes and sys.stderr.isatty())) as bar:
        for images in sampler.draw(params, decoder_params, chunks):
            for image in images if writes else ():
                sampling.save_image(Image.fromarray(image), next(pending))
            bar.update(len(images))
    return files


def _words(prompt: str) -> str:
    """A prompt as a part of a file name."""
    return re.sub(r"[^\w]+", "-", prompt)[:40].strip("-") or "image"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m srpo_jax.generate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--model", required=True, help="pipeline folder made by `python -m srpo_jax.convert import`")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompts", help="file of prompts: text (one a line), CSV, JSON, JSON Lines or Parquet")
    what.add_argument("--prompt", help="one prompt")
    parser.add_argument("--out", required=True, help="folder for the images, local or gs://BUCKET/PATH")
    parser.add_argument("--checkpoint", help="workdir of a training run, whose transformer replaces the model's")
    parser.add_argument("--step", type=int, help="of the checkpoint (default: the newest)")
    parser.add_argument("--ema", action="store_true", help="take the checkpoint's moving average")
    words = "how a LoRA's base is stored: none (in --dtype), int8, nf4, or as it was trained (default: none)"
    parser.add_argument("--quantize", choices=(*QUANTIZE, "trained"), default="none", help=words)
    parser.add_argument("--height", type=int, default=1024, help="pixels, a multiple of 16 (default: 1024)")
    parser.add_argument("--width", type=int, default=1024, help="pixels, a multiple of 16 (default: 1024)")
    parser.add_argument("--steps", type=int, default=50, help="of the sampler (default: 50)")
    parser.add_argument("--guidance", type=float, default=3.5, help="guidance scale (default: 3.5)")
    parser.add_argument("--seed", type=int, default=0, help="of the initial noise (default: 0)")
    parser.add_argument("--latents", help="npz file with the initial noise, `latents` [images, tokens, 64], packed")
    parser.add_argument("--text-length", type=int, help="T5 tokens of a prompt (default: the tokenizer's, at most 512)")
    parser.add_argument("--batch", type=int, help="images at a time (default: one a device)")
    parser.add_argument("--dtype", choices=DTYPES, help="default: float32 on CPU, bfloat16 on accelerators")
    parser.add_argument("--attention", choices=ATTENTION, default="xla", help="backend (default: xla)")
    for axis, default in (("data", 1), ("fsdp", -1), ("tensor", 1)):
        words = f"devices along this axis of the mesh; -1 is the rest (default: {default})"
        parser.add_argument(f"--{axis}", type=int, default=default, help=words)
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="of process 0, in a job of several processes")
    parser.add_argument("--process_id", type=int, help="of this process, from 0")
    parser.add_argument("--process_count", type=int, help="of the job")
    return parser


def _read_latents(path: str) -> np.ndarray:
    try:
        with np.load(path) as file:
            return file["latents"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"--latents={path}: {error}; expected an npz file with an array `latents`") from error


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line. Raises UserError."""
    args = _parser().parse_args(arguments)
    logging.set_verbosity(logging.ERROR)
    for flag in ("height", "width"):
        if getattr(args, flag) <= 0 or getattr(args, flag) % 16:
            raise UserError(f"--{flag}={getattr(args, flag)}: must be a positive multiple of 16")
    for flag in ("steps", "batch", "text_length"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            raise UserError(f"--{flag.replace('_', '-')}={getattr(args, flag)}: must be at least 1")
    if args.checkpoint is None and (args.step is not None or args.ema):
        raise UserError("--step and --ema choose from a --checkpoint; give one")
    with distributed.job(args.coordinator, args.process_id, args.process_count):
        _run(args)


def _run(args: argparse.Namespace) -> None:
    lora = None if args.checkpoint is None else checkpoint.lora(args.checkpoint)
    if lora is None and args.quantize != "none":
        raise UserError(f"--quantize={args.quantize} is for the base of a LoRA run; give one as --checkpoint")
    if lora is not None and args.quantize != "trained":
        lora = dataclasses.replace(lora, quantized=args.quantize)
    prompts = [args.prompt] if args.prompts is None else sources.read(args.prompts)
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
        trained=None if args.checkpoint is None else checkpoint.load_params(args.checkpoint, args.step, args.ema),
        lora=lora,
        dtype=args.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16"),
        attention=args.attention,
        batch_size=args.batch,
        text_length=args.text_length,
        mesh=sharding.make_mesh(args),
    )
    if jax.process_index() == 0:
        print(f"{len(files)} images in {args.out}")


if __name__ == "__main__":
    sys.exit(errors.run(main))
