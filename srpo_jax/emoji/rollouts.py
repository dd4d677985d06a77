"""Where the images that SRPO improves may come from, side by side on the small world: what it costs, what it gives.

    python -m srpo_jax.emoji.rollouts --out demo        (goes on from `make demo`, or starts from nothing)

online       a rollout at every update, as the demonstration does: 10 Euler steps
n steps      fewer of them (config.rollout.steps); ab2: of second order (config.rollout.solver)
cache n      all blocks of the transformer run at every n-th step (config.rollout.cache), between them none, or
             with "ends" the first double and the last single block (config.rollout.cache_ends)
int8, float8 the blocks' matrix products in 8 bits (config.rollout.dtype)
reuse n      a rollout serves n updates (config.rollout.reuse)
fast         cache 2 with ends and reuse 2: the combination of configs/flux_dev_hps_fast.py
offline      no rollout: the artists' pictures of the train split, encoded (config.data.images): of all three styles,
             as a collection that nobody has sorted, or of the wanted style alone

All runs take as many updates, with names of the train split, and are judged as the demonstration is. OUT gets
rollouts.md and rollouts.json (the table) and rollouts.png (held-out concepts after each run). The same command goes on
where it was broken off.
"""

import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import logging
from ml_collections import ConfigDict
from PIL import Image

from srpo_jax import architectures, command, encode, errors, metrics
from srpo_jax.costs import work
from srpo_jax.data import folders
from srpo_jax.emoji import demo, judge, measure, pictures, results, world

# Case: (folder of the run, what it changes of config.rollout, styles of the pictures or () for rollouts).
CASES: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "online": (demo.RUNS[results.GUARDED][0], {}, ()),
    "5 steps": ("steps_5", {"steps": 5}, ()),
    "6 steps, ab2": ("steps_6_ab2", {"steps": 6, "solver": "ab2"}, ()),
    "cache 2": ("cache_2", {"cache": 2, "cache_ends": (0, 0)}, ()),
    "cache 2, ends": ("cache_2_ends", {"cache": 2, "cache_ends": (1, 1)}, ()),
    "cache 3, ends": ("cache_3_ends", {"cache": 3, "cache_ends": (1, 1)}, ()),
    "int8": ("int8", {"dtype": "int8"}, ()),
    "float8": ("float8", {"dtype": "float8"}, ()),
    "reuse 2": ("reuse_2", {"reuse": 2}, ()),
    "reuse 4": ("reuse_4", {"reuse": 4}, ()),
    "fast": ("fast", {"cache": 2, "cache_ends": (1, 1), "reuse": 2}, ()),
    "offline, all styles": ("offline_all", {}, world.STYLES),
    f"offline, {measure.WANTED}": ("offline_wanted", {}, (measure.WANTED,)),
}


def write_pictures(folder: pathlib.Path, styles: Sequence[str]) -> None:
    """A folder of the train split's pictures in these styles, with their bare names as captions."""
    folder.mkdir(parents=True, exist_ok=True)
    concepts, lines = world.split("train"), []
    for style, row in zip(styles, pictures.load(concepts, styles), strict=True):
        for concept, image in zip(concepts, row, strict=True):
            name = f"{style.lower()}-{concept.id}.png"
            Image.fromarray(image).save(folder / name)
            lines.append(json.dumps({folders.FILE_NAME: name, "caption": world.prompt(concept)}) + "\n")
    (folder / folders.METADATA[0]).write_text("".join(lines), encoding="utf-8")


def encode_pictures(folder: pathlib.Path, out: pathlib.Path, config: ConfigDict) -> None:
    """`python -m srpo_jax.encode` of a folder of pictures, as ``config`` needs them."""
    data = config.data
    flags = {
        "model": config.model.path, "images": folder, "out": out, "text-length": data.text_length,
        "dtype": config.model.dtype, "height": data.height, "width": data.width, "batch": data.batch_size,
    }  # fmt: skip
    encode.main([f"--{name}={value}" for name, value in flags.items()])


