"""How time and memory grow: reports of ``preflight`` as an SVG drawing, a row for everything that they vary."""

import glob
import html
from typing import Any, NamedTuple

from srpo_jax import reading, report, schema
from srpo_jax.costs.hardware import GIB
from srpo_jax.errors import UserError


class Point(NamedTuple):
    """What a report is about: a chip, and the four things that panels vary."""

    chip: str
    samples: int
    side: int
    blocks: int
    devices: int


# Field of a point: what the axis says.
PANELS = {
    "samples": "samples of a device at a time",
    "side": "side of the image, pixels",
    "blocks": "transformer blocks",
    "devices": "devices",
}


def point(found: dict[str, Any]) -> Point:
    """Reads the point of a report."""
    config, mesh = found["config"], found["mesh"]
    at_once = config["data.batch_size"] // config["optim.accumulation"] // (mesh["data"] * mesh["fsdp"])
    side = round((config["data.height"] * config["data.width"]) ** 0.5)
    return Point(found["device"], at_once, side, sum(found["blocks"]), found["devices"])


def select(reports: list[dict[str, Any]], base: Point, name: str) -> list[tuple[int, dict[str, Any]]]:
    """(value, report) of the reports that differ from ``base`` in the field ``name`` at most, in ascending order."""
    found = {}
    for item in reports:
        here = point(item)
        if here._replace(**{name: getattr(base, name)}) == base and item["compiled"]:
            found[getattr(here, name)] = item
    return sorted(found.items())


def charts(reports: list[dict[str, Any]], base: Point) -> list[tuple[report.Chart, report.Chart]]:
    """For everything that is varied: (seconds, memory)."""
    pairs = []
    for name, label in PANELS.items():
        chosen = select(reports, base, name)
        if len(chosen) < 2:
            continue
        seconds = {
            "expected": [(x, item["seconds"]["expected"]) for x, item in chosen],
            "at best": [(x, item["seconds"]["best"]) for x, item in chosen],
        }
        memory = {
            "needed": [(x, item["memory"]["needed"] / GIB) for x, item in chosen],
            "arguments": [(x, sum(item["memory"]["arguments"].values()) / GIB) for x, item in chosen],
        }
        pairs.append(
            (
                report.Chart("seconds of an update", "", seconds, label, _from_zero(seconds)),
                report.Chart("GiB of a device", "", memory, label, _from_zero(memory)),
            )
        )
    return pairs


def _from_zero(series: dict[str, list[tuple[float, float]]]) -> tuple[float, float]:
    return 0.0, max(y for line in series.values() for _, y in line)


STYLE = """
svg { font-family: system-ui, sans-serif; }
text { fill: #7a7f87; font-size: 12px; }
text.title { font-size: 14px; }
.rule { stroke: #7a7f87; stroke-opacity: 0.25; }
"""
HEAD = 44  # above a chart: its title and legend


def draw(title: str, pairs: list[tuple[report.Chart, report.Chart]]) -> str:
    """An SVG file: a row for everything that is varied, time on the left and memory on the right."""
    width, row = 2 * report.WIDTH, report.HEIGHT + HEAD
    height = 30 + row * len(pairs)
    parts = [
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {height}' width='{width}' height='{height}'>",
        f"<title>{html.escape(title)}</title><style>{STYLE}</style>",
        f"<text class='title' x='{report.LEFT}' y='20'>{html.escape(title)}</text>",
    ]
    for index, pair in enumerate(pairs):
        for column, chart in enumerate(pair):
            left, top = column * report.WIDTH, 30 + index * row
            parts.append(f"<g transform='translate({left} {top})'>{_legend(chart)}</g>")
            parts.append(f"<g transform='translate({left} {top + HEAD})'>{report.curves(chart)}</g>")
    return "".join(parts) + "</svg>\n"


def _legend(chart: report.Chart) -> str:
    parts = [f"<text class='title' x='{report.LEFT}' y='16'>{html.escape(chart.title)}</text>"]
    for index, name in enumerate(chart.series):
        x = report.LEFT + 110 * index
        parts.append(f"<rect x='{x}' y='27' width='14' height='4' fill='{report.COLOURS[index]}'/>")
        parts.append(f"<text x='{x + 20}' y='33'>{html.escape(name)}</text>")
    return "".join(parts)


def read(pattern: str) -> list[dict[str, Any]]:
    """All reports of the files that a pattern names, in order of their names. Raises UserError."""
    paths = sorted(glob.glob(pattern))
    if not paths:
        raise UserError(f"--reports={pattern}: there is no such file; make some by python -m srpo_jax.preflight --json")
    reports = []
    for path in paths:
        try:
            content = schema.parse(reading.content(path))
            for item in content:
                point(item)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError) as error:
            raise UserError(f"--reports: {path} was not written by preflight's --json ({error!r})") from error
        reports += content
    return reports


def base(reports: list[dict[str, Any]], wanted: str | None) -> dict[str, Any]:
    """The report that the others are compared with, by its name (``growth --base``), or the first. Raises UserError."""
    if wanted is None:
        return reports[0]
    names = {}
    for item in sorted(reports, key=lambda item: -point(item).blocks):  # of several depths, the whole model
        size = f"{item['config']['data.height']}x{item['config']['data.width']}"
        names.setdefault(f"{item['topology']},{size},{point(item).samples}", item)
    if wanted not in names:
        raise UserError(f"--base={wanted} is none of {', '.join(names)}")
    return names[wanted]
