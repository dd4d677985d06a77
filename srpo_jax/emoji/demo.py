"""The demonstration: aligns the small world's model with SRPO, measures it on held-out concepts, writes a report.

    python -m srpo_jax.emoji.demo --out demo        (or: make demo)

The shipped pipeline, trained on emoji, answers a bare name ("fox") with a picture in any of its three styles. SRPO is
to move it to "3D", away from "Flat" and "Mono", with names of the train split alone. Then pictures of held-out
concepts, which neither the reward model nor SRPO has seen, are judged by a CLIP that nothing was trained against: is
it 3D, and is it still a fox? A second run without the inversion branch shows what that branch guards against.
Everything goes the way of a real run: convert, train, read checkpoints.

OUT gets report.html, metrics.json, before_after.png, the converted models, the prompts and both runs, each with a page
of its own. The same command again goes on where it was broken off.
"""

import argparse
import json
import pathlib
import sys
import time

from absl import logging
from ml_collections import ConfigDict

from srpo_jax import command, convert, errors, metrics, record, report, train
from srpo_jax import config as config_lib
from srpo_jax.emoji import judge, measure, results, world
from srpo_jax.emoji.results import CONTRAST, GUARDED
from srpo_jax.errors import UserError

SHIPPED = pathlib.Path(__file__).parent
RECIPE = SHIPPED.parents[1] / "configs" / "emoji.py"
# Run: (folder, branches).
RUNS = {GUARDED: ("srpo", ("denoise", "inversion")), CONTRAST: ("no_inversion", ("denoise",))}
SEEDS = 3  # pictures of each held-out concept


def load_recipe(path: pathlib.Path = RECIPE) -> ConfigDict:
    """The configuration that a recipe file makes. Raises UserError if the file is missing."""
    if not path.is_file():
        raise UserError(f"{path} does not exist; run the demonstration from a checkout of the project")
    return command.read_recipe(str(path))


def prepare(out: pathlib.Path, config: ConfigDict) -> None:
    """Converts the shipped networks, writes the prompt files, and points ``config`` to them."""
    models, prompts = out / "models", out / "prompts"
    for name in ("pipeline", "reward", "judge"):
        if not (models / name).exists():
            convert.import_folder(SHIPPED / name, models / name)
    prompts.mkdir(parents=True, exist_ok=True)
    for split in world.SPLITS:
        lines = [world.prompt(concept) + "\n" for concept in world.split(split)]
        (prompts / f"{split}.txt").write_text("".join(lines), encoding="utf-8")
    config.model.path = str(models / "pipeline")
    config.reward.models.clip.path = str(models / "reward")
    config.data.prompts = str(prompts / "train.txt")
    config.sample.prompts = str(prompts / "holdout.txt")


def demonstrate(
    out: pathlib.Path, config: ConfigDict, concepts: tuple[world.Concept, ...], seeds: int
) -> results.Results:
    """Runs everything and writes ``report.html``, ``metrics.json`` and ``before_after.png`` into ``out``.

    Args:
      out: folder, made if there is none.
      config: the recipe; its paths are filled in here.
      concepts: those that are drawn and judged.
      seeds: pictures of each.
    """
    laps = []
    started = time.monotonic()

    def lap(part: str) -> None:
        nonlocal started
        now = time.monotonic()
        laps.append((part, now - started))
        started = now

    plain = config_lib.flatten(config)
    prepare(out, config)
    lap("convert pipeline, reward and judge")
    critic = judge.Judge(out / "models" / "judge")
    prompts = [world.prompt(concept) for concept in concepts]
    easel, (base,) = measure.Easel(prompts, config, seeds), measure.models(config.model.path)
    before = measure.measure(easel(base), concepts, critic)
    print(f"before: {before}", flush=True)
    lap("draw and judge before training")

    curves, records = {}, {}
    for run, (name, branches) in RUNS.items():
        own = config.copy_and_resolve_references()  # ConfigDict(config) would share what is nested
        own.align.branches = branches
        workdir = out / "runs" / name
        train_to_end(own, workdir, record.Recipe(f"configs/{RECIPE.name}", plain))
        lap(f"train: {run}, {own.steps} updates")
        curves[run] = {0: before}
        for model in measure.models(config.model.path, workdir)[1:]:
            curves[run][model.step] = measure.measure(easel(model), concepts, critic)
            print(f"{run}, update {model.step}: {curves[run][model.step]}", flush=True)
        records[run] = metrics.read(workdir)
        lap(f"draw and judge along: {run}")

    found = results.Results(config, concepts, curves, records, laps)
    (out / "metrics.json").write_text(json.dumps(found.content(), indent=2) + "\n", encoding="utf-8")
    (out / "report.html").write_text(report.render(results.page(found)), encoding="utf-8")
    results.before_after_sheet(found).save(out / "before_after.png")
    return found


def train_to_end(config: ConfigDict, workdir: pathlib.Path, recipe: record.Recipe | None = None) -> None:
    """Trains, or what is left of it. Raises UserError if a signal comes before all updates are done."""
    if train.train(config, workdir, recipe=recipe) is not None:
        raise UserError(f"training was interrupted; the same command goes on from the checkpoint in {workdir}")


def add_size(parser: argparse.ArgumentParser) -> None:
    """The flags of what is written where, and of how much is trained and drawn."""
    most, words = len(world.split("holdout")), "folder of what is written (default: demo)"
    parser.add_argument("--out", type=command.local, default=pathlib.Path("demo"), help=words)
    words = "of each run, for a shorter look (default: the recipe's)"
    parser.add_argument("--updates", type=command.at_least(1), metavar="N", help=words)
    words = "held-out concepts drawn (default: all)"
    parser.add_argument("--concepts", type=command.between(1, most), default=most, metavar="N", help=words)
    words = f"pictures of each concept (default: {SEEDS})"
    parser.add_argument("--seeds", type=command.between(1, 64), default=SEEDS, metavar="N", help=words)


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line. Raises UserError."""
    parser = command.parser("emoji.demo", __doc__)
    add_size(parser)
    args = parser.parse_args(arguments)
    config, concepts = load_recipe(), world.split("holdout")
    if args.updates is not None:
        config.steps = args.updates
    logging.set_verbosity(logging.ERROR)  # Orbax tells every step of every save
    found = demonstrate(args.out, config, concepts[: args.concepts], args.seeds)
    print()
    for target in found.targets():
        state = "reached" if target.reached else "MISSED"
        print(f"{state}: {target.name} {target.before:.1%} -> {target.after:.1%} ({target.wanted})")
    print(f"{found.seconds / 60:.1f} minutes; open {args.out / 'report.html'}")


if __name__ == "__main__":
    sys.exit(errors.run(main))
