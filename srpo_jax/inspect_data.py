"""Shows what is in a data set that `python -m srpo_jax.encode` made, complete or not.

    python -m srpo_jax.inspect_data data/prompts

Counts, sizes, arrays, fingerprints of the encoders, lengths in characters and tokens, some prompts, and how fast it can
be read. Tokens are counted by the tokenizers of the pipeline folder that encoded (--model if it was moved).
"""

import argparse
import os
import pathlib
import sys
import time
from collections.abc import Iterator, Sequence

import numpy as np

from srpo_jax import errors, text
from srpo_jax.data import stored
from srpo_jax.errors import UserError
from srpo_jax.weights import fingerprint


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
    here = fingerprint.of_text_encoders(where) if model or where.is_dir() else {}
    yield f"encoded by {manifest.model}" + (f", compared with {where}" if here else "")
    for part, found in manifest.encoders.items():
        same = "" if part not in here else "  the same" if here[part] == found else f"  OTHER: {here[part]}"
        yield f"  {part:<16} {found}{same}"

    yield f"{'lengths':<18} {'least':>6} {'median':>6} {'95 %':>6} {'most':>6}"
    yield _row("characters", [len(prompt) for prompt in texts])
    if here:
        for part, name, limit in (
            ("tokenizer_2", "T5 tokens", manifest.arrays["text"].shape[0]),
            ("tokenizer", "CLIP tokens", None),
        ):
            tokenizer = text.load_tokenizer(where / part)
            counts = [len(ids) for ids in tokenizer(texts)["input_ids"]]
            limit = limit or tokenizer.model_max_length
            yield _row(name, counts) + f"   {sum(count > limit for count in counts)} are longer than {limit}: cut"
    else:
        yield f"  tokens: {where} is not there; name the pipeline's folder with --model"
    yield f"{len(texts) - len(set(texts))} prompts are repeated"

    generator = np.random.default_rng(seed)
    shown = sorted(generator.choice(len(texts), min(show, len(texts)), replace=False))
    if shown:
        yield "some prompts"
    for place in shown:
        yield f"  {place:>6}  {texts[place]}"
    if complete:
        data = stored.DataSet(path)
        places = generator.choice(len(data), min(64, len(data)), replace=False).tolist()
        started = time.perf_counter()
        for place in places:
            data.read([place])
        yield f"{len(places)} records in random order are read at {len(places) / (time.perf_counter() - started):.0f}/s"


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
    parser = argparse.ArgumentParser(
        prog="python -m srpo_jax.inspect_data",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("data", help="folder of the data set")
    parser.add_argument("--model", help="pipeline folder (default: the one that encoded)")
    parser.add_argument("--show", type=int, default=8, help="prompts, drawn at random (default: 8)")
    parser.add_argument("--seed", type=int, default=0, help="of that draw (default: 0)")
    args = parser.parse_args(arguments)
    if args.show < 0 or args.seed < 0:
        raise UserError("--show and --seed must not be negative")
    for line in describe(args.data, args.model, args.show, args.seed):
        print(line, flush=True)


if __name__ == "__main__":
    sys.exit(errors.run(main))
