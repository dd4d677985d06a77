"""The page of a run, ``WORKDIR/report.html``: where it stands, whether alignment works, and what to mind.

It is made of the files of the workdir, and of the warnings of this start, which it keeps for the next ones:

    WORKDIR/warnings.jsonl   a line a warning of any start: {"time", "text"}

The page stays small whatever the length of the run: curves of ``POINTS`` points at most, and the small pictures of
``run_pictures``.
"""

import dataclasses
import datetime
import itertools
import json
import math
import os
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from srpo_jax import config as config_lib
from srpo_jax import errors, metrics, record, report, resume, run_pictures, schema, storage, terminal
from srpo_jax.evaluation import cautions, history, scoring, stopping
from srpo_jax.evaluation.history import Entry, Figure

PAGE, WARNINGS = "report.html", "warnings.jsonl"
POINTS = 120  # of a curve, at most
SHOWN = 20  # newest warnings
TIMED = 50  # newest updates, whose median tells how long one takes

# What the collapse signals of an evaluation say.
SIGNALS = {
    "saturation": "The mean of HSV's S. It rises as colours are overdone.",
    "clipped": "The share of pixels with a channel at either end of its range. It rises as contrast is overdone.",
    "laplacian_variance": "The variance of luma's Laplacian. It falls as pictures grow smooth.",
    "high_frequency_share": "Of luma's spectral energy. It falls with smoothing, and rises with gloss and grids.",
    "grey_entropy": "Bits of the histogram of luma. It falls as pictures turn into flat posters.",
    "diversity": "How unlike the pictures of a prompt are, 1 - cos of features. It falls as they become one look.",
    "drift": "How far velocities are from those of the first weights, squared. It grows before rewards turn.",
}


class Page:
    """Rewrites the page of a run; on processes other than the first it does nothing.

    Args:
      workdir: of the run, with its ``config.json``.
      heard: the warnings of this start, a list that grows (``terminal.warnings``).
    """

    def __init__(self, workdir: str | os.PathLike, heard: Sequence[str] = ()):
        self._workdir, self._heard, self._kept = storage.path(workdir), heard, 0
        self._album = run_pictures.Album(self._workdir)

    def write(self, ended: bool = False) -> None:
        """Writes the page, at once or not at all. Whatever hinders it is a warning, and training goes on.

        ``ended``: no further update follows.
        """
        if jax.process_index() != 0:
            return
        try:
            self._keep_warnings()
            content = report.render(page(read(self._workdir, self._album), ended))
            storage.write(self._workdir / PAGE, content.encode())
        except Exception as error:  # of files, pictures, buckets, the template: none of them is worth a run
            words = errors.brief(error)
            terminal.warn(f"{self._workdir / PAGE} was not drawn ({words}); the run is as good without it")

    def _keep_warnings(self) -> None:
        new = self._heard[self._kept :]
        if new:
            now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            kept = _lines(self._workdir / WARNINGS) + [{"time": now, "text": text} for text in new]
            storage.write(self._workdir / WARNINGS, "".join(json.dumps(line) + "\n" for line in kept).encode())
            self._kept += len(new)


# --- what a workdir says ----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Run:
    """A run by the files of its workdir.

    Attributes:
      name: of the folder.
      config: flat, in today's keys.
      recipe: that it came from; None where no recipe file started it.
      metrics: of every update.
      evaluations: those that compare with the newest one.
      others: how many do not.
      changes: of its configuration, on purpose.
      warnings: of all starts.
      pictures: of fixed prompts at some moments; None where there are none.
    """

    name: str
    config: dict[str, Any]
    recipe: record.Recipe | None
    metrics: list[dict[str, Any]]
    evaluations: list[Entry]
    others: int
    changes: list[dict[str, Any]]
    warnings: list[dict[str, Any]]
    pictures: run_pictures.Pictures | None

    @property
    def step(self) -> int:
        """Updates that are done."""
        return max([0, *(entry.step for entry in self.evaluations), *(line["step"] for line in self.metrics)])

    def kind(self, score: str) -> str:
        """Of a score by its name, of ``evaluate.scores`` or of a reward of the run."""
        for spec in map(scoring.split, self.config["evaluate.scores"]):
            if score in spec.names:
                return spec.kind
        return self.config.get(f"reward.models.{score}.kind", "")

    @property
    def rewards(self) -> list[str]:
        """The names of the rewards that it is trained with."""
        weights = {config_lib.reward_of(key): value for key, value in self.config.items() if key.endswith(".weight")}
        return [name for name, weight in weights.items() if name and weight]


