"""The page of an evaluation: cautions, figures, curves along runs, and the pictures side by side."""

import math
import urllib.parse
from collections.abc import Iterator

import numpy as np

from srpo_jax import report
from srpo_jax.evaluation.candidates import Candidate, Item
from srpo_jax.evaluation.run import Evaluation
from srpo_jax.evaluation.statistics import Estimate
from srpo_jax.evaluation.summary import Row, Summary, common, gain

MOST = 1500  # small pictures on a page: some 20 MB
EXTREMES = 4  # prompts among the best, and among the worst


def page(found: Evaluation, summary: Summary) -> report.Report:
    """The page. Small pictures stand in it; the whole ones lie beside it in ``images``."""
    labels = [model.label for model in found.candidates]
    against = f", each against {labels[0]}" if len(labels) > 1 else ""
    total = sum(map(len, found.items.values()))
    parts: list = [report.Notes("Before you read the figures", tuple(summary.notes))] if summary.notes else []
    parts += _tables(found, summary)
    parts.append(_signals(found, summary))
    if curves := tuple(_curves(found, summary)):
        parts.append(report.Charts(curves))
    small = _Small(found)
    parts += _extremes(found, small)
    parts.append(_browser(found, small))
    parts += _matrices(found)
    parts += [
        report.PageTable("Models", ("model", "what it is"), tuple((m.label, m.source) for m in found.candidates)),
        report.PageTable(
            "How it was done",
            ("part", "value"),
            (
                *((name, str(value)) for name, value in found.settings.items()),
                *((score.name, score.source) for score in found.scores),
                *((f"seconds: {part}", f"{seconds:.1f}") for part, seconds in found.seconds.items()),
            ),
            folded=True,
        ),
    ]
    return report.Report(
        title="Evaluation: " + (", ".join(labels) if len(labels) < 4 else f"{labels[0]} and {len(labels) - 1} more"),
        lead=(
            f"{total} pictures of {len(found.prompts)} prompts by {len(found.candidates)} model"
            f"{'s' if len(found.candidates) > 1 else ''}{against}, picture by picture from the same noise."
        ),
        parts=tuple(parts),
    )


# --- figures ----------------------------------------------------------------------------------------------------------


def _tables(found: Evaluation, summary: Summary) -> Iterator[report.PageTable]:
    names = [score.name for score in found.scores]
    if not names:
        return
    yield report.PageTable(
        "Scores",
        ("model", *names),
        tuple((m.label, *(_ends(summary.row(m, name).mean) for name in names)) for m in found.candidates),
        "Means, with 95 % intervals that draw prompts again (10,000 times, all pictures of a prompt together).",
    )
    if compared := [row for row in summary.rows if row.against]:
        yield report.PageTable(
            f"Against {found.candidates[0].label}",
            ("model", "score", "difference", "higher in", "pairs", "verdict"),
            tuple(
                (
                    row.model.label,
                    row.score,
                    _ends(row.against.difference, "+"),
                    _percent(row.against.wins),
                    str(row.against.pairs),
                    row.against.verdict,
                )
                for row in compared
            ),
            "Means of paired differences, and the share of pairs with the higher score (ties count half; Wilson's "
            "interval, prompts counted once).",
        )
    if len(summary.categories) > 1:
        columns = [(model, name) for model in found.candidates for name in names]
        yield report.PageTable(
            "By category",
            ("category", *(f"{model.label}: {name}" for model, name in columns)),
            tuple(
                (category, *(_number(means.get((model.folder, name), math.nan)) for model, name in columns))
                for category, means in summary.categories.items()
            ),
            "Means. A category has few prompts: differences between two of these numbers are often chance.",
            folded=True,
        )


def _signals(found: Evaluation, summary: Summary) -> report.PageTable:
    names = list(dict.fromkeys(row.score for row in summary.signals))
    of = {(row.model.folder, row.score): row for row in summary.signals}

    def cell(row: Row) -> str:
        moved = f"; {row.against.difference.value:+.3g}, {row.against.verdict}" if row.against else ""
        return f"{row.mean.value:.4g}{moved}"

    return report.PageTable(
        "Signs of collapse",
        ("model", *(name.replace("_", " ") for name in names), "drift"),
        tuple(
            (m.label, *(cell(of[m.folder, name]) for name in names), _number(found.drift.get(m.folder, math.nan)))
            for m in found.candidates
        ),
        "Means over the pictures, which no judge model is needed for, each against the first model by its own 95 % "
        "interval; drift is of a checkpoint's velocities from its pipeline's. There is no good value: a model that "
        "learns a reward at the pictures' cost moves them far.",
        folded=True,
    )


def _curves(found: Evaluation, summary: Summary) -> Iterator[report.Chart]:
    """The scores along each run with several checkpoints, from its pipeline on."""
    runs: dict[tuple, list[Candidate]] = {}
    for model in found.candidates:
        if model.workdir:
            runs.setdefault((model.workdir, model.ema), []).append(model)
    for (workdir, ema), models in runs.items():
        if len(models) < 2:
            continue
        before = [m for m in found.candidates if m.pipeline == models[0].pipeline and not m.workdir]
        steps = [(0, model) for model in before] + sorted((model.step, model) for model in models)
        name = workdir + (" (moving average)" if ema else "")
        for score in found.scores:
            means = [summary.row(model, score.name).mean for _, model in steps]
            yield report.Chart(
                f"{score.name} along {name}",
                "Means with 95 % intervals; update 0 is the pipeline as it is." if before else "Means, 95 % intervals.",
                {score.name: [(step, mean.value) for (step, _), mean in zip(steps, means, strict=True)]},
                intervals={score.name: [(mean.low, mean.high) for mean in means]},
            )


