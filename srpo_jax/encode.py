"""Encodes prompts, or pictures with captions, once and for all, as a tensorflow-datasets data set.

    python -m srpo_jax.encode --model=models/flux-dev --prompts=prompts.csv --column=prompt --out=data/prompts
    python -m srpo_jax.main ... --config.data.encode=stored --config.data.path=data/prompts

    python -m srpo_jax.encode --model=models/flux-dev --images=photos --out=data/photos
    python -m srpo_jax.main --config=configs/flux_dev_hps_offline.py ... --config.data.path=data/photos

PROMPTS is text (one a line), CSV, TSV, JSON, JSON Lines or Parquet by the file's name, packed (.gz) or not, a pattern
of such files ('data/*.parquet'), or tfds:NAME[:SPLIT]. IMAGES is a folder of pictures, with a caption in a text file
beside each (fox.png, fox.txt) or all in metadata.jsonl, .csv or .parquet, or tfds:NAME[:SPLIT]. Stored are the
features of T5 and CLIP, and of pictures the autoencoder's latents, at one size: the largest centred part of its shape.

The encoders are split over all devices. The same command again goes on where an interrupted one stopped. A job of
several processes starts the command in each, with one shared --out folder: on TPUs and under SLURM they find each
other, elsewhere give --coordinator, --process-id and --process-count.

A prompt takes up to 3.3 MB on disk (FLUX.1, 512 tokens, bfloat16), a picture of 720x720 0.5 MB more. The released
recipe uses 608: --sample draws some.
"""

import argparse
import itertools
import os
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from srpo_jax import architectures, command, conditions, distributed, errors, latents, ranges, sharding, terminal
from srpo_jax.config import DTYPES
from srpo_jax.data import filters, images, sources, stored
from srpo_jax.data.images import PictureSet
from srpo_jax.errors import UserError
from srpo_jax.families.base import AUTOENCODER
from srpo_jax.models.compute import Compute
from srpo_jax.weights import fingerprint
from srpo_jax.weights.files import Spec

BATCH = 8  # prompts at once on each part of the mesh
SIZE = 720  # pixels of the released recipes
BROKEN = ("fail", "skip")

# From the places of this process's share of a batch to arrays of the whole batch, split over the mesh.
Encode = Callable[[Sequence[int]], Mapping[str, jax.Array]]


