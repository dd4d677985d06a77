r"""Draws how an update's time and memory grow with samples, resolution, depth and devices, from preflight's reports.

  for size in 512x512 720x720 1024x1024; do ...; done     # any calls of srpo_jax.preflight with --json, then
  python -m srpo_jax.growth --reports='runs/growth/*.json' --out=growth.svg

--reports   files of `python -m srpo_jax.preflight --json`, a pattern
--base      TARGET,HEIGHTxWIDTH,SAMPLES of the report that the others are compared with, SAMPLES a device at a time, as
            v5p:2x2x2,720x720,1: a panel shows what differs from it in one thing alone; of several depths the largest
            (default: the first report)
--out       SVG file
"""

import pathlib
import sys

from absl import flags

from srpo_jax import errors
from srpo_jax.costs import curves
from srpo_jax.errors import UserError


def main(argv: list[str] | None = None) -> None:
    """Runs the command line. Raises UserError."""
    argv = sys.argv if argv is None else argv
    if {"--help", "-h"} & set(argv[1:]):
        print(__doc__)
        return
    values = flags.FlagValues()
    for name in ("reports", "base", "out"):
        flags.DEFINE_string(name, None, "", flag_values=values)
    try:
        rest = values(argv)
    except flags.Error as error:
        raise UserError(f"{error}; see python -m srpo_jax.growth --help") from error
    if len(rest) > 1:
        raise UserError(f"{rest[1]!r} is not understood; flags are written --name=value")
    for name in ("reports", "out"):
        if not values[name].value:
            raise UserError(f"--{name} is missing; see python -m srpo_jax.growth --help")
    reports = curves.read(values.reports)
    base = curves.base(reports, values.base)
    where = curves.point(base)
    pairs = curves.charts(reports, where)
    if not pairs:
        raise UserError("--reports: no two of them differ in one thing alone; see python -m srpo_jax.growth --help")
    title = f"FLUX of {where.blocks} blocks, {base['devices']} x {where.chip}, {where.side} pixels, batch " + str(
        base["config"]["data.batch_size"]
    )
    path = pathlib.Path(values.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(curves.draw(title, pairs), encoding="utf-8")
    print(f"{path}: {len(pairs)} rows")


if __name__ == "__main__":
    sys.exit(errors.run(main))
