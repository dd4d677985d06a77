"""Shows what is in a data set that `python -m srpo_jax.encode` made, complete or not.

    python -m srpo_jax.inspect_data data/prompts
    python -m srpo_jax.inspect_data data/photos --sheet=photos.png --show=24

Counts, sizes, arrays, fingerprints of the encoders, lengths in characters and tokens, some prompts, and how fast it can
be read; --sheet draws the pictures of these prompts as their latents decode. Tokens are counted, and latents decoded,
by the pipeline folder that encoded (--model if it was moved).
"""

import math
import os
import pathlib
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from srpo_jax import command, errors, families, latents, sampling, storage, text
from srpo_jax.data import stored
from srpo_jax.errors import UserError
from srpo_jax.families.base import AUTOENCODER
from srpo_jax.weights import fingerprint

THUMBNAIL, MARGIN, GAP = 256, 72, 8  # pixels: a picture's longer side at most, room for its caption, between pictures


def describe(path: str | os.PathLike, model: str | None = None, show: int = 8, seed: int = 0) -> Iterator[str]:
    """Yields the lines of a description.

    Args:
      path: the data set's folder.
      model: pipeline folder whose tokenizers count, and whose encoders are compared; None takes the one that encoded,
        if it is still there.
      show: prompts that are drawn at random.
      seed: of that draw, and of the records that are read for a measure of time.

    Raises UserError if the folder is not a data set, or ``model`` not a pipeline.
    """
    path, manifest = pathlib.Path(path), stored.read_manifest(path)
    texts = stored.read_prompts(path)
    missing = stored.missing_shards(path, manifest)
    complete = not missing and (path / stored.COMPLETE).exists()
    there = [shard for shard in range(manifest.shards) if shard not in set(missing)]
    size = sum(stored.shard_file(path, manifest, shard).stat().st_size for shard in there)
    records = sum(len(manifest.members(shard)) for shard in there)
    state = "complete" if complete else f"NOT COMPLETE: {len(missing)} of {manifest.shards} shards are missing"
    yield f"{path}: {manifest.count} examples, {state}"
    each = f", {_bytes(size / records)} an example" if records else ""
    yield f"{len(there)} shards, {_bytes(size)}{each}"
    yield f"from {manifest.source}"
    for name, spec in manifest.arrays.items():
        yield f"  {name:<16} {spec.dtype} {list(spec.shape)}, {_bytes(spec.nbytes)}"

    where = pathlib.Path(model or manifest.model)
    family, here = families.of_pipeline(where) if model or where.is_dir() else None, {}
    if family is not None:
        networks = family.text_folders
        if AUTOENCODER in manifest.encoders:
            networks = *networks, AUTOENCODER
        here = fingerprint.of_parts(where, networks, family.tokenizers)
    yield f"encoded by {manifest.model}" + (f", compared with {where}" if here else "")
    for part, found in manifest.encoders.items():
        same = "" if part not in here else "  the same" if here[part] == found else f"  OTHER: {here[part]}"
        yield f"  {part:<16} {found}{same}"

    yield f"{'lengths':<18} {'least':>6} {'median':>6} {'95 %':>6} {'most':>6}"
    yield _row("characters", [len(prompt) for prompt in texts])
    if family is not None:
        for part, (label, _, array) in family.tokenizers.items():
            tokenizer = text.load_tokenizer(where / part)
            counts = [len(ids) for ids in tokenizer(texts)["input_ids"]]
            limit = tokenizer.model_max_length if array is None else manifest.arrays[array].shape[0]
            yield (
                _row(f"{label} tokens", counts)
                + f"   {sum(count > limit for count in counts)} are longer than {limit}: cut"
            )
    else:
        yield f"  tokens: {where} is not there; name the pipeline's folder with --model"
    yield f"{len(texts) - len(set(texts))} prompts are repeated"

    shown = draw(len(texts), show, seed)
    if shown:
        yield "some prompts"
    for place in shown:
        yield f"  {place:>6}  {texts[place]}"
    if complete:
        data, generator = stored.DataSet(path), np.random.default_rng(seed)
        places = generator.choice(len(data), min(64, len(data)), replace=False).tolist()
        started = time.perf_counter()
        for place in places:
            data.read([place])
        yield f"{len(places)} records in random order are read at {len(places) / (time.perf_counter() - started):.0f}/s"


