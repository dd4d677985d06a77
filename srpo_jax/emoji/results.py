"""The demonstration's results: targets, the content of metrics.json, the page, and a sheet of pictures."""

import dataclasses
import importlib.metadata
import math
import os
import platform
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from PIL import Image, ImageDraw, ImageFont

from srpo_jax import config as config_lib
from srpo_jax import report
from srpo_jax.emoji import measure, world
from srpo_jax.emoji.measure import WANTED, Measured

SHARE_WANTED, FALL_ALLOWED = 0.80, 0.03
GUARDED, CONTRAST = "SRPO", "SRPO without inversion"  # the names of the two runs
SHOWN = 24  # concepts in the open gallery; the others are folded


@dataclasses.dataclass(frozen=True)
class Goal:
    """A figure that was to be reached."""

    name: str
    wanted: str
    before: float
    after: float
    reached: bool


@dataclasses.dataclass(frozen=True)
class Results:
    """What the demonstration found.

    Attributes:
      config: of the guarded run.
      concepts: the held-out concepts that were drawn.
      curves: by run, the pictures and figures after each number of updates, from 0 on.
      records: by run, the metrics of every update.
      laps: (part, seconds) in the order in which they were done.
    """

    config: ConfigDict
    concepts: tuple[world.Concept, ...]
    curves: dict[str, dict[int, Measured]]
    records: dict[str, list[dict[str, float]]]
    laps: list[tuple[str, float]]

    @property
    def seconds(self) -> float:
        """Of everything."""
        return sum(seconds for _, seconds in self.laps)

    def end(self, run: str) -> Measured:
        """The last moment of a run."""
        return self.curves[run][max(self.curves[run])]

    def targets(self) -> tuple[Goal, ...]:
        """What SRPO was to do, and whether it did."""
        first, last = self.curves[GUARDED][0].figures, self.end(GUARDED).figures
        share, accuracy = (first[WANTED], last[WANTED]), (first["accuracy"], last["accuracy"])
        return (
            Goal(
                f"Judged {WANTED}",
                f"the share at least doubles or reaches {SHARE_WANTED:.0%}",
                *share,
                reached=share[1] >= SHARE_WANTED or share[1] >= 2 * share[0] > 0,
            ),
            Goal(
                "Concept right",
                f"the share falls by at most {100 * FALL_ALLOWED:.0f} points",
                *accuracy,
                reached=bool(accuracy[0] - accuracy[1] <= FALL_ALLOWED + 1e-9),
            ),
        )

    def content(self) -> dict[str, Any]:
        """Everything but the pictures, ready for JSON."""
        return {
            "targets": [dataclasses.asdict(target) for target in self.targets()],
            "concepts": [concept.caption for concept in self.concepts],
            "pictures": len(self.curves[GUARDED][0].judgement.styles),
            "judged": {
                run: [
                    {"step": step}
                    | measured.figures
                    | {"intervals": {name: _ends(measured, name) for name in measured.values}}
                    for step, measured in sorted(curve.items())
                ]
                for run, curve in self.curves.items()
            },
            "training": self.records,
            "laps": [{"part": part, "seconds": round(seconds, 1)} for part, seconds in self.laps],
            "seconds": round(self.seconds, 1),
            "environment": environment(),
            "config": config_lib.flatten(self.config),
        }


def environment() -> dict[str, str]:
    """What the figures were measured with."""
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "transformers")
    return {
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores",
        "devices": ", ".join(str(device) for device in jax.devices()),
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in packages},
    }


def _ends(measured: Measured, name: str) -> list[float] | None:
    """The 95 % interval of a figure; None of a single concept."""
    _, *ends = measured.estimate(name)
    return ends if all(map(math.isfinite, ends)) else None


# --- the page ---------------------------------------------------------------------------------------------------------


def page(results: Results) -> report.Report:
    """The report."""
    content, contrast = results.content(), results.end(CONTRAST).figures
    verdicts = [
        report.Verdict(target.name, f"{target.before:.1%} → {target.after:.1%}", target.wanted, target.reached)
        for target in results.targets()
    ]
    verdicts += [
        report.Verdict(
            "Without the inversion branch",
            f"{contrast[WANTED]:.1%}, {contrast['accuracy']:.1%}",
            f"judged {WANTED}, concept right: the same run for contrast",
            None,
        ),
        report.Verdict(
            "Time",
            f"{results.seconds / 60:.1f} min",
            f"two runs of {results.config.steps} updates, {content['environment']['machine']}",
            None,
        ),
    ]
    shown, *others = galleries(results)
    return report.Report(
        title=f"SRPO on a small FLUX: from any style to {WANTED}",
        lead=(
            "A model of FLUX's architecture that draws emoji in three styles was aligned with SRPO for "
            f"{results.config.steps} updates on {len(world.split('train'))} concepts, with the word “{WANTED}” against "
            f"“Flat” and “Mono”. All figures are of {content['pictures']} pictures of {len(results.concepts)} other "
            "concepts, on which it was never aligned, by a judge that nothing was trained against."
        ),
        parts=(
            report.Verdicts(tuple(verdicts)),
            report.PageTable(
                "Before and after",
                *figures(results),
                "Of the same pictures, drawn from the same noise; with 95 % intervals that draw concepts again.",
            ),
            shown,
            report.Charts(tuple(charts(results))),
            *others,
            report.PageTable(
                "What was run",
                ("part", "time"),
                tuple((lap["part"], f"{lap['seconds']:.0f} s") for lap in content["laps"]),
            ),
            report.PageTable("Environment", ("part", "version"), tuple(content["environment"].items())),
            report.PageTable(
                "Configuration",
                ("key", "value"),
                tuple((key, str(value)) for key, value in content["config"].items()),
                folded=True,
            ),
        ),
    )