def _matrices(found: Evaluation) -> Iterator[report.PageTable]:
    """The scores of every picture: prompts down, images across."""
    for score in found.scores:
        for model in found.candidates:
            rows = []
            for prompt in found.prompts:
                values = [
                    found.values.get((model.folder, Item(prompt.text, number)), {}).get(score.name, math.nan)
                    for number in range(found.images)
                ]
                rows.append((prompt.text, *map(_number, values)))
            header = ("prompt", *(f"image {number}" for number in range(found.images)))
            yield report.PageTable(f"Every picture: {score.name} of {model.label}", header, tuple(rows), folded=True)


def _ends(estimate: Estimate, sign: str = "") -> str:
    ends = f"{estimate.low:{sign}.4g} to {estimate.high:{sign}.4g}" if math.isfinite(estimate.low) else "no interval"
    return f"{estimate.value:{sign}.4g} ({ends})"


def _percent(estimate: Estimate) -> str:
    return f"{estimate.value:.0%} ({estimate.low:.0%} to {estimate.high:.0%})"


def _number(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else ""


# --- pictures ---------------------------------------------------------------------------------------------------------


class _Small:
    """Small pictures with their scores, by model and item."""

    def __init__(self, found: Evaluation):
        self._found, self._items = found, {folder: set(items) for folder, items in found.items.items()}

    def __call__(self, model: Candidate, prompt: str, numbers: range) -> tuple[report.Shown, ...]:
        items = [Item(prompt, number) for number in numbers]
        return tuple(self._shown(model, item) for item in items if item in self._items[model.folder])

    def _shown(self, model: Candidate, item: Item) -> report.Shown:
        found = self._found
        values = found.values[model.folder, item]
        text = "\n".join(f"{score.name} {values[score.name]:.4g}" for score in found.scores)
        link = "" if model.pictures else urllib.parse.quote(model.file(item))
        return report.Shown(report.small(found.picture(model, item)), f"{model.label}, image {item.image}", text, link)

    def comparison(self, prompt: str, numbers: range) -> report.Comparison:
        return report.Comparison(prompt, tuple(self(model, prompt, numbers) for model in self._found.candidates))


def _gains(found: Evaluation) -> dict[str, dict[str, float]]:
    """What prompts are sorted by: gains of the models over the first one, of a single model its scores."""
    base, others = found.candidates[0], found.candidates[1:]
    numbers: dict[str, dict[str, float]] = {prompt.text: {} for prompt in found.prompts}
    for score in found.scores:
        for model in others or (base,):
            by_prompt: dict[str, list[float]] = {}
            for item in common(found, model):
                own = found.values[base.folder, item][score.name]
                by_prompt.setdefault(item.prompt, []).append(gain(found, model, score.name, item) if others else own)
            name = f"{score.name}, gain of {model.label}" if others else score.name
            for prompt, values in by_prompt.items():
                numbers[prompt][name] = float(np.mean(values))
    return numbers


def _extremes(found: Evaluation, small: _Small) -> Iterator[report.Gallery]:
    """The best and the worst prompts of the last model under the first score."""
    if not found.scores:
        return
    numbers, name = _gains(found), found.scores[0].name
    if len(found.candidates) > 1:
        name = f"{name}, gain of {found.candidates[-1].label}"
    known = sorted((prompt for prompt in numbers if name in numbers[prompt]), key=lambda p: numbers[p][name])
    count = min(EXTREMES, len(known) // 2)
    stages = tuple(model.label for model in found.candidates)
    for title, chosen in (("Best cases", known[::-1][:count]), ("Worst cases", known[:count])):
        if chosen:
            text = f"By {name}: {', '.join(f'{numbers[prompt][name]:+.4g}' for prompt in chosen)}."
            yield report.Gallery(title, text, stages, tuple(small.comparison(prompt, range(1)) for prompt in chosen))


def _browser(found: Evaluation, small: _Small) -> report.Browser:
    numbers = _gains(found)
    orders = tuple(dict.fromkeys(name for of in numbers.values() for name in of))
    room = max(1, MOST // (found.images * len(found.candidates)))
    shown, words = list(found.prompts), ""
    if len(shown) > room:
        shown = _telling(found, numbers, orders, room)
        words = (
            f" {room} of {len(found.prompts)} prompts are shown here: those with the largest gains and losses, and "
            "others evenly from the list."
        )
    entries = tuple(
        report.Browsed(small.comparison(p.text, range(found.images)), p.category, numbers[p.text]) for p in shown
    )
    return report.Browser(
        "Pictures",
        "Side by side from the same noise; a row is an image. A click opens the whole picture, which lies in a folder "
        f"beside this page.{words}",
        tuple(model.label for model in found.candidates),
        entries,
        orders,
    )


def _telling(found: Evaluation, numbers: dict, orders: tuple[str, ...], room: int) -> list:
    chosen: dict[str, None] = {}
    if orders:
        known = sorted((p for p in numbers if orders[-1] in numbers[p]), key=lambda p: numbers[p][orders[-1]])
        quarter = room // 4
        chosen = dict.fromkeys(known[:quarter] + known[len(known) - quarter :])
    for place in np.linspace(0, len(found.prompts) - 1, room).round().astype(int):
        if len(chosen) < room:
            chosen.setdefault(found.prompts[place].text)
    return [prompt for prompt in found.prompts if prompt.text in chosen]
