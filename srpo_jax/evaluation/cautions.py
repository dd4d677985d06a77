"""What misleads in the figures of scores, said wherever they are printed."""

from collections.abc import Collection

from srpo_jax.evaluation.scoring import SGP

ELSEWHERE = (
    "Compare figures of one {place} only. Other prompts, sizes and steps give other means: FLUX.1-dev as it is reads "
    ".289, .302 and .308 under HPS-v2.1 in three papers."
)
HPS = (
    "HPS-v2.1 does not show what SRPO does: in its paper the model reads .289 before and .289 after, while people call "
    "38.9 % of its pictures excellent in realism, and 8.2 % of FLUX.1-dev's. No reward in that table predicts what "
    "people said. A fall is a warning, no rise is no failure: look at the pictures."
)
SGP_HPS = (
    "SGP-HPS as the paper prints it, .463 and .505, is not reproducible: its scale and what joins the prefixes to a "
    "caption are not published. These figures compare with each other alone."
)
BEST_OF_MANY = (
    "Checkpoints of one run are alike, and the best of many looks better than it is: fix the rule by which one is "
    "chosen beforehand, or judge the chosen one on other prompts."
)


def trained_with(score: str, who: str) -> str:
    """For a score that a model, or a run, was trained with."""
    return (
        f"{score} is what {who} trained with: it may rise while pictures get worse. Scores that nothing was trained "
        "with decide."
    )


def of_kinds(kinds: Collection[str], place: str) -> list[str]:
    """For scores of these kinds that are printed together in a ``place``, as "page"."""
    notes = [ELSEWHERE.format(place=place)] if kinds else []
    return notes + [words for kind, words in (("hps", HPS), (SGP, SGP_HPS)) if kind in kinds]
