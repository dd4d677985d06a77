"""Intervals in cases whose answer is known without drawing anything."""

import math

import numpy as np
import pytest

from srpo_jax.evaluation import statistics


def test_means_of_two_prompts_are_drawn_as_they_can_be():
    """Of two prompts, a quarter of the samples has the first twice, a quarter the second, and half has both."""
    means = statistics.resampled_means(np.array([0.0, 1.0]), np.array([7, 3]))
    values, counts = np.unique(means, return_counts=True)
    np.testing.assert_array_equal(values, [0, 0.5, 1])
    np.testing.assert_allclose(counts / len(means), [0.25, 0.5, 0.25], atol=4 * math.sqrt(0.25 / len(means)))
    assert statistics.mean(np.array([0.0, 1.0]), np.array([7, 3])) == (0.5, 0.0, 1.0)


def test_the_interval_is_the_normal_one_where_there_are_many():
    values = np.random.default_rng(1).normal(3, 2, 2000)
    found = statistics.mean(values, np.arange(2000))
    half = statistics.Z * values.std() / math.sqrt(2000)
    assert found.value == pytest.approx(values.mean())
    np.testing.assert_allclose([found.value - found.low, found.high - found.value], half, rtol=0.06)


def test_pictures_of_a_prompt_go_together():
    """Ten copies of every prompt's picture are no news: the interval is that of one each."""
    values = np.random.default_rng(2).normal(size=40)
    one = statistics.mean(values, np.arange(40))
    ten = statistics.mean(np.repeat(values, 10), np.repeat(np.arange(40), 10))
    np.testing.assert_allclose(ten, one, rtol=1e-12)
    apart = statistics.mean(np.repeat(values, 10), np.arange(400))
    assert apart.high - apart.low < 0.4 * (one.high - one.low)


def test_a_mean_is_of_pictures_where_prompts_have_unlike_many():
    values, prompts = np.array([0.0, 0.0, 0.0, 4.0]), np.array([0, 0, 0, 1])
    assert statistics.mean(values, prompts) == (1.0, 0.0, 4.0)


@pytest.mark.parametrize(
    ("share", "count", "low", "high"),
    # By hand: the ends p solve (share - p)^2 = z^2 p (1 - p) / count.
    [(0.5, 10, 0.236593, 0.763407), (0.0, 10, 0.0, 0.277533), (1.0, 10, 0.722467, 1.0), (0.8, 100, 0.711173, 0.866634)],
)
def test_wilson(share, count, low, high):
    found = statistics.wilson(share, count)
    np.testing.assert_allclose(found, (share, low, high), atol=1e-5)
    for end in found[1:]:
        if 0 < end < 1:
            assert (share - end) ** 2 == pytest.approx(statistics.Z**2 * end * (1 - end) / count, abs=1e-9)


def test_wins_count_ties_half_and_prompts_once():
    found = statistics.compare(np.array([1.0, 1.0, 0.0, -1.0]), np.array([0, 0, 1, 1]))
    assert found.wins == statistics.wilson(0.625, 2)
    assert (found.pairs, found.prompts) == (4, 2)


def test_verdicts():
    generator = np.random.default_rng(3)
    noise, prompts = generator.normal(size=50), np.arange(50)
    noise -= noise.mean()
    error = noise.std() / math.sqrt(50)
    of = lambda shift, comparisons: statistics.compare(noise + shift * error, prompts, comparisons).verdict  # noqa: E731
    # Two-sided, 2.5 standard errors are beyond 1.96 of one comparison, not beyond 3.02 of twenty.
    assert of(4, 20) == "higher" and of(-4, 20) == "lower"
    assert of(2.5, 1) == "higher" and of(2.5, 20) == "perhaps higher" and of(-2.5, 20) == "perhaps lower"
    assert of(1, 1) == "no difference seen"


def test_one_prompt_says_nothing_of_others():
    found = statistics.compare(np.array([1.0, 2.0]), np.array([5, 5]))
    assert found.difference == (1.5, -math.inf, math.inf) and found.verdict == "no difference seen"
    assert statistics.mean(np.array([1.0, 3.0]), np.array([5, 5])) == (2.0, -math.inf, math.inf)


def test_the_same_numbers_every_time():
    values = np.random.default_rng(4).normal(size=30)
    assert statistics.mean(values, np.arange(30)) == statistics.mean(values.copy(), np.arange(30))


def test_nothing_is_no_mean():
    with pytest.raises(ValueError, match="no value"):
        statistics.mean(np.array([]), np.array([]))
    with pytest.raises(ValueError, match="no pair"):
        statistics.compare(np.array([]), np.array([]))
