"""The study's page: its tables, curves and pictures."""

from collections.abc import Iterator, Sequence

import numpy as np

from srpo_jax import report
from srpo_jax.emoji import results, study_run
from srpo_jax.emoji.recovery import DIRECT_ALIGN, ONE_STEP
from srpo_jax.emoji.study_plan import Case, Part
from srpo_jax.emoji.study_results import Findings, claim_table, estimate, places, tables, titled
from srpo_jax.evaluation import statistics
from srpo_jax.evaluation.statistics import Estimate

COLUMNS = 7  # cases of a gallery


def page(found: Findings) -> report.Report:
    """The report of all that is there."""
    done = sum(map(len, found.cells.values()))
    verdicts = claim_table(found)
    curves = tuple(charts(found))
    return report.Report(
        title="Direct-gradient methods on a small FLUX",
        lead=(
            f"{done} runs, judged on pictures of {len(found.concepts)} held-out concepts from the same noise, by a "
            "judge that nothing was trained against. Chroma is how colourful pictures are, which one of the two "
            "rewards likes under every caption: what a run has of it beyond the artists' pictures is a hack."
        ),
        parts=(
            *([verdicts] if verdicts else []),
            *([report.Charts(curves)] if curves else []),
            *tables(found),
            *galleries(found),
            report.PageTable("Environment", ("part", "version"), tuple(results.environment().items()), folded=True),
        ),
    )


def charts(found: Findings) -> Iterator[report.Chart]:
    """Recovery over noise levels, the guard over discounts, methods over updates' compute."""
    if found.recovered:
        yield from _over_levels(found)
    for part in found.parts:
        if part.name == "guard":
            yield from _over_discounts(found, part)
        if part.name in ("methods", "discounts"):  # runs that are judged on their way
            for title, cases in titled(part):
                for start in range(0, len(cases), len(report.COLOURS)):
                    chosen = cases[start : start + len(report.COLOURS)]
                    yield from _over_compute(found, title, chosen, part.cases[0].moments[0])


def _chart(
    title: str, text: str, lines: dict[str, list[tuple[float, Estimate]]], x_label: str, percent: bool
) -> report.Chart:
    """Lines of estimates with their intervals."""
    series = {name: [(x, mean.value) for x, mean in line] for name, line in lines.items()}
    intervals = {name: [(mean.low, mean.high) for _, mean in line] for name, line in lines.items()}
    return report.Chart(title, text, series, x_label, percent=percent, intervals=intervals)


def _over_levels(found: Findings) -> Iterator[report.Chart]:
    for figure, words in (("error", "error"), ("right", "concept right")):
        lines = {}
        for way in (ONE_STEP, DIRECT_ALIGN):
            of_way = [one for one in found.recovered if one.way == way]
            place = places(len(of_way[0].error), len(found.concepts))
            lines[way] = [(100 * one.level, statistics.mean(np.asarray(getattr(one, figure)), place)) for one in of_way]
        yield _chart(f"Recovery: {words}", "95 % intervals.", lines, "noise level, %", figure == "right")


def _over_discounts(found: Findings, part: Part) -> Iterator[report.Chart]:
    members: dict[str, list[tuple[float, Case]]] = {}
    for case in part.cases:
        name, _, k = case.name.partition(", k = ")
        if k and found.cells[case.folder]:
            members.setdefault(name, []).append((100 * float(k), case))
    for figure, words in (("chroma", "chroma"), ("wanted", "judged 3D"), ("right", "concept right")):
        lines = {}
        for name, of in members.items():
            ends = [
                (k, [cell.moments[-1] for cell in found.cells[case.folder]])
                for k, case in sorted(of, key=lambda member: member[0])
            ]
            lines[name] = [(k, estimate(moments, figure, ("3D",), len(found.concepts))) for k, moments in ends]
        if lines:
            text = "Under the reward that likes colour, 95 % intervals."
            yield _chart(f"Guard: {words}", text, lines, "discount k, %", figure != "chroma")


def _over_compute(found: Findings, title: str, cases: Sequence[Case], unit: int) -> Iterator[report.Chart]:
    """The figures along runs, in updates of SRPO, of which ``unit`` cost as much as a case's first moment."""
    count, cases = len(found.concepts), [case for case in cases if found.cells[case.folder]]
    for figure, words in (("right", "concept right"), ("chroma", "chroma"), ("wanted", "judged 3D")):
        lines = {}
        for case in cases:
            along = [[cell.moments[place] for cell in found.cells[case.folder]] for place in range(len(case.moments))]
            means = [estimate(several, figure, case.wanted, count) for several in ([found.before], *along)]
            steps = [step * unit / case.moments[0] for step in (0, *case.moments)]
            lines[case.name] = list(zip(steps, means, strict=True))
        if lines:
            text = "Over compute, in updates of SRPO."
            yield _chart(f"{title}: {words}", text, lines, "update", figure != "chroma")


def galleries(found: Findings) -> Iterator[report.Gallery]:
    """A picture of some concepts from the same noise by each case of a part, with the first seed."""
    names = [found.concepts[place].caption for place in study_run.shown(len(found.concepts))]
    first = found.out / "cells" / "before.npy"
    for title, cases in (group for part in found.parts for group in titled(part)):
        files = [(case.name, found.out / "cells" / case.folder / "0.npy") for case in cases]
        here = [(name, file) for name, file in files if file.exists()]
        for start in range(0, len(here), COLUMNS):
            columns = {"before": np.load(first)[-1]}
            columns |= {name: np.load(file)[-1] for name, file in here[start : start + COLUMNS]}
            yield report.Gallery(
                f"Pictures: {title.lower()}",
                "Held-out concepts, bare names, the same noise in every column, after the last update.",
                tuple(columns),
                tuple(
                    report.Comparison(name, tuple((report.Shown(column[row]),) for column in columns.values()))
                    for row, name in enumerate(names)
                ),
                folded=True,
            )
