r"""Tries what could make an update faster, one change at a time, and writes a table of predictions and results.

    python -m srpo_jax.sweep --out=runs/sweep [--preset=wide] [--device-batch=1] [--only=attention,remat] [--runs=3]

For a day with a GPU: every trial is `python -m srpo_jax.benchmark` in a process of its own (memory and XLA's flags are
a process's), its output in OUT/NAME.json and OUT/NAME.log. A trial that fails, as one without enough memory does, is a
row like any other. The same command goes on where it was broken off. At the end OUT/sweep.md and OUT/sweep.json compare
each trial with the one it changes.

  --out            folder
  --preset         sizes, of benchmark's (default: wide)
  --device-batch   samples a device takes at a time, where the trial does not set it
  --only           groups of trials: baseline, attention, size, remat, batch, terms, rollout, unroll, flags
                   (default: these); full, all of FLUX.1-dev on one GPU, whatever the preset
  --runs           timed calls of each program (default: 3)
  --minutes        a trial is given up after so many (default: 20)
"""

import pathlib
import sys

from absl import flags

from srpo_jax import errors
from srpo_jax.costs import presets, trials
from srpo_jax.errors import UserError


def main(argv: list[str] | None = None) -> None:
    """Runs the command line. Raises UserError."""
    argv = sys.argv if argv is None else argv
    if {"--help", "-h"} & set(argv[1:]):
        print(__doc__)
        return
    values = flags.FlagValues()
    flags.DEFINE_string("out", None, "", flag_values=values)
    flags.DEFINE_enum("preset", "wide", sorted(presets.PRESETS), "", flag_values=values)
    flags.DEFINE_integer("device-batch", 1, "", lower_bound=1, flag_values=values)
    flags.DEFINE_list("only", [group for group in trials.GROUPS if group != "full"], "", flag_values=values)
    flags.DEFINE_integer("runs", 3, "", lower_bound=1, flag_values=values)
    flags.DEFINE_float("minutes", 20.0, "", lower_bound=0.0, flag_values=values)
    try:
        rest = values(argv)
    except flags.Error as error:
        raise UserError(f"{error}; see python -m srpo_jax.sweep --help") from error
    if len(rest) > 1 or not values.out:
        raise UserError("--out is missing" if not values.out else f"{rest[1]!r} is not understood; see --help")
    if unknown := set(values.only) - set(trials.GROUPS):
        raise UserError(f"--only: {unknown.pop()!r} is unknown; choose of {', '.join(trials.GROUPS)}")
    out, each = pathlib.Path(values.out), values["device-batch"].value
    trials.run(out, values.only, values.preset, each, values.runs, values.minutes)


if __name__ == "__main__":
    sys.exit(errors.run(main))
