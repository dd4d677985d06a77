"""FlowBP-Lagrange (arXiv 2606.11075): two segments of the rollout, each integrated by quadrature on a few of its steps.

A segment of steps a .. b - 1 is the integral of the velocity over the noise level; the polynomial through the
velocities at its supports is integrated instead, and the first two supports carry the gradient. With one support each,
the segments are LeapAlign's leaps.
"""

import jax
import jax.numpy as jnp
import numpy as np

from srpo_jax.algorithm import flow
from srpo_jax.algorithm.batch import Images
from srpo_jax.algorithm.passes import Chain, KeyFor, Shape, chain, drawn, leap_weight, levels, one_hot
from srpo_jax.algorithm.settings import Settings

# --- segments and their weights ---------------------------------------------------------------------------------------


def supports(first: int, end: int, order: int) -> list[int]:
    """The steps of ``first .. end - 1`` on which a segment is integrated: all, or ``order`` evenly spaced ones."""
    if end - first <= order:
        return list(range(first, end))
    return [first + round(offset) for offset in np.linspace(0, end - 1 - first, order)]


def weights(sigmas: np.ndarray, first: int, end: int, support: list[int]) -> np.ndarray:
    """The integrals of the Lagrange basis on ``support`` from ``sigmas[first]`` to ``sigmas[end]``, float64.

    They integrate polynomials in sigma of a degree below the number of supports exactly, and sum to the difference of
    the two noise levels.
    """
    start, length = np.float64(sigmas[first]), np.float64(sigmas[end]) - np.float64(sigmas[first])
    places = (np.asarray(sigmas, np.float64)[support] - start) / length  # from 0, at the start, to below 1
    powers = np.arange(len(support))
    return length * np.linalg.solve(places ** powers[:, None], 1 / (powers + 1))


def tables(sigmas: np.ndarray, order: int) -> tuple[np.ndarray, np.ndarray]:
    """``supports`` (int32) and ``weights`` (float32) of every segment, ``[S, S + 1, order]`` by its first step and its
    end; zeros where there are fewer."""
    steps = len(sigmas) - 1
    places, integrals = np.zeros((steps, steps + 1, order), np.int32), np.zeros((steps, steps + 1, order), np.float32)
    for first in range(steps):
        for end in range(first + 1, steps + 1):
            support = supports(first, end, order)
            places[first, end, : len(support)] = support
            integrals[first, end, : len(support)] = weights(sigmas, first, end, support)
    return places, integrals


# --- draws ------------------------------------------------------------------------------------------------------------


def split_steps(shares: jax.Array, steps: int) -> tuple[jax.Array, jax.Array]:
    """The steps (j, k) at which two segments start, of ``shares`` [3] of the rollout: from j, from k, and before k."""
    lengths = jnp.round(steps * shares).astype(jnp.int32)
    lengths = lengths.at[shares.argmax()].add(steps - lengths.sum())
    lengths = jnp.maximum(lengths, 1)
    lengths = lengths.at[lengths.argmax()].add(steps - lengths.sum())
    j = steps - 1 - lengths[0]
    return j, j - lengths[1]


def lagrange_steps(settings: Settings, key_for: KeyFor, shape: Shape) -> jax.Array:
    """[B, 2]: the steps j and k < j at which the two segments start."""
    concentration = jnp.array(settings.lagrange.concentration)

    def sample(key: jax.Array) -> jax.Array:
        return jnp.stack(split_steps(jax.random.dirichlet(key, concentration), settings.rollout_steps))

    return drawn(settings, key_for, shape, sample)


# --- the method -------------------------------------------------------------------------------------------------------


def _segments(settings: Settings, own: jax.Array) -> list[tuple[jax.Array, jax.Array]]:
    """Supports and weights [B, order] of the segments from j on, and from k to j."""
    sigmas = flow.shifted_schedule(settings.rollout_steps, settings.shift)
    places, integrals = map(jnp.asarray, tables(sigmas, settings.lagrange.order))
    j, k = own[:, 0], own[:, 1]
    ends = (j, jnp.full_like(j, settings.rollout_steps)), (k, j)
    return [(places[first, end], integrals[first, end]) for first, end in ends]


def active_count(settings: Settings) -> int:
    """How many supports of a segment carry the gradient."""
    return min(settings.lagrange.order, 2)


def keep_lagrange(settings: Settings, own: jax.Array, batch: int) -> jax.Array:
    """The steps of the passes [B, 2 or 4]: from j on, with j last, then from k on, with k first."""
    del batch
    active = active_count(settings)
    (later, _), (earlier, _) = _segments(settings, own)
    return jnp.concatenate([later[:, :active][:, ::-1], earlier[:, :active]], 1)


def lagrange_sums(settings: Settings, own: jax.Array) -> jax.Array:
    """The integrals from k to j and from j on."""
    (later, earlier), sigmas, anchor = _segments(settings, own), levels(settings), settings.lagrange.anchor
    integrals = [
        (values[..., None] * jax.nn.one_hot(places, settings.rollout_steps)).sum(1)
        for places, values in (earlier, later)
    ]
    j, k = own[:, 0], own[:, 1]
    leap = (sigmas[j] - sigmas[k])[:, None] * one_hot(settings, k)
    return jnp.stack([(1 - anchor) * leap + anchor * integrals[0], integrals[1]], 1)


def lagrange(settings: Settings, images: Images, own: jax.Array) -> Chain:
    """The supports of both segments, weighted as the quadrature does; the second support of each counts less.

    ``anchor`` below 1 mixes LeapAlign's leap from k to j in.
    """
    recipe, sigmas, active = settings.lagrange, levels(settings), active_count(settings)
    shares = jnp.array([1.0, recipe.second])[:active]

    def rescaled(values: jax.Array) -> jax.Array:
        total = jnp.abs(values).sum(1, keepdims=True)
        kept = jnp.abs(values[:, :active]).sum(1, keepdims=True)
        return (1 + recipe.rescale * (total / kept - 1)) * shares * values[:, :active]

    later, earlier = (rescaled(values) for _, values in _segments(settings, own))
    leap = (sigmas[own[:, 0]] - sigmas[own[:, 1]])[:, None] * jnp.eye(active)[0]
    earlier = (1 - recipe.anchor) * leap + recipe.anchor * earlier
    coefficient = jnp.concatenate([later[:, ::-1], earlier], 1)
    nesting = recipe.alpha * jnp.eye(2 * active)[active - 1]
    weight = leap_weight(images, active - 1, active, recipe.tau)
    steps = keep_lagrange(settings, own, len(own))
    return chain(settings, images, steps, coefficient, nesting, weight=weight)