def encode_prompts(
    model: str | os.PathLike,
    texts: Sequence[str],
    out: str | os.PathLike,
    *,
    text_length: int | None = None,
    dtype: str = "bfloat16",
    mesh: Mesh,
    batch_size: int | None = None,
    shard_size: int | None = None,
    source: str = "",
    pictures: PictureSet | None = None,
) -> stored.Manifest:
    """Writes the text encoders' features of prompts as a data set, or what is missing of it.

    Args:
      model: pipeline folder in our format.
      texts: at least one; the captions, if there are ``pictures``.
      out: folder of the data set.
      text_length: tokens of a prompt, padding included; default is the family's.
      dtype: of the encoders and the features.
      mesh: of all processes' devices.
      batch_size: prompts at once on all devices, rounded up; default is ``BATCH`` for each part of the mesh.
      shard_size: examples in a file; default makes files of some 200 MB.
      source: where the texts come from, for people.
      pictures: examined ones, one for each text, whose latents are stored beside the features.

    Returns:
      What was written.

    Raises UserError for a folder that is not right, before anything is written, and for a picture that was damaged
    since it was examined.
    """
    model, kind = pathlib.Path(model), jnp.dtype(dtype)
    family, sizes = architectures.read_pipeline(model)
    length = text_length or family.text_length
    family.check_text_length("--text-length", length)
    arrays = {name: Spec(shape, kind) for name, shape in family.condition(sizes.transformer, length).items()}
    networks, digest = family.text_folders, stored.digest(texts)
    if pictures:
        family.check_size(pictures.height, pictures.width, ("--height", "--width"))
        shape = family.latent_shape(pictures.height, pictures.width)
        arrays[stored.LATENTS] = Spec(shape, np.dtype(np.float32))
        networks, digest = (*networks, AUTOENCODER), stored.digest([digest, pictures.digest])
    manifest = stored.Manifest(
        count=len(texts),
        shard_size=shard_size or stored.default_shard_size(arrays),
        arrays=arrays,
        encoders=fingerprint.of_parts(model, networks, family.tokenizers),
        digest=digest,
        model=str(model),
        source=source,
    )
    manifest = stored.plan(out, manifest)
    parts = sharding.batch_parts(mesh)
    batch_size = -(-(batch_size or BATCH * parts) // parts) * parts
    work = MissingShards(out, manifest, mesh, batch_size)
    if work.shards:
        compute = Compute(dtype=kind, param_dtype=kind, constrain=sharding.constraint(mesh))
        with terminal.doing("loading the encoders"):
            encode_texts = conditions.PromptEncoder(model, family, sizes.transformer, compute, mesh, length)
            if pictures:
                encode_pictures, load = latents.LatentEncoder(model, family, mesh), images.Loader(pictures)

        def encode(places: Sequence[int]) -> dict[str, jax.Array]:
            features = encode_texts([texts[place] for place in places], batch_size)
            return features | {stored.LATENTS: encode_pictures(load(places), batch_size)} if pictures else features

        work.begin(texts)
        work.run(texts, encode, "picture" if pictures else "prompt")
    work.finish()
    return manifest


class MissingShards:
    """The shards of a data set that are missing, divided among the processes of a job, which compute in step.

    Args:
      out: folder of the data set.
      manifest: of it, as planned.
      mesh: of all processes' devices.
      batch_size: examples at once on all of them.

    Attributes:
      shards: those that are missing, the same in every process.

    Raises UserError if the processes were given different prompts, pictures or encoders.
    """

    def __init__(self, out: str | os.PathLike, manifest: stored.Manifest, mesh: Mesh, batch_size: int):
        self._out, self._manifest = out, manifest
        self._groups = sharding.row_groups(mesh, batch_size)
        here = jax.process_index()
        mine = stored.digest([manifest.digest, *sorted(manifest.encoders.values())])
        distributed.meet("comparing")
        if np.unique(multihost_utils.process_allgather(np.uint32(int(mine[:8], 16)))).size > 1:
            raise UserError(f"the processes of this job differ in what they encode or by what; {out} is left alone")
        self._group = next(index for index, (processes, _) in enumerate(self._groups) if here in processes)
        # Of processes that hold the same samples the first one writes.
        self._writes = self._groups[self._group][0][0] == here
        missing = np.zeros(manifest.shards, bool)
        missing[stored.missing_shards(out, manifest)] = True
        # One process decides: another one may look when the first shard is there already.
        self.shards = np.flatnonzero(multihost_utils.broadcast_one_to_all(missing)).tolist()

    def begin(self, texts: Sequence[str]) -> None:
        """Makes the folder."""
        if jax.process_index() == 0:
            stored.begin(self._out, self._manifest, texts)
        multihost_utils.sync_global_devices("srpo_jax.encode: begin")

    def run(self, texts: Sequence[str], encode: Encode, unit: str) -> None:
        """Encodes and writes all that is missing; process 0 shows the progress, counted in ``unit``s."""
        done = self._manifest.count - sum(len(self._manifest.members(shard)) for shard in self.shards)
        mine = self.shards[self._group :: len(self._groups)]
        size = len(self._groups[self._group][1])
        bar = terminal.bar(self._manifest.count, unit, "encoding", done=done, shown=jax.process_index() == 0)
        with bar, stored.Writer(self._out, self._manifest, mine if self._writes else []) as writer:

            def write(members: list[int], features: Mapping[str, jax.Array]) -> None:
                local = {name: sharding.fetch(array) for name, array in features.items()} if self._writes else {}
                for row, member in enumerate(members if self._writes else []):
                    writer.write(texts[member], {name: array[row] for name, array in local.items()})

            pending = None
            for members, total in self._batches(size):
                # Those whose share is used up keep in step with the others.
                filled = members + [0] * (size - len(members))
                # The devices compute this batch while the last one is written.
                current = members, encode(filled), total
                if pending:
                    write(*pending[:2])
                    bar.update(pending[2])
                pending = current
            write(*pending[:2])
            bar.update(pending[2])

    def _batches(self, size: int) -> Iterator[tuple[list[int], int]]:
        """This process's share of each batch, and how many examples the batch has over all processes."""
        shares = []
        for group, (_, rows) in enumerate(self._groups):
            shards = self.shards[group :: len(self._groups)]
            members = [member for shard in shards for member in self._manifest.members(shard)]
            shares.append([members[start : start + len(rows)] for start in range(0, len(members), len(rows))])
        for current in itertools.zip_longest(*shares, fillvalue=[]):
            yield current[self._group], sum(map(len, current))

    def finish(self) -> None:
        """Completes the data set when all processes have written."""
        multihost_utils.sync_global_devices("srpo_jax.encode: written")
        if jax.process_index() == 0:
            stored.finish(self._out, self._manifest)
        multihost_utils.sync_global_devices("srpo_jax.encode: finished")


def add_filters(parser: argparse.ArgumentParser) -> None:
    """The flags of ``filters.Filter``."""
    group = parser.add_argument_group("which prompts (the number that each leaves out is printed)")
    group.add_argument("--min-length", type=command.at_least(0), default=0, metavar="N", help="characters")
    words = "characters (default: no limit)"
    group.add_argument("--max-length", type=command.at_least(0), default=0, metavar="N", help=words)
    group.add_argument("--include", default="", metavar="REGEX", help="that is found in the prompt")
    group.add_argument("--exclude", default="", metavar="REGEX", help="that is not found")
    group.add_argument("--unique", action="store_true", help="of equal prompts, the first")
    group.add_argument("--sample", type=command.at_least(0), default=0, metavar="N", help="N of the rest, at random")
    group.add_argument("--seed", type=command.seed, default=0, help="of --sample (default: 0)")


def _parser() -> command.Parser:
    parser = command.parser("encode", __doc__)
    add = parser.add_argument
    add("--model", type=command.path, required=True, help="pipeline folder made by `python -m srpo_jax.convert import`")
    what = parser.add_mutually_exclusive_group(required=True)
    words = "file, pattern, tfds:NAME[:SPLIT] or tfds:FOLDER[:SPLIT]"
    what.add_argument("--prompts", type=command.path, help=words)
    words = "folder of pictures with captions, tfds:NAME[:SPLIT] or tfds:FOLDER[:SPLIT]"
    what.add_argument("--images", type=command.path, help=words)
    add("--column", help="of the prompts or captions (default: prompt, caption or text)")
    add("--out", type=command.path, required=True, help="folder of the data set")
    words = "config.data.text_length (default: the family's: 512 of FLUX.1)"
    add("--text-length", type=command.at_least(2), help=words)
    add("--dtype", choices=DTYPES, default="bfloat16", help="config.model.dtype (default: bfloat16)")
    add("--batch", type=command.at_least(1), help=f"prompts at once (default: {BATCH} a device)")
    add("--shard-size", type=command.at_least(1), help="prompts in a file (default: as many as make 256 MiB)")
    for side in ("height", "width"):
        words = f"config.data.{side}, of --images, in pixels (default: {SIZE})"
        add(f"--{side}", type=command.at_least(1, ranges.SIDE), help=words)
    words = "what to do about --images that cannot be used: all are named (default: fail)"
    add("--broken", choices=BROKEN, help=words)
    words = "pictures that metadata.jsonl names outside of its folder, by .., absolute paths or links (default: refuse)"
    add("--outside", choices=images.OUTSIDE, help=words)
    words = f"of a picture of --images; larger ones cannot be used (default: {images.MAX_PIXELS})"
    add("--max-pixels", type=command.at_least(1, 10**10), metavar="N", help=words)
    add_filters(parser)
    command.add_mesh(parser)
    command.add_job(parser)
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line. Raises UserError."""
    args = _parser().parse_args(arguments)
    logging.set_verbosity(logging.ERROR)
    chosen = filters.Filter(
        args.min_length, args.max_length, args.include, args.exclude, args.unique, args.sample, args.seed
    )
    with distributed.job(args.coordinator, args.process_id, args.process_count):
        try:
            if args.images:
                texts, summary, pictures = _read_images(args, chosen)
            else:
                texts, summary, pictures = *_read_prompts(args, chosen), None
            if jax.process_index() == 0:
                print(summary, flush=True)
            manifest = encode_prompts(
                args.model,
                texts,
                args.out,
                text_length=args.text_length,
                dtype=args.dtype,
                mesh=sharding.make_mesh(args),
                batch_size=args.batch,
                shard_size=args.shard_size,
                source=summary,
                pictures=pictures,
            )
        except KeyboardInterrupt:
            raise UserError(f"interrupted; the same command goes on in {args.out}") from None
        if jax.process_index() == 0:
            print(f"{manifest.count} {'pictures' if pictures else 'prompts'} in {args.out}")


def _read_prompts(args: argparse.Namespace, chosen: filters.Filter) -> tuple[list[str], str]:
    """The prompts that are chosen, and how many were not, in a line."""
    for flag in ("height", "width", "broken", "outside", "max_pixels"):
        if (value := getattr(args, flag)) is not None:
            raise UserError(f"--{flag.replace('_', '-')}={value} is for --images; leave it out")
    prompts = sources.read(args.prompts, args.column)
    places, counts = filters.select(prompts, chosen)
    return [prompts[place] for place in places], f"{args.prompts}: {filters.describe(len(prompts), counts)}"


def _read_images(args: argparse.Namespace, chosen: filters.Filter) -> tuple[list[str], str, PictureSet]:
    """The captions of the pictures that are chosen, how many were not, in a line, and the pictures, examined.

    Process 0 names every picture that cannot be used. Raises UserError if there is one, unless ``--broken=skip``.
    """
    height, width = args.height or SIZE, args.width or SIZE
    most = args.max_pixels or images.MAX_PIXELS
    pictures, wrong = images.read(args.images, args.column, args.outside == "read", most)
    total = len(pictures) + len(wrong)
    places, counts = filters.select([picture.caption for picture in pictures], chosen)
    candidates = [pictures[place] for place in places]
    digests, broken = images.examine(candidates, height, width, jax.process_index() == 0, most)
    wrong = [*wrong, *broken.values()]
    if wrong and jax.process_index() == 0:
        print(*map(errors.plain, wrong), sep="\n", file=sys.stderr, flush=True)
    if wrong and args.broken != "skip":
        raise UserError(f"{images.describe_broken(wrong, total)}; mend them, or leave them out with --broken=skip")
    if wrong:
        counts |= {"broken": len(wrong)}
    if len(broken) == len(candidates):
        raise UserError(f"no picture is left: {filters.describe(total, counts, 'pictures')}")
    whole = [place for place in range(len(candidates)) if place not in broken]
    kept = [candidates[place] for place in whole]
    digest = images.digest([digests[place] for place in whole], height, width)
    summary = f"{args.images}: {filters.describe(total, counts, 'pictures')}"
    return [picture.caption for picture in kept], summary, PictureSet(kept, digest, height, width, most)


if __name__ == "__main__":
    sys.exit(errors.run(main))
