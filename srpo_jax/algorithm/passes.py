"""Methods that score one latent of the rollout and send the reward's gradient back through a few of its steps.

The scored latent ``y`` is the real rollout's, and does not depend on the passes: ``g = dL/dy`` is computed once, by one
decoder and one reward. Then the passes run one after the other, in the memory of one:

    grad theta = sum_i VJP_theta[v at stored x_i](c_i),   c_i = coefficient_i h,   h starts at g, and after a pass
    h += nesting_i J_i^T c_i                              (J_i^T: the same pass's gradient of its input)

Nesting 1 at consecutive steps is the true chain of backpropagation (DRaFT-K), 0 sends every step the same gradient
(DRTune, FlowBP-Sparse), a small one at a single step is LeapAlign's, which FlowBP-Bridge and -Lagrange take over. The
stored states are only those that a pass starts from. ``quadrature`` has FlowBP-Lagrange.

Sources: DRaFT arXiv 2309.17400, DRTune 2405.00760, LeapAlign 2604.15311, FlowBP 2606.11075.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from srpo_jax.algorithm import flow, preference
from srpo_jax.algorithm.batch import PASSES, Images
from srpo_jax.algorithm.preference import Coefficients
from srpo_jax.algorithm.settings import Settings

KeyFor = Callable[[int], jax.Array]  # an update's key for a purpose, see batch
Shape = tuple[int, int, int]  # (B, N, C)


class Passes(NamedTuple):
    """Gradient-carrying passes in the order in which they run: every leaf has a leading axis over them.

    Attributes:
      state: what the transformer reads, stored latents ``[P, B, N, C]``.
      sigma: their noise levels ``[P, B]``.
      coefficient: of the velocity's cotangent ``[P, B]``; a pass with 0 adds nothing.
      nesting: how much of its input's gradient the later passes are sent too, ``[P, B]``.
    """

    state: jax.Array
    sigma: jax.Array
    coefficient: jax.Array
    nesting: jax.Array


class Chain(NamedTuple):
    """A latent to be scored and the passes that its gradient goes through.

    Attributes:
      latents: what is scored, ``[B, N, C]``.
      coefficients: of the rewards of the caption's variants, ``[B]`` each.
      weight: of each sample's loss, ``[B]``.
      passes: see ``Passes``.
    """

    latents: jax.Array
    coefficients: Coefficients
    weight: jax.Array
    passes: Passes


def levels(settings: Settings) -> jax.Array:
    """The noise levels of the rollout ``[S + 1]``."""
    return jnp.asarray(flow.shifted_schedule(settings.rollout_steps, settings.shift))


def chain(
    settings: Settings,
    images: Images,
    steps: jax.Array,
    coefficient: jax.Array,
    nesting: float | jax.Array = 0.0,
    latents: jax.Array | None = None,
    weight: jax.Array | None = None,
) -> Chain:
    """Passes at ``steps`` [B, P], whose states come first among the kept ones; ``coefficient``, ``nesting`` [B, P].

    Where they are not given, the rollout's own image is scored, and samples weigh the same.
    """
    batch, count = steps.shape
    states = images.states[:, :count].swapaxes(0, 1)
    nesting = jnp.broadcast_to(nesting, steps.shape)
    passes = Passes(states, *(value.T for value in (levels(settings)[steps], coefficient, nesting)))
    latents = images.latents if latents is None else latents
    weight = jnp.ones(batch, jnp.float32) if weight is None else weight
    return Chain(latents, preference.target(settings.target, batch, settings.discount, settings.form), weight, passes)


# --- draws ------------------------------------------------------------------------------------------------------------


def drawn(settings: Settings, key_for: KeyFor, shape: Shape, sample: Callable[[jax.Array], Any]) -> Any:
    """``sample(key)`` for each sample of a batch, or once for all (``rollout.draws``): a tree of arrays [B, ...]."""
    count = 1 if settings.shared_steps else shape[0]
    made = jax.vmap(sample)(jax.random.split(key_for(PASSES), count))
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (shape[0], *x.shape[1:])), made)


def pair(key: jax.Array, steps: int) -> tuple[jax.Array, jax.Array]:
    """Two distinct steps, uniform, the later one first."""
    both = jax.random.permutation(key, steps)[:2]
    return both.max(), both.min()


def race(key: jax.Array, weights: jax.Array) -> jax.Array:
    """Scores whose k largest are k draws without replacement, each in proportion to ``weights`` among what is left."""
    return jax.random.gumbel(key, weights.shape) + jnp.log(weights)


def one_hot(settings: Settings, step: jax.Array) -> jax.Array:
    """Weights ``[B, S]`` that pick the velocity of ``step`` [B]."""
    return jax.nn.one_hot(step, settings.rollout_steps)


def active_rescale(steps: jax.Array, settings: Settings, rescale: float) -> tuple[jax.Array, jax.Array]:
    """The lengths ``[B, P]`` of active ``steps``, and the factor ``[B, 1]`` that makes up for the others' share."""
    lengths = jnp.diff(levels(settings))
    active = lengths[steps]
    share = jnp.abs(lengths).sum() / jnp.abs(active).sum(1, keepdims=True)
    return active, 1 + rescale * (share - 1)


