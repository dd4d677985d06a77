"""SRPO's semantic relative preference: rewards under a wanted and an unwanted caption, and the loss that follows.

A reward scores an image under a caption, ``r(x, c) -> [B]``. Both forms of the relative reward are linear in plain
rewards, ``(1 + k) r(x, c+) - r(x, c-)``, so that what a step follows is a coefficient for every variant of the caption,
whatever the reward model is. Arrays and callables: this page knows no network.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp

# Variants of a prompt that rewards read: under the wanted control word, under the unwanted one, and as it is.
POSITIVE, NEGATIVE, CAPTION = VARIANTS = ("positive", "negative", "caption")

Coefficients = dict[str, jax.Array]  # by variant, [B]
Prepared = dict[str, dict[str, Any]]  # by reward, by variant: what ``Scorer.prepare`` made of the captions


class Scorer(Protocol):
    """What an update asks of a reward model; see ``rewards.base.Reward`` for the whole of it.

    ``weight`` is its share in a mixture. ``prepare(params, tokens)`` reads captions, ``look(params, images)`` images
    ``[B, H, W, 3]`` in [0, 1], and ``score(params, seen, prepared) -> [B]`` puts the two together.
    """

    weight: float

    def prepare(self, params: Any, tokens: Any) -> Any: ...

    def look(self, params: Any, images: jax.Array) -> Any: ...

    def score(self, params: Any, seen: Any, prepared: Any) -> jax.Array: ...


# --- captions ---------------------------------------------------------------------------------------------------------


def control_words(step: int, positive: tuple[str, ...], negative: tuple[str, ...]) -> tuple[str, str]:
    """The pair of control words of a step; steps count from 1 and go round both lists."""
    return positive[step % len(positive)], negative[step % len(negative)]


def prefixed(word: str, caption: str) -> str:
    """A caption under a control word: ``"<word>. <caption>"``."""
    return f"{word}. {caption}"


def captions(prompts: list[str], words: tuple[str, str]) -> dict[str, list[str]]:
    """Every variant of prompts, under a pair of control words (wanted, unwanted)."""
    return {
        POSITIVE: [prefixed(words[0], prompt) for prompt in prompts],
        NEGATIVE: [prefixed(words[1], prompt) for prompt in prompts],
        CAPTION: list(prompts),
    }


# --- what a step follows ----------------------------------------------------------------------------------------------


def relative(plus: str, minus: str, discount: jax.Array, form: str) -> Coefficients:
    """The coefficients of the semantic relative reward (arXiv 2509.06942).

    Args:
      plus, minus: the variants that are wanted and unwanted.
      discount: k, ``[B]``.
      form: "released", ``(1 + k) r(plus) - r(minus)``, or "paper", ``k r(plus) + (1 - k) r(minus)``.
    """
    if form == "released":
        return {plus: 1 + discount, minus: -jnp.ones_like(discount)}
    if form == "paper":
        return {plus: discount, minus: 1 - discount}
    raise ValueError(f"reward.form={form!r} is unknown; choose released or paper")


def plain(batch: int) -> Coefficients:
    """The coefficients of the plain reward of the caption."""
    return {CAPTION: jnp.ones((batch,), jnp.float32)}


def target(kind: str, batch: int, discount: float, form: str) -> Coefficients:
    """What methods follow that have no pair of steps: the plain reward of the caption ("caption"), or the relative one
    ("relative") with ``discount`` for k."""
    if kind == "relative":
        return relative(POSITIVE, NEGATIVE, jnp.full(batch, discount, jnp.float32), form)
    return plain(batch)


def hinge(reward: jax.Array, threshold: float) -> jax.Array:
    """``relu(threshold - reward)``: no gradient once the reward is high enough."""
    return jax.nn.relu(threshold - reward)


# --- mixtures ---------------------------------------------------------------------------------------------------------


def prepare(
    scorers: Mapping[str, Scorer], params: Mapping[str, Any], tokens: Mapping[str, Mapping[str, Any]]
) -> Prepared:
    """What every reward of a mixture makes of every variant of the captions."""
    return {
        name: {variant: scorer.prepare(params[name], ids) for variant, ids in tokens[name].items()}
        for name, scorer in scorers.items()
    }


def look(scorers: Mapping[str, Scorer], params: Mapping[str, Any], images: jax.Array) -> dict[str, Any]:
    """What every reward of a mixture sees in images ``[B, H, W, 3]`` in [0, 1]."""
    return {name: scorer.look(params[name], images) for name, scorer in scorers.items()}


def mixture(
    scorers: Mapping[str, Scorer],
    params: Mapping[str, Any],
    seen: Mapping[str, Any],
    prepared: Prepared,
    coefficients: Coefficients,
) -> jax.Array:
    """The weighted sum ``[B]`` over rewards and variants; a variant without coefficient is not scored."""
    total: Any = 0.0
    for name, scorer in scorers.items():
        for variant, coefficient in coefficients.items():
            score = scorer.score(params[name], seen[name], prepared[name][variant])
            total = total + scorer.weight * coefficient * score
    return total
