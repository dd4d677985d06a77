"""Draws, scores and compares models: pipelines, checkpoints of runs, folders of pictures. Writes a page to look at.

python -m srpo_jax.evaluate --model=models/flux-dev --checkpoint=runs/hps@all --score=hps:models/hps --out=evaluation

The first model is the one that the others are compared with, picture by picture from the same noise, which depends on
the prompt, the number of its picture and --seed alone. OUT gets report.html, summary.json, summary.csv, scores.jsonl
and the pictures; the same command goes on after an interruption, and with more models, scores or prompts adds to it.

A job of several processes starts the command in each, as generate does.
"""

import argparse
import sys
from functools import partial

import jax
from absl import logging

from srpo_jax import command, distributed, errors, report, sampling, sharding, storage
from srpo_jax.config import QUANTIZE
from srpo_jax.errors import UserError
from srpo_jax.evaluation import candidates, layouts, page, prompts, run, scoring, summary
from srpo_jax.evaluation.candidates import Asked
from srpo_jax.evaluation.clock import Clock
from srpo_jax.evaluation.drawing import Drawing

PAGE = "report.html"


def _parser() -> command.Parser:
    parser = command.parser("evaluate", __doc__)
    add = parser.add_argument
    many = {"action": "append", "dest": "asked"}
    words = "pipeline folder, drawn as it is; LABEL is its name on the page (default: the folder's)"
    add("--model", type=partial(Asked, "model"), metavar="[LABEL=]FOLDER", help=words, **many)
    words = "workdir of a run, whose transformer replaces that of the --model before it (default: its newest update)"
    shown = "[LABEL=]WORKDIR[@STEP|@best|@all]"
    add("--checkpoint", type=partial(Asked, "checkpoint"), metavar=shown, help=words, **many)
    words = "of each --checkpoint that names none: a number, best or all (default: the newest)"
    add("--step", type=_step, metavar="STEP", help=words)
    words = "pictures that are there, with captions beside them or in metadata.jsonl"
    add("--pictures", type=partial(Asked, "pictures"), metavar="[LABEL=]FOLDER", help=words, **many)
    add("--ema", action="store_true", help="take the moving averages of checkpoints")
    words = "how a LoRA's base is stored: none (in --dtype), int8, nf4, or as it was trained (default: none)"
    add("--quantize", choices=(*QUANTIZE, "trained"), default="none", help=words)
    words = "a reward model to score with, converted; sgp_hps:PATH is of an HPS, diversity:PATH of a CLIP"
    add("--score", action="append", default=[], metavar="[NAME=]KIND:PATH", help=words)
    words = "a file, a pattern of files or tfds:NAME[:SPLIT] (default: 100 prompts that come with the package; of " \
            "pictures alone, their captions)"  # fmt: skip
    add("--prompts", type=command.path, help=words)
    add("--column", help="of --prompts, where there are several (default: prompt, caption or text)")
    add("--category", help="column of the prompts' categories (default: category, if there is one)")
    add("--count", type=command.at_least(1), help="prompts from the head of the list (default: all)")
    add("--images", type=command.at_least(1), default=1, help="pictures of each prompt (default: 1)")
    add("--out", type=command.local, required=True, help="folder of the evaluation")
    words = "also lay the pictures out as this judge reads them, in OUT/NAME; --prompts are its own"
    add("--writes", choices=tuple(layouts.LAYOUTS), help=words)
    command.add_drawing(parser)
    command.add_mesh(parser)
    command.add_job(parser)
    return parser


def _step(text: str) -> int | str:
    return text if text == candidates.ALL else command.update(text)


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line. Raises UserError."""
    args = _parser().parse_args(arguments)
    logging.set_verbosity(logging.ERROR)
    if not args.asked:
        raise UserError("name what to evaluate: --model=FOLDER, and --checkpoint=WORKDIR of it, or --pictures=FOLDER")
    for flag in ("ema", "step"):
        if getattr(args, flag) and not any(asked.kind == "checkpoint" for asked in args.asked):
            raise UserError(f"--{flag} is of a --checkpoint; give one")
    with distributed.job(args.coordinator, args.process_id, args.process_count):
        _run(args)


def _run(args: argparse.Namespace) -> None:
    scores = scoring.parse(args.score, "--score")
    models = candidates.read(args.asked, args.ema, args.quantize, args.step)
    wanted = _prompts(args, models)
    places = None
    if args.writes:
        if args.prompts is None:
            raise UserError(
                f"--writes={args.writes} lays out pictures of that judge's own prompts; give them by --prompts"
            )
        places = layouts.read(args.writes, args.prompts, args.column, args.images)
    look = sampling.Look(args.height, args.width, args.steps, args.guidance)
    how = Drawing(look, args.seed, args.dtype or sampling.default_dtype(), args.attention, args.text_length)
    mesh = sharding.make_mesh(args)
    found = run.evaluate(models, wanted, scores, args.out, how, mesh, args.images, args.batch)
    if jax.process_index() != 0:
        return
    clock = Clock(found.seconds)
    with clock.part("summary and page"):
        told = summary.summarize(found)
        summary.write(found, told)
        content = report.render(page.page(found, told))
        storage.write(storage.path(args.out / PAGE), content.encode())
    if places is not None:
        with clock.part(f"layout for {args.writes}"):
            counts = layouts.write(found, args.writes, places)
        print(f"{args.out / args.writes}: " + ", ".join(f"{count} files of {name}" for name, count in counts.items()))
    _tell(args, found, told)


def _prompts(args: argparse.Namespace, models: list[candidates.Candidate]) -> list[prompts.Prompt]:
    if args.prompts is None:
        for flag in ("column", "category"):
            if getattr(args, flag):
                raise UserError(f"--{flag}={getattr(args, flag)} is of --prompts; leave it out")
        if all(model.pictures for model in models):
            captions = dict.fromkeys(picture.caption for model in models for picture in model.pictures)
            return [prompts.Prompt(caption, "") for caption in captions][: args.count]
    return prompts.read(args.prompts or prompts.SHIPPED, args.column, args.category, args.count)


def _tell(args: argparse.Namespace, found: run.Evaluation, told: summary.Summary) -> None:
    """The figures on the terminal."""
    for row in told.rows:
        mean = f"{row.mean.value:.4g} ({row.mean.low:.4g} to {row.mean.high:.4g})"
        words = ""
        if row.against is not None:
            against = row.against
            words = f"; {against.difference.value:+.4g}, higher in {against.wins.value:.0%} of pairs: {against.verdict}"
        print(f"{row.model.label}: {row.score} {mean}{words}")
    for model in found.candidates:
        signs = [f"{row.score} {row.mean.value:.4g}" for row in told.signals if row.model is model]
        signs += [f"drift {found.drift[model.folder]:.4g}"] if model.folder in found.drift else []
        print(f"{model.label}: signs of collapse: {', '.join(signs)}")
    for note in told.notes:
        print(f"note: {note}")
    print("seconds: " + ", ".join(f"{part} {seconds:.1f}" for part, seconds in found.seconds.items()))
    print(f"open {args.out / PAGE}")


if __name__ == "__main__":
    sys.exit(errors.run(main))