def read(workdir: epath.Path, album: run_pictures.Album) -> Run:
    """Reads a workdir. Raises UserError where its configuration cannot be read, and what reading its files raises."""
    file = workdir / record.RECIPE
    recipe = record.Recipe(**json.loads(file.read_text(encoding="utf-8"))) if file.exists() else None
    entries = history.read(workdir)
    alike = stopping.comparable(entries)
    return Run(
        name=workdir.name,
        config=resume.up_to_date(record.read_config(workdir) or {}),
        recipe=recipe,
        metrics=metrics.read(workdir),
        evaluations=alike,
        others=len(entries) - len(alike),
        changes=_lines(workdir / record.CHANGES),
        warnings=_lines(workdir / WARNINGS),
        pictures=album.open([entry.step for entry in alike], alike[-1].best if alike else None),
    )


def _lines(file: epath.Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines; lines that are none are left out."""
    found = []
    for line in file.read_bytes().decode(errors="replace").splitlines() if file.exists() else ():
        try:
            content = schema.parse(line)
        except ValueError:
            continue
        if isinstance(content, dict):
            found.append(content)
    return found


# --- the page ---------------------------------------------------------------------------------------------------------


def page(run: Run, ended: bool = False) -> report.Report:
    """The page of a run; ``ended``: no further update follows."""
    now = datetime.datetime.now(datetime.UTC)
    total = run.config["steps"]
    state = f"stands at update {run.step} of {total}"
    if run.step >= total:
        state = f"has done all of its {total} updates"
    elif ended:
        state = f"ended at update {run.step} of {total}"
    trained = f"{run.config['method']} with {', '.join(run.rewards)}"
    parts: list = [report.Verdicts(tuple(_cards(run, ended)))]
    if warnings := _warnings(run):
        parts.append(report.Notes("Warnings", warnings))
    if run.pictures is not None:
        parts.append(run.pictures.part())
    if notes := _cautions(run):
        parts.append(report.Notes("Before you read the figures", notes))
    charts = itertools.chain(_scores(run), _rewards(run), _signals(run), _progress(run))
    if found := tuple(chart for chart in charts if _is_drawn(chart)):
        parts.append(report.Charts(found))
    parts += _tables(run)
    return report.Report(
        title=f"Run {run.name}",
        lead=f"{trained}: it {state}, as of {now:%Y-%m-%d %H:%M} UTC. Load the page again to see how it goes on.",
        parts=tuple(parts),
    )


def _cards(run: Run, ended: bool) -> Iterator[report.Verdict]:
    """Where the run stands."""
    total, times = run.config["steps"], [line["step_seconds"] for line in run.metrics if "step_seconds" in line]
    each = statistics.median(times[-TIMED:]) if times else math.nan
    yield report.Verdict("Updates", f"{run.step} of {total}", f"{metrics.clock(each)} each" if times else "", None)
    if run.step < total and not ended and times:
        left, words = each * (total - run.step), "of updates, without sample grids and checkpoints"
        every = run.config["evaluate.every"]
        if every and run.evaluations:
            due = total // every - run.step // every + bool(total % every)
            left += due * statistics.mean(sum(entry.seconds.values()) for entry in run.evaluations)
            words = f"of updates and {due} evaluation{'s' if due != 1 else ''}, without sample grids and checkpoints"
        yield report.Verdict("Time left", metrics.clock(left), words, None)
    if not run.evaluations:
        return
    first, last = run.evaluations[0], run.evaluations[-1]
    for name, figure in last.scores.items():
        start = f"{first.scores[name].mean:.4g} → " if name in first.scores and first is not last else ""
        words = f"{_moment(first)} → {_moment(last)}" if start else _moment(last)
        yield report.Verdict(name, f"{start}{figure.mean:.4g}", f"{words}, 95 % {_ends(figure)}", None)
    if last.best is not None:
        value = f"update {last.best}" if last.best else "before training"
        yield report.Verdict("Best", value, f"by {run.config['checkpoint.best']}", None)


def _warnings(run: Run) -> tuple[str, ...]:
    told = [f"After update {entry.step}: {text}" for entry in run.evaluations for text in entry.warnings]
    known = {text for entry in run.evaluations for text in entry.warnings}
    counts = [(line["step"], line.get("skipped", 0)) for line in run.metrics]
    if counts and counts[-1][1]:
        pairs = itertools.pairwise([(0, 0), *counts])
        steps = [str(now) for (_, before), (now, count) in pairs if count > before]
        told.append(
            f"Skipped, since numbers were not finite: {counts[-1][1]} in all, at last update {', '.join(steps[-10:])}. "
            "The inputs are in the folder nonfinite; --replay=STEP shows what was not finite first."
        )
    others = [
        f"{line.get('time', '')}: {line.get('text', '')}" for line in run.warnings if line.get("text") not in known
    ]
    if len(others) > SHOWN:
        others = [f"{len(others) - SHOWN} earlier warnings are in {WARNINGS}.", *others[-SHOWN:]]
    return (*told, *others)


def _cautions(run: Run) -> tuple[str, ...]:
    """What misleads in the figures of this page, as far as it applies."""
    if not run.evaluations:
        return ()
    notes = cautions.of_kinds({run.kind(name) for name in run.evaluations[-1].scores}, "page")
    if trained := [name for name in run.evaluations[-1].scores if name in run.rewards]:
        notes.append(cautions.trained_with(", ".join(trained), "this run"))
    if len(run.evaluations) > 1:
        notes.append(cautions.BEST_OF_MANY)
    if run.others:
        notes.append(
            f"{run.others} earlier evaluations are left out: of other prompts, noise, samplers or scores, they do not "
            "compare with these."
        )
    return tuple(notes)


# --- curves -----------------------------------------------------------------------------------------------------------


def _scores(run: Run) -> Iterator[report.Chart]:
    """Of the held-out prompts, evaluation by evaluation."""
    for name in dict.fromkeys(name for entry in run.evaluations for name in entry.scores):
        found = [(entry.step, entry.scores[name]) for entry in run.evaluations if name in entry.scores]
        own = "The run is trained with it. " if name in run.rewards else ""
        yield report.Chart(
            f"{name} of held-out prompts",
            f"{own}Means of {found[-1][1].n} pictures from the same noise, with 95 % intervals over prompts.",
            {name: [(step, figure.mean) for step, figure in found]},
            intervals={name: [(_number(figure.low), _number(figure.high)) for _, figure in found]},
        )


def _rewards(run: Run) -> Iterator[report.Chart]:
    """Of the pictures that were trained on, in every branch."""
    for end, title, text in (
        (metrics.REWARD, "Reward in training", "What each term of the method raises, on its own batches."),
        (metrics.CAPTION, "Plain reward in training", "Of the recovered pictures under their bare captions."),
    ):
        names = dict.fromkeys(name for line in run.metrics for name in line if name.endswith(end))
        yield _course(run, title, text, {name.removesuffix(end): name for name in names})


def _signals(run: Run) -> Iterator[report.Chart]:
    """Of collapse."""
    for name in dict.fromkeys(name for entry in run.evaluations for name in entry.signals):
        points = [(entry.step, entry.signals[name]) for entry in run.evaluations if name in entry.signals]
        yield report.Chart(name.replace("_", " ").capitalize(), SIGNALS.get(name, ""), {name: points})


def _progress(run: Run) -> Iterator[report.Chart]:
    """Of the updates themselves."""
    yield _course(run, "Loss", "Of the terms together.", {"loss": "loss"})
    yield _course(run, "Gradient norm", "Before clipping.", {"gradient norm": "grad_norm"})
    yield _course(run, "Seconds of an update", "", {"seconds": "step_seconds"})


def _course(run: Run, title: str, text: str, names: dict[str, str]) -> report.Chart:
    """A chart of metrics by the names of their lines."""
    each = -(-len(run.metrics) // POINTS)  # updates that a point stands for
    words = f" A point is the mean of {each} updates." if each > 1 else ""
    return report.Chart(title, f"{text}{words}".strip(), {
        shown: thinned([(line["step"], line[name]) for line in run.metrics if name in line], each)
        for shown, name in names.items()
    })  # fmt: skip


def thinned(points: Sequence[tuple[float, float]], each: int) -> list[tuple[float, float]]:
    """Means of so many points that follow each other, at the last one's place."""
    parts = [points[start : start + each] for start in range(0, len(points), max(each, 1))]
    return [(part[-1][0], float(np.mean([y for _, y in part]))) for part in parts]


def _is_drawn(chart: report.Chart) -> bool:
    return any(math.isfinite(y) for line in chart.series.values() for _, y in line)


# --- tables -----------------------------------------------------------------------------------------------------------


def _tables(run: Run) -> Iterator[report.PageTable]:
    if run.evaluations:
        names = list(dict.fromkeys(name for entry in run.evaluations for name in entry.scores))
        yield report.PageTable(
            "Evaluations",
            ("update", *names, "seconds"),
            tuple(
                (
                    f"{entry.step}{' (best)' if entry.step == run.evaluations[-1].best else ''}",
                    *(_figure(entry.scores.get(name)) for name in names),
                    ", ".join(f"{part} {seconds:.1f}" for part, seconds in entry.seconds.items()),
                )
                for entry in run.evaluations
            ),
            "Means, with 95 % intervals over prompts.",
        )
    plain = run.recipe.values if run.recipe else config_lib.flatten(config_lib.default())
    differs = [key for key in run.config if key not in plain or plain[key] != run.config[key]]
    yield report.PageTable(
        "What differs from its recipe" if run.recipe else "What differs from the defaults",
        ("key", "recipe" if run.recipe else "default", "this run"),
        tuple((key, _value(plain.get(key)), _value(run.config[key])) for key in differs),
        (f"The recipe is {run.recipe.file}." if run.recipe else "No recipe is known.")
        + ("" if differs else " Nothing differs."),
    )
    if run.changes:
        yield report.PageTable(
            "What was changed on the way",
            ("key", "after update", "from", "to", "time"),
            tuple(
                (
                    str(line.get("key")),
                    str(line.get("after_update")),
                    _value(line.get("from")),
                    _value(line.get("to")),
                    str(line.get("time")),
                )
                for line in run.changes
            ),
        )
    rows = tuple((key, _value(value)) for key, value in run.config.items())
    yield report.PageTable("Configuration", ("key", "value"), rows, folded=True)


# --- words ------------------------------------------------------------------------------------------------------------


def _moment(entry: Entry) -> str:
    return f"update {entry.step}" if entry.step else "before"


def _ends(figure: Figure) -> str:
    if figure.low is None or figure.high is None:
        return "no interval"
    return f"{figure.low:.4g} to {figure.high:.4g}"


def _figure(figure: Figure | None) -> str:
    return f"{figure.mean:.4g} ({_ends(figure)})" if figure else ""


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _value(value: Any) -> str:
    return json.dumps(value) if isinstance(value, list) else str(value)
