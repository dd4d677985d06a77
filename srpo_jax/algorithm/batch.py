"""What passes through an update, apart from weights: conditions, pictures, random numbers; and how a batch is parted.

Widths in shapes: B samples over all devices, N image tokens, C features of one.
"""

from typing import Any, NamedTuple

import jax

# What the keys of an update are for: one is folded from the update's key for each purpose.
NOISE, GRID_POSITION, LATE_STEP, RENOISING, ROUNDING, PASSES = range(6)


class Batch(NamedTuple):
    """What one update is conditioned on.

    Attributes:
      condition: what the transformer reads, a tree of arrays ``[B, ...]`` that its family knows.
      reward_tokens: by reward and by variant of the caption (``preference.VARIANTS``), a tree of arrays ``[B, ...]``
        that the reward knows.
      latents: clean packed latents of real pictures ``[B, N, C]``, float32, or None: then a rollout makes them.
    """

    condition: dict[str, jax.Array]
    reward_tokens: dict[str, dict[str, Any]]
    latents: jax.Array | None = None


class Images(NamedTuple):
    """What is to be improved, float32.

    Attributes:
      latents: clean, packed, ``[B, N, C]``: a rollout's, or of real pictures.
      noise: known noise of the same shape: what the rollout started from, or fresh.
      states: those of the rollout that the method starts from, ``[B, n, N, C]``; None if it needs none.
      sums: weighted sums of the rollout's velocities, ``[B, m, N, C]``; None if it needs none.
    """

    latents: jax.Array
    noise: jax.Array
    states: jax.Array | None = None
    sums: jax.Array | None = None


class Rollout(NamedTuple):
    """Images that serve several updates: ``latents`` and the ``noise`` that they were made from, ``[B, N, C]``."""

    latents: jax.Array
    noise: jax.Array


class Draws(NamedTuple):
    """The random numbers of an update: ``noise`` [B, N, C], and the method's ``own``, a tree of arrays [B, ...]."""

    noise: jax.Array
    own: Any


def split_batch(tree: Any, parts: int) -> Any:
    """``[B, ...]`` leaves to ``[parts, B / parts, ...]``. Every part takes each parts-th sample, so that a batch
    split over devices stays where it is."""
    return jax.tree.map(lambda x: x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1), tree)


def join_batch(tree: Any) -> Any:
    """The inverse of ``split_batch``."""
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(x.shape[0] * x.shape[1], *x.shape[2:]), tree)
