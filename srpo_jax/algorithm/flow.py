"""Rectified flow: noise levels, and samplers of first and second order.

Notation: ``sigma`` in [0, 1] is the noise level of ``x = (1 - sigma) * x0 + sigma * eps``; a network predicts the
velocity ``v = eps - x0``. Schedules are small host-side float32 arrays that a compiled step holds as constants.
Everything here works on arrays and callables, so that a velocity field can be a network or a formula.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# --- noise levels ---------------------------------------------------------------------------------------------------


def linspace(start: float, stop: float, count: int) -> np.ndarray:
    """``count`` float32 values from ``start`` to ``stop``, both included, each counted from its nearer end.

    The step is rounded to float32, and each value once more at the end (one fused multiply-add), which is how the
    released recipe's tables were made. ``numpy.linspace`` differs in the last bit: enough to move ``floor(1000 *
    sigma)`` by one.
    """
    start, stop = np.float32(start), np.float32(stop)
    if count == 1:
        return np.array([start])
    step = np.float64((stop - start) / np.float32(count - 1))
    index = np.arange(count)
    # Products of a float32 and a small integer are exact in float64, so the cast is the only rounding.
    values = np.where(index < count // 2, start + step * index, stop - step * (count - 1 - index))
    return values.astype(np.float32)


def time_shift(sigma: np.ndarray | jax.Array, shift: float) -> np.ndarray | jax.Array:
    """Moves noise levels towards 1: ``shift * s / (1 + (shift - 1) * s)``."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def shifted_schedule(steps: int, shift: float) -> np.ndarray:
    """The noise levels ``[steps + 1]`` of a rollout, 1 to 0, float32 (SRPO, released trainer)."""
    return time_shift(linspace(1.0, 0.0, steps + 1), np.float32(shift)).astype(np.float32)


def truncate_time(sigma: jax.Array) -> jax.Array:
    """The time that SRPO's trainer gives to the network: whole thousandths, rounded down from a float32 product."""
    return jnp.floor(sigma.astype(jnp.float32) * 1000.0) / 1000.0


# --- sampling -------------------------------------------------------------------------------------------------------


def add_noise(x0: jax.Array, noise: jax.Array, sigma: jax.Array) -> jax.Array:
    """``(1 - sigma) * x0 + sigma * noise``; ``sigma`` is a scalar or one value a sample, ``[B]``."""
    sigma = per_sample(sigma, x0.ndim)
    return (1 - sigma) * x0 + sigma * noise


def euler_step(x: jax.Array, velocity: jax.Array, sigma_from: jax.Array, sigma_to: jax.Array) -> jax.Array:
    """One step along ``velocity`` from one noise level to another, in float32; levels are scalars or ``[B]``."""
    delta = per_sample(jnp.asarray(sigma_to) - jnp.asarray(sigma_from), x.ndim)
    return x + delta * velocity.astype(jnp.float32)


def per_sample(value: jax.Array, ndim: int) -> jax.Array:
    """Appends axes to ``[B]`` or ``[B, n]`` so that it multiplies a batch of ``ndim`` axes; scalars pass."""
    value = jnp.asarray(value)
    return value if value.ndim == 0 else value.reshape(value.shape + (1,) * (ndim - value.ndim))


def sample(
    velocity: Callable[..., Any],
    noise: jax.Array,
    sigmas: np.ndarray,
    keep: jax.Array | None = None,
    solver: str = "euler",
    memory: Any = (),
    weigh: jax.Array | None = None,
    stop: jax.Array | None = None,
) -> Any:
    """Integrates a velocity field over a schedule of noise levels, one evaluation a step.

    Args:
      velocity: ``velocity(x, sigma, index, memory) -> (v, memory)`` with a scalar ``sigma``; ``index`` counts the steps
        from 0.
      noise: the state at ``sigmas[0]``, float32, any shape with a leading batch axis.
      sigmas: noise levels ``[S + 1]``.
      keep: optional numbers of steps ``[B, n]`` (0 .. S - 1), counted from 0, at whose start a sample's state is kept.
      solver: "euler", or "ab2": the Adams-Bashforth method of second order for uneven steps (Hairer, Norsett, Wanner,
        Solving Ordinary Differential Equations I, III.5), which goes along the line through the last two velocities.
        Its first step is Euler's.
      memory: tree of arrays that one evaluation leaves to the next, as the first one gets it.
      weigh: optional weights ``[B, m, S]`` of the steps' velocities in m sums over them.
      stop: optional number of steps, a scalar, after which none are taken: a state can still be kept there.

    Returns:
      The state after the last step that is taken; with ``keep`` or ``weigh``, a triple of it, the states that were kept
      ``[B, n, ...]`` and the weighted sums of velocities ``[B, m, ...]``, each None if it was not asked for.
    """
    if solver not in ("euler", "ab2"):
        raise ValueError(f"solver={solver!r} is unknown; choose euler or ab2")
    steps = np.diff(sigmas).astype(np.float32)
    # What a step adds of the change from the velocity before: half of its own length in lengths of the step before.
    lead = np.concatenate([[0.0], steps[1:] / (2 * steps[:-1])]).astype(np.float32)

    def body(carry: tuple, inputs: tuple) -> tuple[tuple, None]:
        (x, before, memory, kept, sums), (index, sigma, sigma_next, ahead, weights) = carry, inputs
        if keep is not None:
            kept = jnp.where(per_sample(keep == index, x.ndim + 1), x[:, None], kept)

        def step(x: jax.Array, before: Any, memory: Any, sums: Any) -> tuple:
            v, memory = velocity(x, sigma, index, memory)
            if weigh is not None:
                sums = sums + per_sample(weights, x.ndim + 1) * v[:, None].astype(jnp.float32)
            if solver == "ab2":
                v = v.astype(jnp.float32)
                v, before = v + ahead * (v - before), v
            return euler_step(x, v, sigma, sigma_next), before, memory, sums

        moving = x, before, memory, sums
        if stop is None:
            moving = step(*moving)
        else:
            moving = jax.lax.cond(index < stop, step, lambda *still: still, *moving)
        x, before, memory, sums = moving
        return (x, before, memory, kept, sums), None

    # The velocity before the first step is read by no one, and not kept where none is needed.
    before = jnp.zeros_like(noise) if solver == "ab2" else None
    kept = None if keep is None else jnp.zeros((*keep.shape, *noise.shape[1:]), noise.dtype)
    sums = None if weigh is None else jnp.zeros((*weigh.shape[:2], *noise.shape[1:]), jnp.float32)
    weights = None if weigh is None else jnp.moveaxis(weigh, -1, 0)
    inputs = jnp.arange(len(steps)), jnp.asarray(sigmas[:-1]), jnp.asarray(sigmas[1:]), jnp.asarray(lead), weights
    last, _, _, kept, sums = jax.lax.scan(body, (noise, before, memory, kept, sums), inputs)[0]
    return last if keep is None and weigh is None else (last, kept, sums)
