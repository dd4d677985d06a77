"""A self-contained HTML page: figures, pictures side by side, curves, tables.

The page loads nothing, and says so to the browser (a content security policy): pictures are inline, curves are inline
SVG, and it follows the reader's light or dark theme. It is made of headings, tables and native controls, with a text
for every picture and a table behind every curve. It knows nothing of training; ``render`` takes a ``Report`` of plain
values and gives the page as a string. report.html is the template, report.css the look; report.js pages, filters, sorts
and moves along what is on the page of a ``Browser``, which is whole without it.

Curves are drawn here and not by a plotting library: 70 lines make an SVG of a few kB whose text and grid take the
reader's theme and fonts and whose points answer the pointer. matplotlib's has fixed colours, which stay light on a dark
page, takes a second to import in the training process, and would have to be rewritten for both.
"""

import base64
import dataclasses
import hashlib
import html
import io
import math
import pathlib
from typing import ClassVar

import jinja2
import numpy as np
from PIL import Image

HERE = pathlib.Path(__file__).parent
STYLE, SCRIPT = ((HERE / f"report.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))

# Distinct for the common kinds of colour blindness, and readable on both themes.
COLOURS = ("#2f7fd6", "#e07a2f", "#1f9e89", "#a35bd0", "#8a8f98")
SIDE = 256  # pixels of a small picture's longer side
EXACT = 128 * 128  # pixels up to which a picture is put into the page as it is; JPEG is a tenth as long for larger ones
QUALITY = 85  # of JPEG


# --- what a page is made of -------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Verdict:
    """One target: what was measured, what was wanted, and whether it was reached (None: for information only)."""

    name: str
    value: str
    wanted: str
    passed: bool | None


@dataclasses.dataclass(frozen=True)
class Verdicts:
    """Targets side by side."""

    kind: ClassVar[str] = "verdicts"
    verdicts: tuple[Verdict, ...]


@dataclasses.dataclass(frozen=True)
class Notes:
    """What a reader should know of the figures, a paragraph each."""

    kind: ClassVar[str] = "notes"
    title: str
    texts: tuple[str, ...]


class Inline(str):
    """A picture as a data URL."""


@dataclasses.dataclass(frozen=True)
class Shown:
    """An image.

    Attributes:
      pixels: uint8 ``[H, W, 3]``, or what ``inline`` made of them, for a page that is drawn again and again.
      note: what is said of it on pointing at it.
      text: a line below it.
      link: of the whole picture, relative to the page; "" for none.
    """

    pixels: np.ndarray | Inline
    note: str = ""
    text: str = ""
    link: str = ""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Pictures of one prompt: ``columns[i]`` holds those of the i-th stage (before, after, ...), one a seed."""

    prompt: str
    columns: tuple[tuple[Shown, ...], ...]


@dataclasses.dataclass(frozen=True)
class Gallery:
    """Comparisons that share the names of their stages. ``folded`` ones are opened by a click."""

    kind: ClassVar[str] = "gallery"
    title: str
    text: str
    stages: tuple[str, ...]
    comparisons: tuple[Comparison, ...]
    folded: bool = False


@dataclasses.dataclass(frozen=True)
class Browsed:
    """A comparison that can be found again: by its prompt, its category, and numbers by the names of orders."""

    comparison: Comparison
    category: str = ""
    numbers: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Browser:
    """A gallery that is paged, filtered by text or category, sorted by one of ``orders`` in both directions, and seen
    as a matrix of prompts and seeds of one stage.

    ``along``: the stages are moments of one run. A slider goes through them in place of the matrix; it stands at the
    last one first.
    """

    kind: ClassVar[str] = "browser"
    title: str
    text: str
    stages: tuple[str, ...]
    entries: tuple[Browsed, ...]
    orders: tuple[str, ...] = ()
    along: bool = False

    @property
    def categories(self) -> list[str]:
        """Those that there are, in their order."""
        return list(dict.fromkeys(entry.category for entry in self.entries if entry.category))


@dataclasses.dataclass(frozen=True)
class Chart:
    """Lines over one axis: ``series`` maps a name to its points ``[(x, y), ...]``.

    ``limits`` fixes the vertical range; None takes it from the points. ``percent`` prints 0.5 as "50 %". ``intervals``
    maps names of series to the (low, high) of each of their points.
    """

    title: str
    text: str
    series: dict[str, list[tuple[float, float]]]
    x_label: str = "update"
    limits: tuple[float, float] | None = None
    percent: bool = False
    intervals: dict[str, list[tuple[float, float]]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Charts:
    """Charts side by side."""

    kind: ClassVar[str] = "charts"
    charts: tuple[Chart, ...]


@dataclasses.dataclass(frozen=True)
class PageTable:
    """Rows of text under a header; the first cell of a row names it."""

    kind: ClassVar[str] = "table"
    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    text: str = ""
    folded: bool = False


@dataclasses.dataclass(frozen=True)
class Report:
    """Everything on the page, from top to bottom."""

    title: str
    lead: str
    parts: tuple[Verdicts | Notes | Gallery | Browser | Charts | PageTable, ...]


# --- the page ---------------------------------------------------------------------------------------------------------


def render(report: Report) -> str:
    """The report as one HTML document. All texts are escaped. Raises ValueError for pictures that are not ``[H, W, 3]``
    uint8, for comparisons that lack a stage, and for charts without a finite point."""
    for part in report.parts:
        if part.kind in ("gallery", "browser"):
            whole = part.comparisons if part.kind == "gallery" else [entry.comparison for entry in part.entries]
            for comparison in whole:
                if len(comparison.columns) != len(part.stages):
                    found = f"{len(comparison.columns)} columns for {len(part.stages)} stages"
                    raise ValueError(f"{comparison.prompt!r} has {found}")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "picture": lambda shown: shown.pixels if isinstance(shown.pixels, Inline) else inline(shown.pixels),
        "curves": curves,
        "colours": lambda series: zip(_cycle(len(series)), series, strict=True),
        "rows": _rows,
    }
    script = SCRIPT if any(part.kind == "browser" for part in report.parts) else ""
    return environment.get_template("report.html").render(
        report=report,
        style=STYLE,
        script=script,
        # The one script that may run, whatever a prompt smuggles in.
        allowed=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        width=WIDTH,
        height=HEIGHT,
    ).lstrip()  # fmt: skip


def small(pixels: np.ndarray) -> np.ndarray:
    """A picture uint8 [H, W, 3], shrunk to ``SIDE`` if it is larger."""
    image = Image.fromarray(pixels)
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    return np.asarray(image)


def inline(pixels: np.ndarray) -> Inline:
    """A picture uint8 ``[H, W, 3]`` as a data URL. Raises ValueError for another shape or dtype."""
    pixels = np.asarray(pixels)
    if pixels.ndim != 3 or pixels.shape[-1] != 3 or pixels.dtype != np.uint8:
        raise ValueError(f"a picture must be [H, W, 3] uint8, not {list(pixels.shape)} {pixels.dtype}")
    file, exact = io.BytesIO(), pixels.shape[0] * pixels.shape[1] <= EXACT
    kind, options = ("png", {"optimize": True}) if exact else ("jpeg", {"quality": QUALITY})
    Image.fromarray(pixels).save(file, kind, **options)
    return Inline(f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}")


def _rows(chart: Chart) -> list[list[str]]:
    """The points of a chart as a table: x, and what each of its series has there."""
    table: dict[float, dict[str, str]] = {}
    for name, points in chart.series.items():
        for (x, y), bar in zip(points, chart.intervals.get(name) or [None] * len(points), strict=True):
            known = bar is not None and all(map(math.isfinite, bar))
            ends = f" ({_number(bar[0], chart.percent)} to {_number(bar[1], chart.percent)})" if known else ""
            table.setdefault(x, {})[name] = _number(y, chart.percent) + ends
    return [[_number(x, False), *(table[x].get(name, "") for name in chart.series)] for x in sorted(table)]


# --- curves -----------------------------------------------------------------------------------------------------------

WIDTH, HEIGHT = 520, 250
CROWDED = 40  # points of a line, beyond which they are drawn smaller
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 12, 36


def curves(chart: Chart) -> str:
    """A chart's axes and lines as elements of an SVG of ``WIDTH`` x ``HEIGHT``. Raises ValueError for a chart without a
    finite point."""
    series = {name: [p for p in points if math.isfinite(p[1])] for name, points in chart.series.items()}
    points = [point for line in series.values() for point in line]
    if not points:
        raise ValueError(f"chart {chart.title!r} has no finite point")
    bars = {
        name: [
            (x, *ends) for (x, _), ends in zip(chart.series[name], ends, strict=True) if all(map(math.isfinite, ends))
        ]
        for name, ends in chart.intervals.items()
    }
    heights = [y for _, y in points] + [end for line in bars.values() for _, *ends in line for end in ends]
    x_ticks = ticks(min(x for x, _ in points), max(x for x, _ in points))
    y_ticks = ticks(*(chart.limits or (min(heights), max(heights))))
    x_low, x_high = x_ticks[0], x_ticks[-1]
    y_low, y_high = y_ticks[0], y_ticks[-1]

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - (y - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM),
        )

    parts = []
    for y in y_ticks:
        _, v = place(x_low, y)
        parts.append(f"<line class='rule' x1='{LEFT}' x2='{WIDTH - RIGHT}' y1='{v:.1f}' y2='{v:.1f}'/>")
        parts.append(f"<text x='{LEFT - 8}' y='{v + 4:.1f}' text-anchor='end'>{_number(y, chart.percent)}</text>")
    for x in (x for x in x_ticks if x == round(x)):  # updates are counted: nothing lies between two
        h, _ = place(x, y_low)
        parts.append(f"<text x='{h:.1f}' y='{HEIGHT - BOTTOM + 16}' text-anchor='middle'>{_number(x, False)}</text>")
    parts.append(
        f"<text class='axis' x='{(WIDTH + LEFT - RIGHT) / 2}' y='{HEIGHT - 3}' text-anchor='middle'>"
        f"{html.escape(chart.x_label)}</text>"
    )
    for colour, (name, line) in zip(_cycle(len(series)), series.items(), strict=True):
        path = " ".join(f"{h:.1f},{v:.1f}" for h, v in (place(*point) for point in line))
        parts.append(
            f"<polyline fill='none' stroke='{colour}' stroke-width='2' stroke-linejoin='round' points='{path}'/>"
        )
        for x, low, high in bars.get(name, []):
            (h, bottom), (_, top) = place(x, low), place(x, high)
            parts.append(
                f"<line stroke='{colour}' stroke-width='6' stroke-opacity='0.3' x1='{h:.1f}' x2='{h:.1f}' "
                f"y1='{bottom:.1f}' y2='{top:.1f}'/>"
            )
        radius = 3 if len(line) <= CROWDED else 1.5
        for x, y in line:
            h, v = place(x, y)
            note = f"{html.escape(name)}, {html.escape(chart.x_label)} {_number(x, False)}: {_number(y, chart.percent)}"
            parts.append(
                f"<circle cx='{h:.1f}' cy='{v:.1f}' r='{radius}' fill='{colour}'><title>{note}</title></circle>"
            )
    return "".join(parts)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About ``count`` round numbers that enclose [low, high]; a range of no width is widened first."""
    if high - low < 1e-12:
        low, high = low - (abs(low) * 0.1 or 0.5), high + (abs(high) * 0.1 or 0.5)
    rough = (high - low) / count
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def _cycle(count: int) -> list[str]:
    return [COLOURS[index % len(COLOURS)] for index in range(count)]


def _number(value: float, percent: bool) -> str:
    return f"{100 * value:.4g} %" if percent else f"{value:.4g}"