def replace_rollout(out: pathlib.Path, name: str, styles: Sequence[str], config: ConfigDict) -> None:
    """Writes the artists' pictures of some styles into ``out / name``, encodes them beside that, and has ``config``
    train on them in the place of rollouts."""
    write_pictures(out / name, styles)
    config.data.encode, config.data.images = "stored", "stored"
    config.data.path = str(out / f"{name}_encoded")
    encode_pictures(out / name, pathlib.Path(config.data.path), config)


def run(out: pathlib.Path, config: ConfigDict, case: str) -> tuple[ConfigDict, pathlib.Path]:
    """Trains a case, or what is left of it. Returns its config and workdir."""
    name, changes, styles = CASES[case]
    own, workdir = config.copy_and_resolve_references(), out / "runs" / name
    own.rollout.update(changes)
    own.sample.every = 0
    if styles:
        replace_rollout(out / "pictures", name, styles, own)
    demo.train_to_end(own, workdir)
    return own, workdir


def compare(
    out: pathlib.Path, config: ConfigDict, cases: Sequence[str], concepts: Sequence[world.Concept], seeds: int
) -> list[dict[str, Any]]:
    """Runs the cases, writes the table and the sheet into ``out``, and returns the table's rows.

    Args:
      out: folder, made if there is none.
      config: the recipe; its paths are filled in here.
      cases: some of ``CASES``.
      concepts: those that are drawn and judged.
      seeds: pictures of each.
    """
    demo.prepare(out, config)
    critic = judge.Judge(out / "models" / "judge")
    prompts = [world.prompt(concept) for concept in concepts]
    easel, (base,) = measure.Easel(prompts, config, seeds), measure.models(config.model.path)
    moments = {"before": measure.measure(easel(base), concepts, critic)}
    rows: list[dict[str, Any]] = [{"case": "before"} | moments["before"].figures]
    for case in cases:
        own, workdir = run(out, config, case)
        _, trained = measure.models(config.model.path, workdir, own.steps)
        moments[case] = measure.measure(easel(trained), concepts, critic)
        print(f"{case}, {own.steps} updates: {moments[case]}", flush=True)
        spent = work.update(own, architectures.read(own))
        # The mean, since only every n-th update of "reuse n" makes a rollout.
        seconds = float(np.mean([record["step_seconds"] for record in metrics.read(workdir)]))
        rows.append({
            "case": case, "updates": own.steps, "seconds": seconds, "images_per_second": own.data.batch_size / seconds,
            "tflop": sum(part.hardware for part in spent.values()) / 1e12,
        } | moments[case].figures)  # fmt: skip
        (out / "rollouts.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
        (out / "rollouts.md").write_text(table(rows), encoding="utf-8")
        results.moments_sheet(moments, concepts).save(out / "rollouts.png")
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as markdown."""
    lines = [
        f"| | s an update | images/s | TFLOP an update | judged {measure.WANTED} | concept right | distance |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cost = [""] * 3
        if "seconds" in row:
            cost = [f"{row['seconds']:.1f}", f"{row['images_per_second']:.2f}", f"{row['tflop']:.3f}"]
        figures = f"{row[measure.WANTED]:.1%}", f"{row['accuracy']:.1%}", f"{row['distance']:.3f}"
        lines.append(f"| {' | '.join([row['case'], *cost, *figures])} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line. Raises UserError."""
    parser = command.parser("emoji.rollouts", __doc__)
    demo.add_size(parser)
    parser.add_argument("--case", action="append", choices=CASES, help="of those above, may be repeated (default: all)")
    args = parser.parse_args(arguments)
    config, concepts = demo.load_recipe(), world.split("holdout")
    if args.updates is not None:
        config.steps = args.updates
    logging.set_verbosity(logging.ERROR)  # Orbax tells every step of every save
    print(table(compare(args.out, config, args.case or list(CASES), concepts[: args.concepts], args.seeds)))


if __name__ == "__main__":
    sys.exit(errors.run(main))