def figures(results: Results) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    """The table of the figures before and after, as a header and rows."""
    moments = {"before": results.curves[GUARDED][0]} | {run: results.end(run) for run in results.curves}
    header, *rows = measure.table(moments)
    return header, tuple(rows)


def galleries(results: Results) -> Iterator[report.Gallery]:
    """Before and after, for some concepts open and for the others folded."""
    moments = {
        "before": results.curves[GUARDED][0],
        "SRPO": results.end(GUARDED),
        "no inversion": results.end(CONTRAST),
    }
    comparisons = []
    for index, concept in enumerate(results.concepts):
        columns = []
        for measured in moments.values():
            first = index * measured.images.shape[1]
            images = enumerate(measured.images[index], first)
            columns.append(tuple(report.Shown(image, measured.judgement.note(place)) for place, image in images))
        comparisons.append(report.Comparison(concept.caption, tuple(columns)))
    # Even steps through the table of concepts show animals, food, vehicles and signs alike.
    chosen = set(np.linspace(0, len(comparisons) - 1, min(SHOWN, len(comparisons))).round().astype(int).tolist())
    text = (
        "Prompted with the bare name. A row is a seed: the same noise in every column. "
        "Point at a picture for the judge's opinion."
    )
    for title, open_ in (("Held-out concepts, before and after", True), ("The other held-out concepts", False)):
        members = tuple(c for index, c in enumerate(comparisons) if (index in chosen) == open_)
        if members:
            yield report.Gallery(title, text, tuple(moments), members, folded=not open_)


def before_after_sheet(results: Results) -> Image.Image:
    """Before and after SRPO on one sheet."""
    return moments_sheet({"before": results.curves[GUARDED][0], "after": results.end(GUARDED)}, results.concepts)


def moments_sheet(moments: dict[str, Measured], concepts: Sequence[world.Concept], columns: int = 14) -> Image.Image:
    """Two seeds of some concepts at each moment on one white sheet, for places that show no HTML."""
    chosen = np.linspace(0, len(concepts) - 1, min(columns, len(concepts))).round().astype(int)
    first = next(iter(moments.values())).images
    seeds = min(2, first.shape[1])
    size, margin, gap, line = first.shape[2], 12 + 7 * max(map(len, moments)), 6, 30
    font = ImageFont.load_default(13)
    width = margin + len(chosen) * (size + gap)
    canvas = Image.new("RGB", (width, line + len(moments) * (seeds * (size + gap) + gap)), "white")
    draw = ImageDraw.Draw(canvas)
    top = line
    for name, measured in moments.items():
        draw.text((gap, top + seeds * size // 2), name, "black", font)
        for column, index in enumerate(chosen):
            left = margin + column * (size + gap)
            if top == line:
                # Two short lines: a caption is wider than its picture.
                words = "\n".join(textwrap.wrap(concepts[index].caption, 10)[:2])
                draw.multiline_text((left, 1), words, "black", ImageFont.load_default(11), spacing=1)
            for seed in range(seeds):
                canvas.paste(Image.fromarray(measured.images[index, seed]), (left, top + seed * (size + gap)))
        top += seeds * (size + gap) + gap
    return canvas


def charts(results: Results) -> Iterator[report.Chart]:
    """Curves of the judge's figures and of the rewards in training."""

    def judged(run: str, figure: str) -> list[tuple[float, float]]:
        return [(step, measured.figures[figure]) for step, measured in sorted(results.curves[run].items())]

    def ends(run: str, figure: str) -> list[tuple[float, float]]:
        found = [measured.estimate(figure) for _, measured in sorted(results.curves[run].items())]
        return [(estimate.low, estimate.high) for estimate in found]

    def trained(run: str, metric: str) -> list[tuple[float, float]]:
        return [(record["step"], record[metric]) for record in results.records[run]]

    runs = results.curves
    yield report.Chart(
        "Style",
        "What the judge takes the held-out pictures for, with SRPO; 95 % intervals over concepts.",
        {style: judged(GUARDED, style) for style in world.STYLES},
        intervals={style: ends(GUARDED, style) for style in world.STYLES},
        limits=(0, 1),
        percent=True,
    )
    yield report.Chart(
        "Concept",
        "The share of held-out pictures in which the judge finds the right concept, among all of the world.",
        {run: judged(run, "accuracy") for run in runs},
        intervals={run: ends(run, "accuracy") for run in runs},
        percent=True,
    )
    yield report.Chart(
        f"Distance to the artist's {WANTED} picture",
        "Root mean squared difference of pixels, of 1; lower is nearer.",
        {run: judged(run, "distance") for run in runs},
        intervals={run: ends(run, "distance") for run in runs},
    )
    yield report.Chart(
        "Relative reward",
        "What each branch of SRPO raises: wanted words over unwanted ones, which the inversion branch exchanges.",
        {branch: trained(GUARDED, f"{branch}/reward") for branch in results.config.align.branches},
    )
    yield report.Chart(
        "Plain reward",
        "The recovered picture under its bare caption; no run aims at it.",
        {run: trained(run, "denoise/caption_reward") for run in runs},
    )
    yield report.Chart("Gradient norm", "Before clipping.", {run: trained(run, "grad_norm") for run in runs})