def draw(count: int, show: int, seed: int) -> list[int]:
    """The places of ``show`` of ``count`` examples, or of all, in their order."""
    return sorted(np.random.default_rng(seed).choice(count, min(show, count), replace=False).tolist())


def contact_sheet(path: str | os.PathLike, model: str | None, show: int, seed: int) -> tuple[Image.Image, str]:
    """Pictures of a data set, decoded from their latents, with their captions below; and their latents' spread.

    Takes the arguments of ``describe`` and shows the same examples. The mean and the deviation are of all numbers of
    these latents, which are scaled to be near 0 and 1.

    Raises UserError if the folder is not a complete data set of pictures, or the pipeline that decodes is not there.
    """
    data = stored.DataSet(path)
    if stored.LATENTS not in data.manifest.arrays:
        raise UserError(f"{path} holds prompts without pictures: there is nothing to draw; leave out --sheet")
    where = model or data.manifest.model
    if not pathlib.Path(where).is_dir():
        raise UserError(
            f"{where}, which encoded {path}, is not there to decode; name the pipeline's folder with --model"
        )
    examples = data.read(draw(len(data), show, seed))
    found = np.stack([example[stored.LATENTS] for example in examples])
    images = latents.decode(where, families.of_pipeline(where), found)
    spread = f"latents of {len(examples)} pictures: mean {found.mean():.3f}, deviation {found.std():.3f}"
    return _sheet(images, [example["prompt"] for example in examples]), spread


def _sheet(images: np.ndarray, captions: Sequence[str]) -> Image.Image:
    """uint8 [B, H, W, 3] side by side, each with two lines of text below."""
    height, width = images.shape[1:3]
    scale = min(1.0, THUMBNAIL / max(height, width))
    size = max(round(scale * width), MARGIN), round(scale * height)
    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    font, line = ImageFont.load_default(10), 13
    tile = size[0] + GAP, size[1] + 2 * line + GAP
    sheet = Image.new("RGB", (columns * tile[0], rows * tile[1]), "white")
    pen = ImageDraw.Draw(sheet)
    for index, (image, caption) in enumerate(zip(images, captions, strict=True)):
        left, top = index % columns * tile[0], index // columns * tile[1]
        thumbnail = Image.fromarray(image).resize((round(scale * width), size[1]), Image.Resampling.LANCZOS)
        sheet.paste(thumbnail, (left, top))
        lines = textwrap.wrap(caption, size[0] // 6, max_lines=2, placeholder="…")
        pen.multiline_text((left, top + size[1]), "\n".join(lines), "black", font, spacing=1)
    return sheet


def _row(name: str, lengths: Sequence[int]) -> str:
    figures = [min(lengths), *np.percentile(lengths, (50, 95)), max(lengths)]
    return f"  {name:<16} " + " ".join(f"{figure:>6.0f}" for figure in figures)


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.4g} GB"


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line. Raises UserError."""
    parser = command.parser("inspect_data", __doc__)
    parser.add_argument("data", type=command.path, help="folder of the data set")
    parser.add_argument("--model", type=command.path, help="pipeline folder (default: the one that encoded)")
    parser.add_argument("--show", type=command.at_least(0), default=8, help="prompts, drawn at random (default: 8)")
    parser.add_argument("--seed", type=command.seed, default=0, help="of that draw (default: 0)")
    words = "PNG file for the pictures of these prompts, decoded from their latents"
    parser.add_argument("--sheet", type=command.path, help=words)
    args = parser.parse_args(arguments)
    if args.sheet and not args.show:
        raise UserError(f"--sheet={args.sheet} with --show=0: there is nothing to draw")
    if args.sheet:
        storage.check_writable(args.sheet, "--sheet", folder=False)
    for line in describe(args.data, args.model, args.show, args.seed):
        print(line, flush=True)
    if args.sheet:
        image, spread = contact_sheet(args.data, args.model, args.show, args.seed)
        sampling.save_image(image, args.sheet)
        print(f"{spread}; decoded in {args.sheet}")


if __name__ == "__main__":
    sys.exit(errors.run(main))
