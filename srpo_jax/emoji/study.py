"""The study: what the paper says of direct-gradient methods, held to the small world, every figure with an interval.

    python -m srpo_jax.emoji.study --out=study                        # everything; hours on 2 cores
    python -m srpo_jax.emoji.study --out=study --only=guard           # one part, or several: --only=guard,words

recovery  a picture's recovery from noise: the one-step prediction against Direct-Align's interpolation
guard     SRPO, SRPO without inversion, Direct-Align and ReFL under a reward that likes colour, over the discounts
words     steering to each style, to two at once, and with words that the reward does not know
levels    which noise levels to train
images    rollouts, used once or twice, of shared noise; artists' pictures in their place
methods   all methods at equal compute, under the honest reward and the one that likes colour, each at its best learning
          rate; then five times as long
discounts SRPO as long, with the discount of its denoising branch above that of its inversion branch

Three runs of each case. A run that is done is a file in OUT/cells and is never made again: the same command, broken off
or not, goes on, also with another --only. Two commands at once need two folders; what is in ``cells`` of one may then
be copied into the other's. OUT gets report.html and study.md every five minutes and in the end, of all
that is there by then. Runs go through a part with the first seed, then with the next: a part half done
is whole with fewer seeds.
"""

import dataclasses
import json
import pathlib
import sys
import time

from absl import logging
from ml_collections import ConfigDict

from srpo_jax import architectures, command, errors, lock, report, storage
from srpo_jax.emoji import recovery, study_page, study_plan, study_results
from srpo_jax.emoji.study_plan import PARTS, PRESETS, RECOVERY, Part, Preset
from srpo_jax.emoji.study_run import Cell, Workshop
from srpo_jax.errors import UserError

OVERHEAD = 12.0  # what a run takes beside its updates, in updates of SRPO
REPORT_EVERY = 300.0  # seconds: intervals of everything take some


def study(out: pathlib.Path, workshop: Workshop, parts: tuple[Part, ...], only: tuple[str, ...], seeds: int) -> None:
    """Makes what is still to be made of the parts in ``only``, with the first ``seeds`` seeds, and the report of all.

    Raises UserError if a run is interrupted.
    """
    before, chosen = workshop.before(), [part for part in parts if part.name in only]
    if RECOVERY in only and not (out / "recovery.json").exists():
        found = recovery.recover(workshop.config, workshop.concepts, workshop.preset.pictures, workshop.critic)
        recovery.write(out / "recovery.json", found)
    sizes = _sizes(workshop.config, chosen)
    cells = [(part, case, seed) for part in chosen for seed in range(seeds) for case in part.cases]
    left = [cell for cell in cells if workshop.read(*cell[1:]) is None]
    spent, worked, told = 0.0, 0.0, time.monotonic()
    print(f"{len(cells) - len(left)} of {len(cells)} runs are done", flush=True)
    try:
        for number, (part, case, seed) in enumerate(left, 1):
            if workshop.read(case, seed) is not None:
                continue  # a case of two parts
            started = time.monotonic()
            cell = workshop.make(case, seed)
            seconds = time.monotonic() - started
            spent, worked = spent + seconds, worked + sizes[case.folder]
            ahead = sum(sizes[one.folder] for _, one, _ in left[number:])
            print(
                f"{len(cells) - len(left) + number}/{len(cells)} {part.name}: {case.name}, seed {seed}: "
                f"{study_results.line(case, cell, before)}; {seconds:.0f} s, "
                f"about {spent / worked * ahead / 60:.0f} min left",
                flush=True,
            )
            if time.monotonic() - told > REPORT_EVERY:
                write(out, workshop, parts)
                told = time.monotonic()
    finally:
        write(out, workshop, parts)


def _sizes(config: ConfigDict, parts: list[Part]) -> dict[str, float]:
    """What a run of each case takes, by its folder, in updates of SRPO."""
    architecture = architectures.read(config)
    unit = study_plan.flops(config, architecture)
    return {
        case.folder: case.moments[-1] * study_plan.flops(study_plan.changed(config, case.changes), architecture) / unit
        + OVERHEAD
        for part in parts
        for case in part.cases
    }


def check_size(out: pathlib.Path, preset: Preset) -> None:
    """Figures of another size cannot stand beside these. Raises UserError for the folder of such a study."""
    file, content = out / "preset.json", json.dumps(dataclasses.asdict(preset), indent=2) + "\n"
    if file.exists() and file.read_text(encoding="utf-8") != content:
        raise UserError(f"{out} has a study of another size, see {file}; choose another --out")
    storage.write(storage.path(file), content.encode())


def write(out: pathlib.Path, workshop: Workshop, parts: tuple[Part, ...]) -> None:
    """The report and the tables of all that is there, of whatever part."""
    cells: dict[str, list[Cell]] = {}
    for part in parts:
        for case in part.cases:
            found = [workshop.read(case, seed) for seed in range(workshop.preset.seeds)]
            cells[case.folder] = [cell for cell in found if cell is not None]
    recovered = recovery.read(out / "recovery.json") if (out / "recovery.json").exists() else []
    found = study_results.Findings(workshop.config, workshop.concepts, parts, workshop.before(), cells, recovered, out)
    storage.write(storage.path(out / "study.md"), study_results.markdown(found).encode())
    storage.write(storage.path(out / "report.html"), report.render(study_page.page(found)).encode())


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line. Raises UserError."""
    parser = command.parser("emoji.study", __doc__)
    words = "folder of what is written (default: study)"
    parser.add_argument("--out", type=command.local, default=pathlib.Path("study"), help=words)
    parser.add_argument("--only", type=command.words, metavar="PART,...", help="of those above (default: all)")
    parser.add_argument("--preset", choices=PRESETS, default="full", help="small: a look at how it works, no figures")
    parser.add_argument("--seeds", type=command.at_least(1), metavar="N", help="runs of each case (default: all three)")
    args = parser.parse_args(arguments)
    preset = PRESETS[args.preset]
    seeds = preset.seeds if args.seeds is None else args.seeds
    if seeds > preset.seeds:
        raise UserError(f"--seeds={seeds}: must be at most {preset.seeds}")
    only = tuple(args.only or PARTS)
    for name in only:
        if name not in PARTS:
            raise UserError(f"--only={name}: must be of {', '.join(PARTS)}")
    logging.set_verbosity(logging.ERROR)  # Orbax tells every step of every save
    with lock.Lock(args.out, "--out") as held:  # two at once would train in one folder
        held.acquire()
        check_size(args.out, preset)
        workshop = Workshop(args.out, preset)
        parts = study_plan.parts(preset, workshop.config, architectures.read(workshop.config))
        study(args.out, workshop, parts, only, seeds)
    print(f"open {args.out / 'report.html'}")


if __name__ == "__main__":
    sys.exit(errors.run(main))
