"""Direct-Align (arXiv 2509.06942, section 3): noise that is known, one step, exact recovery by interpolation.

An image ``x0`` is mixed with noise ``eps`` that we keep. The network takes one step between two noise levels of a
training grid, and the image is recovered from where it lands with the same ``eps``. If the network's velocity were
exact, the recovered image would be ``x0`` itself at every noise level. Arrays only: this page knows no networks.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from srpo_jax.algorithm import flow

MARGIN = 5  # `mid` keeps this distance from both ends of the grid


@dataclasses.dataclass(frozen=True)
class Grid:
    """The training grid: noise levels from high (index 0) to low, and what is indexed along it.

    Attributes:
      sigmas: noise levels ``[L]``, float32.
      discount_positive, discount_negative: the weights k of the denoising and the inversion branch ``[L]``. They are
      indexed by ``m``
        while sigma is indexed by ``L - m``: entry 0 belongs to the LOWEST noise.
      stride: the largest distance k0 between the two noise levels of a step.
    """

    sigmas: np.ndarray
    discount_positive: np.ndarray
    discount_negative: np.ndarray
    stride: int

    @property
    def length(self) -> int:
        """The number of noise levels, L."""
        return len(self.sigmas)


def training_grid(
    *,
    train_timestep: tuple[int, int],
    length: int,
    schedule_steps: int,
    shift: float,
    groundtruth_ratio: float,
    discount_positive: tuple[float, float],
    discount_negative: tuple[float, float],
) -> Grid:
    """Builds the grid of a recipe.

    Args:
      train_timestep: first and last index into the inference schedule; the grid is linear between their noise levels.
      length: L, the number of grid points.
      schedule_steps: steps of the inference schedule that ``train_timestep`` counts.
      shift: time shift of that schedule.
      groundtruth_ratio: share of the grid that is covered by injected noise rather than by the network's step.
      discount_positive, discount_negative: (low noise, high noise) ends of the two discount ramps.
    """
    schedule = flow.shifted_schedule(schedule_steps, shift)
    first, last = train_timestep
    return Grid(
        sigmas=flow.linspace(schedule[first], schedule[last], length),
        discount_positive=flow.linspace(*discount_positive, length),
        discount_negative=flow.linspace(*discount_negative, length),
        # In floating point on purpose: (1 - 0.9) * 1000 is just under 100, and the released recipe steps by 100.
        stride=int((1 - groundtruth_ratio) * length) + 1,
    )


def sample_mid(key: jax.Array, count: int, length: int) -> jax.Array:
    """``count`` grid positions, uniform over 5 .. L - 5, both ends included, int32."""
    return jax.random.randint(key, (count,), MARGIN, length - MARGIN + 1)


class Step(NamedTuple):
    """One gradient-carrying step: where it starts and lands, and the discount of its reward; each ``[B]``, float32."""

    sigma_from: jax.Array
    sigma_to: jax.Array
    discount: jax.Array


def _stride(grid: Grid, mid: jax.Array) -> jax.Array:
    return jnp.minimum(jnp.minimum(grid.length - mid, grid.stride), mid)


def denoising_step(grid: Grid, mid: jax.Array) -> Step:
    """The step from a noisier level down to the level of ``mid`` (int ``[B]``)."""
    length = grid.length
    start = jnp.minimum(mid + _stride(grid, mid), length)
    sigmas = jnp.asarray(grid.sigmas)
    return Step(sigmas[length - start], sigmas[length - mid], jnp.asarray(grid.discount_positive)[mid])


def inversion_step(grid: Grid, mid: jax.Array) -> Step:
    """The step from a cleaner level up to that of ``mid`` (one index cleaner if ``mid`` is below the stride)."""
    length, stride = grid.length, _stride(grid, mid)
    start = jnp.maximum(mid - stride, 1)
    sigmas = jnp.asarray(grid.sigmas)
    return Step(
        sigmas[length - start],
        sigmas[length - jnp.minimum(start + stride, length)],
        jnp.asarray(grid.discount_negative)[start],
    )


def recover(
    x_from: jax.Array, velocity: jax.Array, noise: jax.Array, sigma_from: jax.Array, sigma_to: jax.Array
) -> jax.Array:
    """The image that a step implies: step to ``sigma_to``, take the known noise out, undo the mixture's scale.

    With ``sigma_to = 0`` this is the ordinary one-step prediction ``x - sigma * v``.

    Args:
      x_from: state at ``sigma_from``, ``[B, ...]``, float32.
      velocity: the network's prediction there.
      noise: the noise that was injected.
      sigma_from, sigma_to: noise levels ``[B]``; ``sigma_to < 1``.
    """
    x_to = flow.euler_step(x_from, velocity, sigma_from, sigma_to)
    sigma_to = flow.per_sample(sigma_to, x_to.ndim)
    return (x_to - sigma_to * noise) / (1 - sigma_to)
