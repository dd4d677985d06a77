"""The study's findings: tables with intervals, claims of the paper held to them, curves and pictures on a page."""

import dataclasses
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np
from ml_collections import ConfigDict

from srpo_jax import report
from srpo_jax.emoji import pictures, recovery, results, study_run, world
from srpo_jax.emoji.colour import chroma
from srpo_jax.emoji.recovery import DIRECT_ALIGN, ONE_STEP, Recovered
from srpo_jax.emoji.study_plan import BIASED, HONEST, RECOVERY, Case, Part
from srpo_jax.emoji.study_run import Cell, Moment
from srpo_jax.evaluation import statistics
from srpo_jax.evaluation.statistics import Estimate

HEADER = ("case", "updates", "learning rate", "judged as wanted", "concept right", "chroma", "saturation", "diversity",
          "s an update", "runs")  # fmt: skip
INTERVALS = (
    "Means over the pictures of all runs, with 95 % intervals that draw the concepts again, all runs' pictures of a "
    "concept together; in brackets the lowest and the highest run."
)
COLUMNS = 7  # cases of a gallery


@dataclasses.dataclass(frozen=True)
class Findings:
    """What there is so far.

    Attributes:
      config: the recipe that cases change.
      concepts: held-out ones that were drawn.
      parts: all of the study.
      before: of the shipped model.
      cells: by a case's folder, the runs that are done.
      recovered: of part ``RECOVERY``; empty if it was not done.
      out: folder of the study, for the cells' pictures.
    """

    config: ConfigDict
    concepts: Sequence[world.Concept]
    parts: tuple[Part, ...]
    before: Moment
    cells: dict[str, list[Cell]]
    recovered: list[Recovered]
    out: pathlib.Path


def line(case: Case, cell: Cell, before: Moment) -> str:
    """A cell's last moment in a line, and the chroma's change."""
    last = cell.moments[-1]
    return (
        f"wanted {study_run.share(last, case.wanted):.0%}, concept right {np.mean(last.right):.0%}, "
        f"chroma {np.mean(last.chroma):.3f} (before: {np.mean(before.chroma):.3f})"
    )


# --- figures ----------------------------------------------------------------------------------------------------------


def values(moment: Moment, figure: str, wanted: Sequence[str]) -> np.ndarray:
    """A figure of every picture; "wanted" is 1 where its style is."""
    return study_run.in_style(moment, wanted) if figure == "wanted" else np.asarray(getattr(moment, figure))