# --- DRaFT-K ----------------------------------------------------------------------------------------------------------


def last_steps(settings: Settings, own: Any, batch: int) -> jax.Array:
    """The last steps [B, K], the very last first."""
    del own
    last = settings.rollout_steps - 1
    return jnp.broadcast_to(last - jnp.arange(settings.draft_steps), (batch, settings.draft_steps))


def draft_k(settings: Settings, images: Images, own: Any) -> Chain:
    """Backpropagation through the last K steps of the rollout, as it is; of all steps where K is their number."""
    steps = last_steps(settings, own, len(images.latents))
    return chain(settings, images, steps, jnp.diff(levels(settings))[steps], 1.0)


# --- DRTune -----------------------------------------------------------------------------------------------------------


def drtune_steps(settings: Settings, key_for: KeyFor, shape: Shape) -> jax.Array:
    """[B, K + 1]: K evenly spaced steps that are trained, and the step at which the rollout is cut short."""
    late, count = settings.drtune

    def sample(key: jax.Array) -> jax.Array:
        first, second = jax.random.split(key)
        stop = settings.rollout_steps - jax.random.randint(first, (), 1, late + 1)
        stride = (stop + 1) // count
        start = jax.random.randint(second, (), 0, stop - (count - 1) * stride + 1)
        return jnp.append(start + stride * jnp.arange(count), stop)

    return drawn(settings, key_for, shape, sample)


def keep_own(settings: Settings, own: jax.Array, batch: int) -> jax.Array:
    """The states of the method's own steps [B, P]."""
    del settings, batch
    return own


def drtune_sums(settings: Settings, own: jax.Array) -> jax.Array:
    """The velocity of the step at which the rollout is cut short."""
    return one_hot(settings, own[:, -1])[:, None]


def drtune(settings: Settings, images: Images, own: jax.Array) -> Chain:
    """The one-step prediction of a late step is scored; evenly spaced steps up to it are trained, inputs detached."""
    steps, stop, sigmas = own[:, :-1], own[:, -1:], levels(settings)
    # The last step of the shortened trajectory leads to no noise at all.
    coefficient = jnp.where(steps == stop, -sigmas[steps], jnp.diff(sigmas)[steps])
    latents = flow.euler_step(images.states[:, -1], images.sums[:, 0], sigmas[stop[:, 0]], 0.0)
    return chain(settings, images, steps, coefficient, latents=latents)


# --- LeapAlign --------------------------------------------------------------------------------------------------------


def leap_steps(settings: Settings, key_for: KeyFor, shape: Shape) -> jax.Array:
    """[B, 2]: the steps j and k < j at which the leaps start."""
    return drawn(settings, key_for, shape, lambda key: jnp.stack(pair(key, settings.rollout_steps)))


def leap_sums(settings: Settings, own: jax.Array) -> jax.Array:
    """The leaps from k to j and from j to the end."""
    j, k, sigmas = own[:, 0], own[:, 1], levels(settings)
    leaps = (k, sigmas[j] - sigmas[k]), (j, -sigmas[j])
    return jnp.stack([length[:, None] * one_hot(settings, step) for step, length in leaps], 1)


