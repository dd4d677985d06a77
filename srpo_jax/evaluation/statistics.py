"""How sure a mean is: intervals that draw prompts again, paired differences, and win rates.

Scores of one prompt's pictures are alike, so prompts are what is counted and drawn again, each with all of its
pictures. Models are compared picture by picture: the same prompt from the same noise. Arrays alone.
"""

import math
from typing import NamedTuple

import numpy as np

DRAWS, SEED = 10_000, 0
LEVEL = 0.95
Z = 1.959963984540054  # of the normal distribution, two-sided at LEVEL


class Estimate(NamedTuple):
    """A figure with the ends of its interval."""

    value: float
    low: float
    high: float


class Comparison(NamedTuple):
    """A model against another one under one score.

    Attributes:
      difference: mean over pairs.
      strict: its interval at ``1 - (1 - LEVEL) / comparisons`` (Bonferroni): all of them hold together with LEVEL.
      wins: share of pairs with the higher score, ties half.
      pairs, prompts: how many.
    """

    difference: Estimate
    strict: Estimate
    wins: Estimate
    pairs: int
    prompts: int

    @property
    def verdict(self) -> str:
        """ "higher" or "lower" where the interval is clear of 0 whatever else was compared, "perhaps higher" or
        "perhaps lower" where only its own is, else "no difference seen"."""
        for interval, words in ((self.strict, ""), (self.difference, "perhaps ")):
            if interval.low > 0:
                return f"{words}higher"
            if interval.high < 0:
                return f"{words}lower"
        return "no difference seen"


def resampled_means(values: np.ndarray, prompts: np.ndarray, draws: int = DRAWS, seed: int = SEED) -> np.ndarray:
    """Means of so many samples that are drawn from the prompts with replacement, [draws].

    Args:
      values: [N], a number a picture.
      prompts: [N], which prompt each is of, any integers.
      seed: of what is drawn.
    """
    _, place = np.unique(prompts, return_inverse=True)
    sums = np.bincount(place, values)
    counts = np.bincount(place).astype(np.float64)
    generator, means = np.random.default_rng(seed), np.empty(draws)
    part = max(1, 2**22 // len(sums))  # draws at once, 32 MB of indices
    for start in range(0, draws, part):
        chosen = generator.integers(len(sums), size=(min(part, draws - start), len(sums)))
        means[start : start + part] = sums[chosen].sum(1) / counts[chosen].sum(1)
    return means


def interval(means: np.ndarray, value: float, level: float = LEVEL) -> Estimate:
    """The percentile interval of ``resampled_means`` around a mean."""
    tail = (1 - level) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Estimate(value, float(low), float(high))


def mean(values: np.ndarray, prompts: np.ndarray) -> Estimate:
    """The mean of pictures' scores [N], of ``prompts`` [N]. Of a single prompt there is no interval: it is infinite.

    Raises ValueError for no value.
    """
    values = np.asarray(values, np.float64)
    if not len(values):
        raise ValueError("no value")
    if len(np.unique(prompts)) == 1:
        return Estimate(float(values.mean()), -math.inf, math.inf)
    return interval(resampled_means(values, prompts), float(values.mean()))


def wilson(share: float, count: int) -> Estimate:
    """Wilson's interval of a share of ``count`` independent trials."""
    centre = (share + Z**2 / (2 * count)) / (1 + Z**2 / count)
    half = Z / (1 + Z**2 / count) * math.sqrt(share * (1 - share) / count + Z**2 / (4 * count**2))
    return Estimate(share, max(0.0, centre - half), min(1.0, centre + half))


def compare(differences: np.ndarray, prompts: np.ndarray, comparisons: int = 1) -> Comparison:
    """One model against another by the differences [N] of pairs, of ``prompts`` [N].

    The win rate's interval counts a prompt once, however many pictures it has, and so is rather too wide.
    ``comparisons`` is how many are looked at together. Raises ValueError for no pair.
    """
    differences = np.asarray(differences, np.float64)
    if not len(differences):
        raise ValueError("no pair")
    count, value = len(np.unique(prompts)), float(differences.mean())
    alone = strict = Estimate(value, -math.inf, math.inf)
    if count > 1:
        means = resampled_means(differences, prompts)
        alone, strict = interval(means, value), interval(means, value, 1 - (1 - LEVEL) / comparisons)
    share = float(np.mean((differences > 0) + 0.5 * (differences == 0)))
    return Comparison(alone, strict, wilson(share, count), len(differences), count)
