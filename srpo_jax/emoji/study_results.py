"""The study's findings: tables with intervals, and claims of the paper held to them."""

import dataclasses
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np
from ml_collections import ConfigDict

from srpo_jax import report
from srpo_jax.emoji import pictures, recovery, study_run, world
from srpo_jax.emoji.colour import chroma
from srpo_jax.emoji.recovery import DIRECT_ALIGN, ONE_STEP, Recovered
from srpo_jax.emoji.study_plan import BIASED, HONEST, RECOVERY, REWARDS, Case, Part, by_reward
from srpo_jax.emoji.study_run import Cell, Moment
from srpo_jax.evaluation import statistics
from srpo_jax.evaluation.statistics import Estimate

HEADER = ("case", "updates", "learning rate", "judged as wanted", "concept right", "chroma", "saturation", "diversity",
          "s an update", "runs")  # fmt: skip
COMPARED = ("images", "methods", "discounts")  # parts whose cases are set beside their first
INTERVALS = (
    "Means over the pictures of all runs, with 95 % intervals that draw the concepts again, all runs' pictures of a "
    "concept together; in brackets the lowest and the highest run."
)


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
    """A table for each part that has a run and each of its rewards, and for ``methods`` one for each moment too."""
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
        for title, cases, place in _tabled(part):
            if rows := tuple(row(found, case, place) for case in cases if found.cells[case.folder]):
                yield report.PageTable(title, HEADER, (*before, *rows), f"{part.text} {INTERVALS}")
                if part.name in COMPARED:
                    yield from _against_first(found, title, cases, place)


def titled(part: Part) -> Iterator[tuple[str, tuple[Case, ...]]]:
    """A part's cases by their reward, with the part's title, which names the reward where there are two."""
    groups = list(by_reward(part))
    for word, cases in groups:
        yield part.title if len(groups) == 1 else f"{part.title}, {word} reward", cases


def _tabled(part: Part) -> Iterator[tuple[str, tuple[Case, ...], int]]:
    """Titles of a part's tables, their cases, and the number of the moment that they show."""
    if part.name != "methods":
        yield from ((title, cases, -1) for title, cases in titled(part))
        return
    for word, cases in by_reward(part):
        for place, when in ((0, "at equal compute"), (-1, "longer")):
            yield f"Methods, {word} reward, {when}", cases, place


def _against_first(found: Findings, title: str, cases: Sequence[Case], place: int) -> Iterator[report.PageTable]:
    """Every case less the first one at their moments number ``place``, if there is anything to compare."""
    first, *rest = cases
    figures = ("wanted", "right", "chroma", "diversity")
    rows = []
    for case in rest:
        pairs = [paired(found, case, first, figure, place) for figure in figures]
        if None not in pairs:
            means = [statistics.mean(*pair) for pair in pairs]
            texts = [shown(mean, (), name in ("wanted", "right")) for name, mean in zip(figures, means, strict=True)]
            rows.append((case.name, *texts))
    if rows:
        header = ("case", "judged as wanted", "concept right", "chroma", "diversity")
        words = f"Mean paired differences to “{first.name}”: the same concept and noise, runs of the same seed."
        yield report.PageTable(f"{title}: differences", header, tuple(rows), words)


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


def paired(
    found: Findings, one: Case, other: Case, figure: str, place: int = -1
) -> tuple[np.ndarray, np.ndarray] | None:
    """A figure's differences ``[N]`` at moment number ``place`` of two cases, by runs of the same seed, and the
    pictures' concepts ``[N]``; "wanted" is what the first case wants. None if there is no such pair of runs."""
    runs, others = ({cell.seed: cell.moments[place] for cell in found.cells[case.folder]} for case in (one, other))
    seeds = sorted(runs.keys() & others.keys())
    if not seeds:
        return None
    parts = [values(runs[seed], figure, one.wanted) - values(others[seed], figure, one.wanted) for seed in seeds]
    return np.concatenate(parts), np.tile(places(len(parts[0]), len(found.concepts)), len(seeds))


def claims(found: Findings) -> Iterator[Claim]:
    """Those that can be held to what there is."""
    for text, pair, figure, sign in _compared(found):
        if None not in pair and (pairs := paired(found, *pair, figure)) is not None:
            yield Claim(f"{text}: {pair[0].name} minus {pair[1].name}", figure, *pairs, sign)
    for level in recovery.LEVELS:
        ways = {one.way: np.asarray(one.error) for one in found.recovered if one.level == level}
        if ways and level >= 0.9:
            text = f"Direct-Align recovers pictures where one step does not: error at {level:g}, Direct-Align minus it"
            difference = ways[DIRECT_ALIGN] - ways[ONE_STEP]
            yield Claim(text, "error", difference, places(len(difference), len(found.concepts)), -1)


def _compared(found: Findings) -> Iterator[tuple[str, tuple[Case | None, Case | None], str, int]]:
    """What is said of two cases, None for one that is not in the study; of which figure; and its sign."""
    cases = {(part.name, case.reward, case.name): case for part in found.parts for case in part.cases}

    def pair(part: str, reward: str, one: str, other: str) -> tuple[Case | None, Case | None]:
        return cases.get((part, reward, one)), cases.get((part, reward, other))

    for part, reward, name in cases:
        if part == "guard" and name.startswith("SRPO, k"):
            k = name.partition(", ")[2]
            words = "the inversion branch cancels what a reward likes whatever the words"
            yield words, pair(part, reward, name, f"SRPO without inversion, {k}"), "chroma", -1
            for other in ("Direct-Align", "ReFL"):
                yield f"SRPO is hacked less than {other}", pair(part, reward, name, f"{other}, {k}"), "chroma", -1
    steps = pair("levels", BIASED, "Direct-Align, steps 1 to 10", "Direct-Align, steps 40 to 49")
    yield "late steps (low noise) hack colour, early ones do not", steps, "chroma", -1
    if srpo := cases.get(("methods", BIASED, "srpo")):
        times = srpo.moments[-1] // srpo.moments[0]
        for other in ("direct_align", "refl"):
            text = f"SRPO is hacked less, each at its best learning rate, {times} times as long"
            yield text, pair("methods", BIASED, "srpo", other), "chroma", -1
    for word in ("Flat", "Mono"):
        first = next((name for part, _, name in cases if part == "words" and name.startswith(f"{word} against")), "")
        steered = pair("words", HONEST, first, "3D against Flat, Mono")
        yield f"words steer: “{word}” gives more of its style", steered, "wanted", 1
    for part, reward, name in cases:
        if part == "discounts" and name != "srpo":
            text = f"a larger discount of the denoising branch keeps what is drawn ({REWARDS[reward]} reward)"
            yield text, pair(part, reward, name, "srpo"), "right", 1


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


# --- markdown ---------------------------------------------------------------------------------------------------------


def markdown(found: Findings) -> str:
    """All tables, for docs/study.md."""
    lines = []
    verdicts = claim_table(found)
    for table in ([verdicts] if verdicts else []) + list(tables(found)):
        lines += [f"## {table.title}", "", table.text, "", f"| {' | '.join(table.header)} |"]
        lines += ["|" + "---|" * len(table.header), *(f"| {' | '.join(cells)} |" for cells in table.rows), ""]
    return "\n".join(lines)