def leap_weight(images: Images, j: int, k: int, tau: float) -> jax.Array:
    """A sample's weight ``[B]``: the smaller, the further its leaps miss where the rollout went.

    ``j`` and ``k`` are the places of the leaps' starts among the kept states; the leaps are ``images.sums``.
    """
    starts, ends = (images.states[:, k], images.states[:, j]), (images.states[:, j], images.latents)
    misses = [
        jnp.abs(end - start - leap).mean((1, 2))
        for start, end, leap in zip(starts, ends, images.sums.swapaxes(0, 1), strict=True)
    ]
    return 1 / sum(jnp.maximum(miss, tau) for miss in misses)


def leapalign(settings: Settings, images: Images, own: jax.Array) -> Chain:
    """Two leaps along the stored velocities stand for the trajectory, joined with a part of the gradient between."""
    j, k, sigmas = own[:, 0], own[:, 1], levels(settings)
    alpha, tau = settings.leapalign
    coefficient = jnp.stack([-sigmas[j], sigmas[j] - sigmas[k]], 1)
    weight = leap_weight(images, 0, 1, tau)
    return chain(settings, images, own, coefficient, jnp.array([alpha, 0.0]), weight=weight)


# --- FlowBP-Sparse, FlowBP-Bridge -------------------------------------------------------------------------------------


def sparse_steps(settings: Settings, key_for: KeyFor, shape: Shape) -> jax.Array:
    """[B, K]: distinct steps, step i in proportion to (i + 1)^2; the latest first."""
    place = jnp.arange(1, settings.rollout_steps + 1)

    def sample(key: jax.Array) -> jax.Array:
        chosen = jax.lax.top_k(race(key, place**2), settings.sparse.passes)[1]
        return jnp.sort(chosen, descending=True)

    return drawn(settings, key_for, shape, sample)


def sparse(settings: Settings, images: Images, steps: jax.Array) -> Chain:
    """The steps of the rollout that were drawn, each with the image's own gradient."""
    lengths, factor = active_rescale(steps, settings, settings.sparse.rescale)
    return chain(settings, images, steps, factor * lengths)


def bridge_counts(steps: int, passes: int) -> np.ndarray:
    """``[S, 2]``: how many of the passes lie before the step j, and how many from it on; row 0 is for no draw."""
    before = [min(max(round(passes * j / steps), 1), j, passes - 1) for j in range(steps)]
    return np.array([(count, passes - count) for count in before])


class BridgeSteps(NamedTuple):
    """``active`` steps [B, K], the latest first, and the one among them that is the ``bridge`` [B]."""

    active: jax.Array
    bridge: jax.Array


def bridge_steps(settings: Settings, key_for: KeyFor, shape: Shape) -> BridgeSteps:
    """The bridge is the later of two steps drawn; the others follow the squares of their places in either segment."""
    steps, passes = settings.rollout_steps, settings.bridge.passes
    counts, index = jnp.asarray(bridge_counts(steps, passes)), jnp.arange(steps)

    def sample(key: jax.Array) -> BridgeSteps:
        first, second = jax.random.split(key)
        j = pair(first, steps)[0]
        place = jnp.where(index < j, index + 1, index - j)
        scores = jnp.where(index == j, jnp.inf, race(second, jnp.maximum(place, 1) ** 2))
        behind = (index < j)[:, None] == (index < j)
        rank = (behind & (scores > scores[:, None])).sum(1)
        active = rank < jnp.where(index < j, *counts[j])
        return BridgeSteps(jax.lax.top_k(jnp.where(active, index, -1), passes)[0], j)

    return drawn(settings, key_for, shape, sample)


def keep_bridge(settings: Settings, own: BridgeSteps, batch: int) -> jax.Array:
    """The states of the active steps [B, K]."""
    del settings, batch
    return own.active


def bridge(settings: Settings, images: Images, own: BridgeSteps) -> Chain:
    """As ``sparse``, and what comes before the bridge is sent a part of the gradient through the bridge's step too."""
    lengths, factor = active_rescale(own.active, settings, settings.bridge.rescale)
    nesting = settings.bridge.alpha * (own.active == own.bridge[:, None])
    return chain(settings, images, own.active, factor * lengths, nesting)
