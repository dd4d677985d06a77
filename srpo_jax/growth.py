r"""Draws how an update's time and memory grow with samples, resolution, depth and devices, from preflight's reports.

for size in 512x512 720x720 1024x1024; do ...; done     # any calls of srpo_jax.preflight with --json, then
python -m srpo_jax.growth --reports='runs/growth/*.json' --out=growth.svg
"""

import sys

from srpo_jax import command, errors, storage
from srpo_jax.costs import curves
from srpo_jax.errors import UserError


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line. Raises UserError."""
    parser = command.parser("growth", __doc__)
    words = "files of `python -m srpo_jax.preflight --json`, a pattern"
    parser.add_argument("--reports", type=command.path, required=True, metavar="PATTERN", help=words)
    words = (
        "report that the others are compared with, SAMPLES a device at a time, as v5p:2x2x2,720x720,1: a panel shows "
        "what differs from it in one thing alone; of several depths the largest (default: the first report)"
    )
    parser.add_argument("--base", metavar="TARGET,HEIGHTxWIDTH,SAMPLES", help=words)
    parser.add_argument("--out", type=command.local, required=True, help="SVG file")
    values = parser.parse_args(arguments)
    storage.check_writable(values.out, "--out", folder=False)
    reports = curves.read(values.reports)
    base = curves.base(reports, values.base)
    where = curves.point(base)
    pairs = curves.charts(reports, where)
    if not pairs:
        raise UserError("--reports: no two of them differ in one thing alone; see python -m srpo_jax.growth --help")
    title = f"{where.blocks} blocks, {base['devices']} x {where.chip}, {where.side} pixels, batch " + str(
        base["config"]["data.batch_size"]
    )
    values.out.parent.mkdir(parents=True, exist_ok=True)
    values.out.write_text(curves.draw(title, pairs), encoding="utf-8")
    print(f"{values.out}: {len(pairs)} rows")


if __name__ == "__main__":
    sys.exit(errors.run(main))