def places(pictures: int, concepts: int) -> np.ndarray:
    """The number of each picture's concept, of so many pictures that lie concept by concept."""
    return np.repeat(np.arange(concepts), pictures // concepts)


def estimate(moments: Sequence[Moment], figure: str, wanted: Sequence[str], concepts: int) -> Estimate:
    """The mean over the pictures of several runs' moments, with its interval."""
    found = [values(moment, figure, wanted) for moment in moments]
    return statistics.mean(np.concatenate(found), np.tile(places(len(found[0]), concepts), len(found)))


def shown(found: Estimate, runs: Sequence[float], percent: bool) -> str:
    """ "0.214 [0.190, 0.240] (0.210 to 0.220)"."""

    def number(value: float) -> str:
        return f"{100 * value:.1f}" if percent else f"{value:.3f}"

    text = number(found.value) + (" %" if percent else "")
    if np.isfinite(found.low):
        text += f" [{number(found.low)}, {number(found.high)}]"
    return text + (f" ({number(min(runs))} to {number(max(runs))})" if len(runs) > 1 else "")


def cell_texts(moments: Sequence[Moment], wanted: Sequence[str], concepts: int) -> list[str]:
    """The figures of a row."""
    return [
        shown(
            estimate(moments, figure, wanted, concepts),
            [float(np.mean(values(moment, figure, wanted))) for moment in moments],
            figure in ("wanted", "right"),
        )
        for figure in ("wanted", "right", "chroma", "saturation", "diversity")
    ]


def row(found: Findings, case: Case, place: int) -> tuple[str, ...]:
    """The row of a case at its moment number ``place``."""
    cells = found.cells[case.folder]
    texts = cell_texts([cell.moments[place] for cell in cells], case.wanted, len(found.concepts))
    seconds = np.mean([cell.update_seconds for cell in cells])
    rates = ", ".join(f"{rate:g}" for rate in sorted({cell.rate for cell in cells}))
    return (case.name, str(case.moments[place]), rates, *texts, f"{seconds:.2f}", str(len(cells)))


def tables(found: Findings) -> Iterator[report.PageTable]:
    """A table for each part that has a run, and for ``methods`` one for each reward and moment."""
    count = len(found.concepts)
    artists = chroma(pictures.load(found.concepts, ["3D"])[0] / np.float32(255))
    before = (
        ("before", "0", "", *cell_texts([found.before], ("3D",), count), "", "1"),
        ("the artists' 3D pictures", "", "", "", "", f"{np.mean(artists):.3f}", "", "", "", ""),
    )
    for part in found.parts:
        if part.name == RECOVERY:
            if found.recovered:
                yield _recovery_table(found, part)
            continue
        cases = [case for case in part.cases if found.cells[case.folder]]
        if not cases:
            continue
        if part.name != "methods":
            yield report.PageTable(
                part.title, HEADER, (*before, *(row(found, case, -1) for case in cases)), f"{part.text} {INTERVALS}"
            )
            if part.name == "images" and (differences := _against_first(found, part)):
                yield differences
            continue
        for reward in (HONEST, BIASED):
            of_reward = [case for case in cases if case.reward == reward]
            for place, when in ((0, "at equal compute"), (-1, "longer")):
                if of_reward:
                    rows = tuple(row(found, case, place) for case in of_reward)
                    title = f"Methods, {'honest' if reward == HONEST else 'biased'} reward, {when}"
                    yield report.PageTable(title, HEADER, (*before, *rows), f"{part.text} {INTERVALS}")


def _against_first(found: Findings, part: Part) -> report.PageTable | None:
    """Every case of a part less its first one; None if there is nothing to compare."""
    first, *rest = part.cases
    figures = ("wanted", "right", "chroma", "diversity")
    pairs = [(case, [paired(found, case, first, figure) for figure in figures]) for case in rest]
    rows = []
    for case, of in pairs:
        if None not in of:
            means = [statistics.mean(*pair) for pair in of]
            texts = [shown(mean, (), name in ("wanted", "right")) for name, mean in zip(figures, means, strict=True)]
            rows.append((case.name, *texts))
    header = ("case", "judged as wanted", "concept right", "chroma", "diversity")
    words = f"Mean paired differences to “{first.name}”: the same concept from the same noise, runs of the same seed."
    return report.PageTable(f"{part.title}: differences", header, tuple(rows), words) if rows else None


def _recovery_table(found: Findings, part: Part) -> report.PageTable:
    rows = []
    for one in found.recovered:
        place = places(len(one.error), len(found.concepts))
        texts = [
            shown(statistics.mean(np.asarray(numbers), place), (), percent)
            for numbers, percent in ((one.error, False), (one.right, True), (one.styled, True))
        ]
        rows.append((f"{one.level:g}", one.way, *texts))
    return report.PageTable(
        part.title,
        ("noise level", "way", "error", "concept right", "judged 3D"),
        tuple(rows),
        f"{part.text} Direct-Align's step is {recovery.stride(found.config):.4f} of sigma, as in the recipe. Error: "
        "root mean squared difference of pixels to what the autoencoder makes of the picture itself.",
    )


# --- claims -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Claim:
    """What the paper says, and the paired differences ``[N]`` of pictures of ``concepts`` ``[N]`` that it is held to;
    ``sign`` is what it says of them."""

    text: str
    figure: str
    differences: np.ndarray
    concepts: np.ndarray
    sign: int


def paired(found: Findings, one: Case, other: Case, figure: str) -> tuple[np.ndarray, np.ndarray] | None:
    """A figure's differences ``[N]`` at the end of two cases, by runs of the same seed, and the pictures' concepts
    ``[N]``; "wanted" is what the first case wants. None if there is no such pair of runs."""
    runs, others = ({cell.seed: cell.moments[-1] for cell in found.cells[case.folder]} for case in (one, other))
    seeds = sorted(runs.keys() & others.keys())
    if not seeds:
        return None
    parts = [values(runs[seed], figure, one.wanted) - values(others[seed], figure, one.wanted) for seed in seeds]
    return np.concatenate(parts), np.tile(places(len(parts[0]), len(found.concepts)), len(seeds))


def claims(found: Findings) -> Iterator[Claim]:
    """Those that can be held to what there is."""
    by_name = {(part.name, case.name): case for part in found.parts for case in part.cases}
    count = len(found.concepts)
    wanted: list[tuple[str, str, str, str, str, int]] = []
    for name in dict.fromkeys(case.name for part in found.parts if part.name == "guard" for case in part.cases):
        if name.startswith("SRPO, k"):
            k = name.partition(", ")[2]
            words = "the inversion branch cancels what a reward likes whatever the words"
            wanted.append((words, "guard", name, f"SRPO without inversion, {k}", "chroma", -1))
            for other in ("Direct-Align", "ReFL"):
                wanted.append((f"SRPO is hacked less than {other}", "guard", name, f"{other}, {k}", "chroma", -1))
    late = "late steps (low noise) hack colour, early ones do not"
    wanted.append((late, "levels", "Direct-Align, steps 1 to 10", "Direct-Align, steps 40 to 49", "chroma", -1))
    for word, other in (("Flat", "3D against Flat, Mono"), ("Mono", "3D against Flat, Mono")):
        first = next((name for part, name in by_name if part == "words" and name.startswith(f"{word} against")), "")
        wanted.append((f"words steer: “{word}” gives more of its style", "words", first, other, "wanted", 1))
    for text, part, first, second, figure, sign in wanted:
        cases = [by_name.get((part, name)) for name in (first, second)]
        if None not in cases and (pairs := paired(found, *cases, figure)) is not None:
            yield Claim(f"{text}: {first} minus {second}", figure, *pairs, sign)
    for level in recovery.LEVELS:
        ways = {one.way: np.asarray(one.error) for one in found.recovered if one.level == level}
        if ways and level >= 0.9:
            text = f"Direct-Align recovers pictures where one step does not: error at {level:g}, Direct-Align minus it"
            difference = ways[DIRECT_ALIGN] - ways[ONE_STEP]
            yield Claim(text, "error", difference, places(len(difference), count), -1)


def claim_table(found: Findings) -> report.PageTable | None:
    """The claims with their verdicts; None if there is nothing yet to hold them to."""
    held = list(claims(found))
    rows = []
    for claim in held:
        compared = statistics.compare(claim.differences, claim.concepts, len(held))
        difference, strict = compared.difference, compared.strict
        agrees = "no difference seen"
        if strict.low > 0 or strict.high < 0:
            agrees = "agrees" if np.sign(difference.value) == claim.sign else "disagrees"
        elif difference.low > 0 or difference.high < 0:
            agrees = "perhaps " + ("agrees" if np.sign(difference.value) == claim.sign else "disagrees")
        rows.append((claim.text, claim.figure, shown(difference, (), False), agrees))
    if not rows:
        return None
    text = (
        "Mean paired differences: the same concept from the same noise, by runs of the same seed. “perhaps”: its own "
        "interval is clear of 0, but not the one that allows for all claims looked at together."
    )
    return report.PageTable(
        "What the paper says, held to this world", ("claim", "figure", "difference", ""), tuple(rows), text
    )


# --- the page ---------------------------------------------------------------------------------------------------------


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
    count = len(found.concepts)
    if found.recovered:
        for title, figure in (("Recovery: error", "error"), ("Recovery: concept right", "right")):
            series, bars = {}, {}
            for way in (ONE_STEP, DIRECT_ALIGN):
                of_way = [one for one in found.recovered if one.way == way]
                place = places(len(of_way[0].error), count)
                means = [statistics.mean(np.asarray(getattr(one, figure)), place) for one in of_way]
                series[way] = [(100 * one.level, mean.value) for one, mean in zip(of_way, means, strict=True)]
                bars[way] = [(mean.low, mean.high) for mean in means]
            yield report.Chart(
                title, "95 % intervals.", series, "noise level, %", percent=figure == "right", intervals=bars
            )
    for part in found.parts:
        if part.name == "guard":
            yield from _over_discounts(found, part)
        if part.name == "methods":
            for reward in (HONEST, BIASED):
                cases = [case for case in part.cases if case.reward == reward]
                for start in range(0, len(cases), len(report.COLOURS)):
                    yield from _over_compute(
                        found, cases[start : start + len(report.COLOURS)], part.cases[0].moments[0]
                    )


def _over_discounts(found: Findings, part: Part) -> Iterator[report.Chart]:
    count = len(found.concepts)
    lines: dict[str, list[tuple[float, Case]]] = {}
    for case in part.cases:
        name, _, k = case.name.partition(", k = ")
        if k and found.cells[case.folder]:
            lines.setdefault(name, []).append((100 * float(k), case))
    for figure, words in (("chroma", "chroma"), ("wanted", "judged 3D"), ("right", "concept right")):
        series, bars = {}, {}
        for name, members in lines.items():
            members = sorted(members, key=lambda member: member[0])
            moments = [[cell.moments[-1] for cell in found.cells[case.folder]] for _, case in members]
            means = [estimate(several, figure, ("3D",), count) for several in moments]
            series[name] = [(k, mean.value) for (k, _), mean in zip(members, means, strict=True)]
            bars[name] = [(mean.low, mean.high) for mean in means]
        if series:
            text = "Under the reward that likes colour, 95 % intervals."
            yield report.Chart(
                f"Guard: {words}", text, series, "discount k, %", percent=figure != "chroma", intervals=bars
            )


def _over_compute(found: Findings, cases: Sequence[Case], unit: int) -> Iterator[report.Chart]:
    """The figures along runs, in updates of SRPO, of which ``unit`` cost as much as a case's first moment."""
    count, cases = len(found.concepts), [case for case in cases if found.cells[case.folder]]
    for figure, words in (("right", "concept right"), ("chroma", "chroma"), ("wanted", "judged 3D")):
        series, bars = {}, {}
        for case in cases:
            along = [[cell.moments[place] for cell in found.cells[case.folder]] for place in range(len(case.moments))]
            means = [estimate(several, figure, case.wanted, count) for several in ([found.before], *along)]
            steps = [step * unit / case.moments[0] for step in (0, *case.moments)]
            series[case.name] = [(step, mean.value) for step, mean in zip(steps, means, strict=True)]
            bars[case.name] = [(mean.low, mean.high) for mean in means]
        if series:
            name = "honest" if cases[0].reward == HONEST else "biased"
            yield report.Chart(
                f"{words}, {name} reward", "Over compute, in updates of SRPO.", series,
                percent=figure != "chroma", intervals=bars,
            )  # fmt: skip


def galleries(found: Findings) -> Iterator[report.Gallery]:
    """A picture of some concepts from the same noise by each case of a part, with the first seed."""
    names = [found.concepts[place].caption for place in study_run.shown(len(found.concepts))]
    first = found.out / "cells" / "before.npy"
    for part in found.parts:
        files = {case.name: found.out / "cells" / case.folder / "0.npy" for case in part.cases}
        here = {f"{name}": file for name, file in files.items() if file.exists()}
        for start in range(0, len(here), COLUMNS):
            chosen = dict(list(here.items())[start : start + COLUMNS])
            columns = {"before": np.load(first)[-1]} | {name: np.load(file)[-1] for name, file in chosen.items()}
            yield report.Gallery(
                f"Pictures: {part.title.lower()}",
                "Held-out concepts, bare names, the same noise in every column, after the last update.",
                tuple(columns),
                tuple(
                    report.Comparison(name, tuple((report.Shown(column[row]),) for column in columns.values()))
                    for row, name in enumerate(names)
                ),
                folded=True,
            )


# --- markdown ---------------------------------------------------------------------------------------------------------


def markdown(found: Findings) -> str:
    """All tables, for docs/study.md."""
    lines = []
    verdicts = claim_table(found)
    for table in ([verdicts] if verdicts else []) + list(tables(found)):
        lines += [f"## {table.title}", "", table.text, "", f"| {' | '.join(table.header)} |"]
        lines += ["|" + "---|" * len(table.header), *(f"| {' | '.join(cells)} |" for cells in table.rows), ""]
    return "\n".join(lines)
