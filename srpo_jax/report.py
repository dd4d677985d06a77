"""One self-contained HTML page about a run: verdicts, before/after pictures, curves, configuration.

The page loads nothing: pictures are inline PNGs, curves are inline SVG, and it follows the reader's light or dark
theme. It knows nothing of training; ``render`` takes a ``Report`` of plain values and gives the page as a string.
"""

import base64
import dataclasses
import html
import io
import math
import pathlib

import numpy as np
from PIL import Image

STYLE = pathlib.Path(__file__).with_suffix(".css").read_text(encoding="utf-8")

# Distinct for the common kinds of colour blindness, and readable on both themes.
COLOURS = ("#2f7fd6", "#e07a2f", "#1f9e89", "#a35bd0", "#8a8f98")


@dataclasses.dataclass(frozen=True)
class Verdict:
    """One target: what was measured, what was wanted, and whether it was reached (None: for information only)."""

    name: str
    value: str
    wanted: str
    passed: bool | None


@dataclasses.dataclass(frozen=True)
class Shown:
    """An image ``[H, W, 3]``, uint8, with the text that a reader sees on pointing at it."""

    pixels: np.ndarray
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Pictures of one prompt: ``columns[i]`` holds those of the i-th stage (before, after, ...), one a seed."""

    prompt: str
    columns: tuple[tuple[Shown, ...], ...]


@dataclasses.dataclass(frozen=True)
class Gallery:
    """Comparisons that share the names of their stages. ``folded`` ones are opened by a click."""

    title: str
    text: str
    stages: tuple[str, ...]
    comparisons: tuple[Comparison, ...]
    folded: bool = False


@dataclasses.dataclass(frozen=True)
class Chart:
    """Lines over one axis: ``series`` maps a name to its points ``[(x, y), ...]``.

    ``limits`` fixes the vertical range; None takes it from the points. ``percent`` prints 0.5 as "50 %".
    """

    title: str
    text: str
    series: dict[str, list[tuple[float, float]]]
    x_label: str = "update"
    limits: tuple[float, float] | None = None
    percent: bool = False


@dataclasses.dataclass(frozen=True)
class PageTable:
    """Rows of text under a header."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    folded: bool = False


@dataclasses.dataclass(frozen=True)
class Report:
    """Everything on the page, from top to bottom."""

    title: str
    lead: str
    verdicts: tuple[Verdict, ...]
    galleries: tuple[Gallery, ...]
    charts: tuple[Chart, ...]
    tables: tuple[PageTable, ...]


def render(report: Report) -> str:
    """The report as one HTML document. All texts are escaped. Raises ValueError for pictures that are not ``[H, W, 3]``
    uint8 and for charts without a finite point."""
    first = [gallery for gallery in report.galleries if not gallery.folded]
    rest = [gallery for gallery in report.galleries if gallery.folded]
    body = [
        f"<header><h1>{html.escape(report.title)}</h1><p class='lead'>{html.escape(report.lead)}</p></header>",
        _verdicts(report.verdicts),
        *map(_gallery, first),
        "<div class='charts'>" + "".join(map(_chart, report.charts)) + "</div>",
        *map(_gallery, rest),
        *map(_table, report.tables),
    ]
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{html.escape(report.title)}</title><style>{STYLE}</style></head><body><main>"
        + "\n".join(body)
        + "</main></body></html>\n"
    )


# --- sections ---------------------------------------------------------------------------------------------------------


def _verdicts(verdicts: tuple[Verdict, ...]) -> str:
    cards = []
    for verdict in verdicts:
        state, word = {True: ("good", "reached"), False: ("bad", "missed"), None: ("plain", "")}[verdict.passed]
        badge = f"<span class='badge'>{word}</span>" if word else ""
        cards.append(
            f"<div class='verdict {state}'><div class='name'>{html.escape(verdict.name)}{badge}</div>"
            f"<div class='value'>{html.escape(verdict.value)}</div>"
            f"<div class='wanted'>{html.escape(verdict.wanted)}</div></div>"
        )
    return "<section class='verdicts'>" + "".join(cards) + "</section>"


