"""The arithmetic of the semantic relative preference, and of mixtures of rewards."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from srpo_jax.algorithm import preference


def test_control_words_go_round_from_step_one():
    words = [preference.control_words(n, ("a", "b"), ("x", "y", "z")) for n in (1, 2, 3, 4)]
    assert words == [("b", "y"), ("a", "z"), ("b", "x"), ("a", "y")]


def test_captions():
    found = preference.captions(["a red fox", "an owl"], ("Oil", "Flat"))
    assert found == {
        "positive": ["Oil. a red fox", "Oil. an owl"],
        "negative": ["Flat. a red fox", "Flat. an owl"],
        "caption": ["a red fox", "an owl"],
    }


def test_forms_of_the_relative_reward():
    k = jnp.array([0.25])
    assert preference.relative("a", "b", k, "released") == {"a": 1.25, "b": -1.0}
    assert preference.relative("b", "a", k, "paper") == {"b": 0.25, "a": 0.75}
    with pytest.raises(ValueError, match="form"):
        preference.relative("a", "b", k, "other")


def test_hinge_stops_at_the_margin():
    rewards = jnp.array([0.0, 0.69, 0.71])
    np.testing.assert_allclose(preference.hinge(rewards, 0.7), [0.7, 0.01, 0.0], atol=1e-6)
    np.testing.assert_allclose(jax.vmap(jax.grad(lambda r: preference.hinge(r, 0.7)))(rewards), [-1, -1, 0])


@dataclasses.dataclass
class Product:
    """A reward that reads picture and caption together: the product of both means and a parameter."""

    weight: float

    def prepare(self, params, tokens):
        return tokens.astype(jnp.float32).mean(-1)

    def look(self, params, images):
        return images.mean((1, 2, 3))

    def score(self, params, seen, prepared):
        return params * seen * prepared


def test_a_mixture_weighs_rewards_and_variants():
    scorers, params = {"one": Product(1.0), "two": Product(2.0)}, {"one": jnp.float32(1), "two": jnp.float32(10)}
    ids = {"positive": jnp.array([[1, 3]]), "negative": jnp.array([[5, 5]])}
    prepared = preference.prepare(scorers, params, {"one": ids, "two": ids})
    seen = preference.look(scorers, params, jnp.full((1, 2, 2, 3), 0.5))
    given = scorers, params, seen, prepared
    plus = preference.mixture(*given, {"positive": jnp.array([1.0])})
    np.testing.assert_allclose(plus, [0.5 * 2 * (1 + 20)])
    both = preference.mixture(*given, {"positive": jnp.array([1.25]), "negative": jnp.array([-1.0])})
    np.testing.assert_allclose(both, [0.5 * (1.25 * 2 - 5) * (1 + 20)])
