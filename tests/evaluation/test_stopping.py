"""The best update, patience and over-optimisation, from histories alone."""

import pytest

from srpo_jax.evaluation import stopping
from srpo_jax.evaluation.history import Entry, Figure
from srpo_jax.evaluation.stopping import Aim

MOST, LEAST = Aim("held", True), Aim("held", False)


def entries(*means, how="a", start=0, **more):
    found = []
    for place, mean in enumerate(means):
        scores = {"held": mean} | {name: values[place] for name, values in more.items()}
        figures = {name: Figure(value, None, None, 4) for name, value in scores.items()}
        found.append(Entry(start + 10 * place, how, figures, {}, {}, [], None))
    return found


def test_the_best_is_the_first_of_equals():
    assert stopping.best(entries(1.0, 3.0, 2.0, 3.0), MOST) == 10
    assert stopping.best(entries(2.0, 3.0, 1.0, 1.0), LEAST) == 20
    assert stopping.best(entries(1.0), Aim("other", True)) is None


def test_only_evaluations_of_one_kind_compare():
    mixed = [*entries(9.0, 1.0, how="b"), *entries(2.0, 3.0, 1.0, start=20)]
    assert stopping.best(mixed, MOST) == 30
    assert stopping.is_over(mixed, MOST, 1) and not stopping.is_over(mixed, MOST, 2)


def test_patience_counts_evaluations_since_the_best():
    history = entries(1.0, 3.0, 2.0, 3.0, 1.0)
    assert [stopping.is_over(history[:count], MOST, 3) for count in range(1, 6)] == [False] * 4 + [True]
    assert not stopping.is_over(history, MOST, 0)
    assert not stopping.is_over(entries(1.0, 1.0, 1.0), Aim("other", True), 1)


@pytest.mark.parametrize(
    ("own", "held", "is_warned"),
    [
        ((1, 2, 3), (3, 2, 1), True),
        ((9, 8, 9, 10), (0, 5, 4, 3), True),
        ((1, 2, 2), (3, 2, 1), False),
        ((1, 2, 3), (3, 2, 2), False),
        ((1, 3, 2), (3, 2, 1), False),
        ((1, 2), (3, 2), False),
    ],
)
def test_a_reward_that_rises_while_a_held_out_score_falls(own, held, is_warned):
    found = stopping.over_optimised(entries(*held, hps=own), ["hps"], ["held"])
    assert bool(found) == is_warned
    if found:
        last = 10 * (len(own) - 1)
        assert "hps" in found[0] and "held" in found[0] and f"at updates {last - 10} and {last}" in found[0]


def test_what_an_aim_is():
    assert stopping.parse("a:b:min") == Aim("a:b", False)
    for text in ("hps", "hps:most", ":max", "hps:max "):
        with pytest.raises(ValueError, match="write NAME:max or NAME:min"):
            stopping.parse(text)
