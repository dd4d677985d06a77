r"""Tries what could make an update faster, one change at a time, and writes a table of predictions and results.

    python -m srpo_jax.sweep --out=runs/sweep [--preset=wide] [--device-batch=1] [--only=attention,remat] [--runs=3]

For a day with a GPU: every trial is `python -m srpo_jax.benchmark` in a process of its own (memory and XLA's flags are
a process's), its output in OUT/NAME.json and OUT/NAME.log. A trial that fails, as one without enough memory does, is a
row like any other. The same command goes on where it was broken off. At the end OUT/sweep.md and OUT/sweep.json compare
each trial with the one it changes.
"""

import sys

from srpo_jax import command, errors, storage
from srpo_jax.costs import presets, trials
from srpo_jax.errors import UserError


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line. Raises UserError."""
    parser, usual = command.parser("sweep", __doc__), [group for group in trials.GROUPS if group != "full"]
    parser.add_argument("--out", type=command.local, required=True, help="folder")
    words = "sizes, of benchmark's (default: wide)"
    parser.add_argument("--preset", choices=sorted(presets.PRESETS), default="wide", help=words)
    words = "samples a device takes at a time, where the trial does not set it (default: 1)"
    parser.add_argument("--device-batch", type=command.at_least(1), default=1, metavar="N", help=words)
    words = f"groups of trials: {', '.join(usual)} (default: these); full, FLUX.1-dev on one GPU, whatever the preset"
    parser.add_argument("--only", type=command.words, default=usual, metavar="GROUP,...", help=words)
    words = "timed calls of each program (default: 3)"
    parser.add_argument("--runs", type=command.at_least(1), default=3, metavar="N", help=words)
    words = "a trial is given up after so many (default: 20)"
    parser.add_argument("--minutes", type=command.positive, default=20.0, help=words)
    values = parser.parse_args(arguments)
    if unknown := set(values.only) - set(trials.GROUPS):
        raise UserError(f"--only: {unknown.pop()!r} is unknown; choose of {', '.join(trials.GROUPS)}")
    storage.check_writable(values.out, "--out")
    trials.run(values.out, values.only, values.preset, values.device_batch, values.runs, values.minutes)


if __name__ == "__main__":
    sys.exit(errors.run(main))
