"""A run of five times the recipe's length on the small world, which evaluates itself and keeps its best weights.

    python -m srpo_jax.emoji.longer --out demo        (goes on from `make demo`, or starts from nothing)

SRPO peaks early: this run passes its best weights, and dissolves. Every ``EVERY`` updates it draws half of the held-out
concepts and has them scored by the judge, which nothing is trained with, under the captions that the run is to do
justice to: "3D. fox" for a picture of the prompt "fox". ``checkpoint.best`` keeps the update with the highest mean. The
other half of the held-out concepts then says how good it is, beside the recipe's own end and the last update.

OUT gets longer.md and longer.json (the table), longer.png (concepts at each of these moments), and the run, whose page
OUT/runs/longer/report.html shows the collapse as it came. The same command goes on where it was broken off.
"""

import json
import pathlib
import shutil
import sys
from collections.abc import Sequence

from absl import logging
from ml_collections import ConfigDict

from srpo_jax import checkpoint, command, errors, text
from srpo_jax.emoji import demo, judge, measure, results, world
from srpo_jax.errors import UserError
from srpo_jax.evaluation import history

LONGER = 5  # times the recipe's updates
EVERY = 8  # updates between evaluations, and between checkpoints
WANTED_SCORE, PLAIN_SCORE = "judge_wanted", "judge_plain"  # under "3D. fox", and under "fox"


def ask_for_wanted(plain: pathlib.Path, target: pathlib.Path) -> None:
    """Writes a copy of a CLIP folder whose tokenizer reads "3D. fox" where it is given "fox"."""
    import tokenizers
    import transformers

    if target.exists():
        return
    half = target.with_name(f".{target.name}.partial")
    shutil.rmtree(half, ignore_errors=True)
    shutil.copytree(plain, half)
    own = text.load_tokenizer(plain / "tokenizer")
    words = own.backend_tokenizer
    prefix = tokenizers.normalizers.Prepend(f"{measure.WANTED}. ")
    words.normalizer = tokenizers.normalizers.Sequence([prefix, words.normalizer])
    shutil.rmtree(half / "tokenizer")
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words,
        model_max_length=own.model_max_length,
        **{name: getattr(own, name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")},
    ).save_pretrained(half / "tokenizer")
    half.rename(target)


def lengthened(out: pathlib.Path, config: ConfigDict, concepts: Sequence[world.Concept]) -> ConfigDict:
    """The recipe's config, made longer, with evaluations of these concepts."""
    judges, own = out / "models", config.copy_and_resolve_references()
    ask_for_wanted(judges / "judge", judges / "judge_wanted")
    prompts = out / "prompts" / "chosen_by.txt"
    prompts.write_text("".join(world.prompt(concept) + "\n" for concept in concepts), encoding="utf-8")
    own.steps *= LONGER
    own.sample.every = 0
    own.checkpoint.every, own.checkpoint.keep, own.checkpoint.best = EVERY, 1, f"{WANTED_SCORE}:max"
    own.evaluate.every, own.evaluate.prompts = EVERY, str(prompts)
    own.evaluate.steps, own.evaluate.guidance = own.sample.steps, own.sample.guidance
    own.evaluate.scores = (
        f"{WANTED_SCORE}=clip:{judges / 'judge_wanted'}",
        f"{PLAIN_SCORE}=clip:{judges / 'judge'}",
    )
    return own


def compare(
    out: pathlib.Path, config: ConfigDict, concepts: Sequence[world.Concept], seeds: int
) -> dict[str, measure.Measured]:
    """Trains both runs, writes the table and the sheet into ``out``, and returns what was measured, by moment.

    Args:
      out: folder, made if there is none.
      config: the recipe; its paths are filled in here.
      concepts: at least two; every second one chooses, the others tell.
      seeds: pictures of each of the others.
    """
    demo.prepare(out, config)
    chosen_by, told_by = concepts[::2], concepts[1::2]
    long, workdirs = lengthened(out, config, chosen_by), {}
    for name, own in ((demo.RUNS[results.GUARDED][0], config), ("longer", long)):
        workdirs[name] = out / "runs" / name
        demo.train_to_end(own, workdirs[name])
    recipe, longer = workdirs.values()
    best = history.read(longer)[-1].best
    if best not in checkpoint.steps(longer):  # before training, that is
        raise UserError(f"{longer}: no update was better than none, by checkpoint.best={long.checkpoint.best}")
    models = dict(zip(("before", f"recipe, update {config.steps}"),
                      measure.models(config.model.path, recipe, config.steps), strict=True))  # fmt: skip
    for words, step in (("best", best), ("last", long.steps)):
        models[f"{words}, update {step}"] = measure.models(config.model.path, longer, step)[1]
    critic, easel = judge.Judge(out / "models" / "judge"), measure.Easel([*map(world.prompt, told_by)], config, seeds)
    moments = {name: measure.measure(easel(model), told_by, critic) for name, model in models.items()}
    (out / "longer.md").write_text(table(moments), encoding="utf-8")
    content = [{"moment": name} | measured.figures for name, measured in moments.items()]
    (out / "longer.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    results.moments_sheet(moments, told_by).save(out / "longer.png")
    return moments


def table(moments: dict[str, measure.Measured]) -> str:
    """The figures as markdown, and what the best weights are beside the recipe's."""
    header, *rows = measure.table(moments)
    lines = [f"| {' | '.join(row)} |" for row in (header, ("---",) * len(header), *rows)]
    _, recipe, best, _ = moments.values()
    beside = [
        f"{name} {found.difference.value:+.3f} ({found.difference.low:+.3f} to {found.difference.high:+.3f})"
        for name in (measure.WANTED, measure.ACCURACY, measure.DISTANCE)
        for found in [best.against(recipe, name)]
    ]
    return "\n".join([*lines, "", f"The best weights against the recipe's, pair by pair: {', '.join(beside)}."]) + "\n"


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line. Raises UserError."""
    parser = command.parser("emoji.longer", __doc__)
    demo.add_size(parser)
    args = parser.parse_args(arguments)
    if args.concepts < 2:
        raise UserError("--concepts=1: take at least 2; every second one chooses, the others tell")
    config = demo.load_recipe()
    if args.updates is not None:
        config.steps = args.updates
    logging.set_verbosity(logging.ERROR)  # Orbax tells every step of every save
    print(table(compare(args.out, config, world.split("holdout")[: args.concepts], args.seeds)))
    print(f"open {args.out / 'runs' / 'longer' / 'report.html'}")


if __name__ == "__main__":
    sys.exit(errors.run(main))
