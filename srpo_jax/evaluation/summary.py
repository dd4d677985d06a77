"""What the scores of an evaluation say: means with their intervals, each model against the first one, and cautions.

OUT/summary.json   all of it
   /summary.csv    a line a model and score, and a model and signal
"""

import csv
import io
import json
import math
from typing import Any, NamedTuple

import numpy as np

from srpo_jax import storage
from srpo_jax.evaluation import cautions, signals, statistics
from srpo_jax.evaluation.candidates import Candidate, Item
from srpo_jax.evaluation.run import Evaluation
from srpo_jax.evaluation.statistics import Comparison, Estimate

JSON, CSV = "summary.json", "summary.csv"
FEW = 20  # prompts below which the bootstrap's intervals are visibly too narrow
COLUMNS = (
    *("model", "score", "pictures", "prompts", "mean", "mean_low", "mean_high", "difference", "difference_low"),
    *("difference_high", "strict_low", "strict_high", "wins", "wins_low", "wins_high", "pairs", "verdict"),
)


class Row(NamedTuple):
    """A model under a score. ``against`` compares it with the first model; None for that one, and where no picture of
    both has one prompt and number."""

    model: Candidate
    score: str
    pictures: int
    prompts: int
    mean: Estimate
    against: Comparison | None


class Summary(NamedTuple):
    """All rows, those of signs of collapse apart, the means of categories by (model's folder, score), how many
    comparisons of scores there are, and cautions."""

    rows: list[Row]
    signals: list[Row]
    categories: dict[str, dict[tuple[str, str], float]]
    comparisons: int
    notes: list[str]

    def row(self, model: Candidate, score: str) -> Row:
        """Of a model under a score."""
        return next(row for row in self.rows if row.model is model and row.score == score)


def summarize(found: Evaluation) -> Summary:
    """Works out everything from the scores."""
    place = {prompt.text: number for number, prompt in enumerate(found.prompts)}
    base = found.candidates[0]
    comparisons = max(1, len(found.candidates[1:]) * len(found.scores))

    def row(model: Candidate, name: str, values: dict[tuple[str, Item], dict[str, float]], count: int) -> Row:
        items, against = found.items[model.folder], None
        prompts = np.array([place[item.prompt] for item in items])
        if both := [] if model is base else common(found, model):
            gains = np.array([values[model.folder, item][name] - values[base.folder, item][name] for item in both])
            against = statistics.compare(gains, np.array([place[item.prompt] for item in both]), count)
        mean = statistics.mean(np.array([values[model.folder, item][name] for item in items]), prompts)
        return Row(model, name, len(items), len(set(prompts)), mean, against)

    rows = [row(m, score.name, found.values, comparisons) for m in found.candidates for score in found.scores]
    signs = [row(m, name, found.signals, 1) for m in found.candidates for name in signals.OF_PICTURES]
    return Summary(rows, signs, _categories(found), comparisons, _cautions(found, comparisons))


def common(found: Evaluation, model: Candidate) -> list[Item]:
    """The items of which both a model and the first one have a picture."""
    there = set(found.items[model.folder])
    return [item for item in found.items[found.candidates[0].folder] if item in there]


def gain(found: Evaluation, model: Candidate, score: str, item: Item) -> float:
    """How much higher a model's picture of an item scores than the first model's."""
    return found.values[model.folder, item][score] - found.values[found.candidates[0].folder, item][score]


def _categories(found: Evaluation) -> dict[str, dict[tuple[str, str], float]]:
    of = {prompt.text: prompt.category for prompt in found.prompts}
    means: dict[str, dict[tuple[str, str], float]] = {}
    for category in dict.fromkeys(filter(None, of.values())):
        means[category] = {}
        for model in found.candidates:
            items = [item for item in found.items[model.folder] if of[item.prompt] == category]
            for score in found.scores if items else ():
                values = [found.values[model.folder, item][score.name] for item in items]
                means[category][model.folder, score.name] = float(np.mean(values))
    return means


def _cautions(found: Evaluation, comparisons: int) -> list[str]:
    """What misleads in figures such as these, as far as it applies."""
    notes = cautions.of_kinds({score.kind for score in found.scores}, "page")
    for score in found.scores:
        if trained := [model.label for model in found.candidates if score.content in model.trained_with]:
            notes.append(cautions.trained_with(score.name, ", ".join(trained)))
    if comparisons > 1 and len(found.candidates) > 1:
        notes.append(
            f"{comparisons} comparisons are made here. Where nothing differs, one in twenty 95 % intervals misses 0 "
            "all the same; what it alone says is called “perhaps”. Without that word it holds for all comparisons "
            "together (Bonferroni)."
        )
    runs = [model.workdir for model in found.candidates if model.workdir]
    if len(runs) > len(set(runs)):
        notes.append(cautions.BEST_OF_MANY)
    if found.scores and len(found.prompts) < FEW:
        notes.append(f"Intervals from {len(found.prompts)} prompts are too narrow; {FEW} and more make them honest.")
    missing = [m.label for m in found.candidates if len(found.items[m.folder]) < len(found.prompts) * found.images]
    if missing:
        notes.append(
            f"Not of every prompt has {', '.join(missing)} {found.images} pictures: means are of what there is, "
            "differences of what both models have."
        )
    return notes


# --- files ------------------------------------------------------------------------------------------------------------


def write(found: Evaluation, summary: Summary) -> None:
    """Writes ``summary.json`` and ``summary.csv``."""
    content = {
        "prompts": len(found.prompts),
        "images": found.images,
        "settings": found.settings,
        "scores": {score.name: score.source for score in found.scores},
        "models": {model.folder: _model(model) for model in found.candidates},
        "drift": {model.folder: found.drift[model.folder] for model in found.candidates if model.folder in found.drift},
        "rows": [_record(row) for row in summary.rows],
        "signals": [_record(row) for row in summary.signals],
        "categories": {
            category: [{"model": model, "score": score, "mean": _short(mean)} for (model, score), mean in means.items()]
            for category, means in summary.categories.items()
        },
        "comparisons": summary.comparisons,
        "cautions": summary.notes,
    }
    storage.write(storage.path(found.out / JSON), (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())
    lines = io.StringIO()
    table = csv.DictWriter(lines, COLUMNS, lineterminator="\n")
    table.writeheader()
    table.writerows(_record(row) for row in (*summary.rows, *summary.signals))
    storage.write(storage.path(found.out / CSV), lines.getvalue().encode())


def _model(model: Candidate) -> dict[str, Any]:
    return {"label": model.label, "source": model.source, "update": model.step}


def _record(row: Row) -> dict[str, Any]:
    values: dict[str, Any] = {
        "model": row.model.folder, "score": row.score, "pictures": row.pictures, "prompts": row.prompts,
    } | _ends("mean", row.mean)  # fmt: skip
    if row.against is not None:
        values |= _ends("difference", row.against.difference)
        strict = _ends("strict", row.against.strict)
        values |= {"strict_low": strict["strict_low"], "strict_high": strict["strict_high"]}
        values |= _ends("wins", row.against.wins) | {"pairs": row.against.pairs, "verdict": row.against.verdict}
    return values


def _ends(name: str, estimate: Estimate) -> dict[str, float | None]:
    return {
        name: _short(estimate.value),
        f"{name}_low": _short(estimate.low),
        f"{name}_high": _short(estimate.high),
    }


def _short(value: float) -> float | None:
    return float(f"{value:.7g}") if math.isfinite(value) else None