def _gallery(gallery: Gallery) -> str:
    cards = []
    for comparison in gallery.comparisons:
        if len(comparison.columns) != len(gallery.stages):
            raise ValueError(
                f"{comparison.prompt!r} has {len(comparison.columns)} columns for {len(gallery.stages)} stages"
            )
        columns = "".join(
            f"<div class='stage'><div class='stage-name'>{html.escape(stage)}</div>"
            + "".join(_picture(picture, f"{comparison.prompt}, {stage}") for picture in pictures)
            + "</div>"
            for stage, pictures in zip(gallery.stages, comparison.columns, strict=True)
        )
        cards.append(
            f"<figure><figcaption>{html.escape(comparison.prompt)}</figcaption>"
            f"<div class='stages'>{columns}</div></figure>"
        )
    return _section(gallery.title, gallery.text, f"<div class='gallery'>{''.join(cards)}</div>", gallery.folded)


def _picture(picture: Shown, alternative: str) -> str:
    pixels = np.asarray(picture.pixels)
    if pixels.ndim != 3 or pixels.shape[-1] != 3 or pixels.dtype != np.uint8:
        raise ValueError(f"a picture must be [H, W, 3] uint8, not {list(pixels.shape)} {pixels.dtype}")
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", optimize=True)
    data = base64.b64encode(file.getvalue()).decode()
    return f"<img src='data:image/png;base64,{data}' alt='{_quote(alternative)}' title='{_quote(picture.note)}'>"


def _table(table: PageTable) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in table.header)
    rows = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in table.rows)
    grid = f"<div class='scroll'><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    return _section(table.title, "", grid, table.folded)


def _section(title: str, text: str, content: str, folded: bool) -> str:
    words = f"<p>{html.escape(text)}</p>" if text else ""
    if folded:
        return f"<details><summary>{html.escape(title)}</summary>{words}{content}</details>"
    return f"<section><h2>{html.escape(title)}</h2>{words}{content}</section>"


def _quote(text: str) -> str:
    return html.escape(text, quote=True)


# --- curves -----------------------------------------------------------------------------------------------------------

WIDTH, HEIGHT = 520, 250
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 12, 36


def _chart(chart: Chart) -> str:
    legend = "".join(
        f"<span><i style='background:{colour}'></i>{html.escape(name)}</span>"
        for colour, name in zip(_cycle(len(chart.series)), chart.series, strict=True)
    )
    return (
        f"<section><h2>{html.escape(chart.title)}</h2><p>{html.escape(chart.text)}</p>"
        f"<div class='legend'>{legend}</div><svg viewBox='0 0 {WIDTH} {HEIGHT}' role='img' "
        f"aria-label='{_quote(chart.title)}'>{curves(chart)}</svg></section>"
    )


def curves(chart: Chart) -> str:
    """A chart's axes and lines as elements of an SVG of ``WIDTH`` x ``HEIGHT``. Raises ValueError for a chart without a
    finite point."""
    series = {name: [p for p in points if math.isfinite(p[1])] for name, points in chart.series.items()}
    points = [point for line in series.values() for point in line]
    if not points:
        raise ValueError(f"chart {chart.title!r} has no finite point")
    x_ticks = ticks(min(x for x, _ in points), max(x for x, _ in points))
    y_ticks = ticks(*(chart.limits or (min(y for _, y in points), max(y for _, y in points))))
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
        for x, y in line:
            h, v = place(x, y)
            note = f"{html.escape(name)}, {html.escape(chart.x_label)} {_number(x, False)}: {_number(y, chart.percent)}"
            parts.append(f"<circle cx='{h:.1f}' cy='{v:.1f}' r='3' fill='{colour}'><title>{note}</title></circle>")
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
