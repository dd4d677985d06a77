"""The methods: what each asks of an update, and where its gradient-carrying transformer steps start and land.

All are one formula, ``grad theta = sum_i VJP[v at stored x_i](c_i)``: passes through the transformer at states that are
constants, each with a cotangent that the reward's gradient gives. They come in two kinds:

* a stack of ``Term``s, each scored from its own velocity: step from ``sigma_from`` to ``sigma_to``, recover an image
  (``direct_align.recover``), score it. With ``sigma_to = 0`` the recovery is the ordinary one-step prediction, so that
  SRPO, Direct-Align, ReFL and DRaFT-LV are choices of the same few arrays. They are here.
* a ``Chain``: one latent of the rollout is scored, and its gradient goes through several passes (``passes``,
  ``quadrature``).

A new method is an entry of ``METHODS``; docs/extending.md has the way. docs/methods.md compares them. The step runs
terms and passes one after the other and adds their gradients.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from srpo_jax.algorithm import direct_align, flow, passes, preference, quadrature
from srpo_jax.algorithm.batch import GRID_POSITION, LATE_STEP, RENOISING, Images
from srpo_jax.algorithm.direct_align import Step
from srpo_jax.algorithm.passes import Chain, KeyFor, Shape
from srpo_jax.algorithm.preference import CAPTION, NEGATIVE, POSITIVE, Coefficients
from srpo_jax.algorithm.settings import Settings


class Term(NamedTuple):
    """One gradient-carrying step and its objective. A stack of terms has a leading axis in every leaf.

    Attributes:
      noisy: packed latents at ``sigma_from``, ``[B, N, C]``, float32.
      noise: the noise to remove in the recovery, ``[B, N, C]``.
      sigma_from, sigma_to: noise levels ``[B]``.
      coefficients: of the rewards of the caption's variants, which the step follows, ``[B]`` each.
      weight: of each sample's loss, ``[B]``.
    """

    noisy: jax.Array
    noise: jax.Array
    sigma_from: jax.Array
    sigma_to: jax.Array
    coefficients: Coefficients
    weight: jax.Array


def _nothing(*_: Any) -> None:
    return None


@dataclasses.dataclass(frozen=True)
class Method:
    """What a method asks of an update.

    Attributes:
      names: ``names(settings)``, of what is scored, in that order: so many gradients of the decoder and the rewards a
        sample takes. Those that share a name have one entry in the metrics, their mean.
      terms: ``terms(settings, images, own)``: a stack of ``Term``, one for each name; or a ``Chain``, which has one.
      draw: ``draw(settings, key_for, shape) -> own``: its random numbers beside the noise, a tree of arrays [B, ...];
        ``shape`` is (B, N, C).
      keep: ``keep(settings, own, batch) -> [B, n]``: steps of the rollout at whose start it wants the state
        (``Images.states``); None for none. A method that keeps states needs a rollout of its own at every update.
      weigh: ``weigh(settings, own) -> [B, m, S]``: weights of the steps' velocities in the sums that it wants of them
        (``Images.sums``); None for none.
      stop: ``stop(settings, own) -> [B]``: how many steps of the rollout it needs; None for all. ``Images.latents`` are
        then no picture.
      steps: ``steps(settings)``: how many these are on average, where a batch draws once.
      offline: whether real pictures can take the rollout's place.
      passes: ``passes(settings)``, of a chain: how many passes with a gradient a sample takes through the transformer.
        None: as many as ``names``.
      follows: the variants of a caption whose rewards it follows; None: those of the recipe (``reward.target``).
    """

    names: Callable[[Settings], tuple[str, ...]]
    terms: Callable[[Settings, Images, Any], Term | Chain]
    draw: Callable[[Settings, KeyFor, Shape], Any] = _nothing
    keep: Callable[[Settings, Any, int], jax.Array] | None = None
    weigh: Callable[[Settings, Any], jax.Array] | None = None
    stop: Callable[[Settings, Any], jax.Array] | None = None
    steps: Callable[[Settings], float] = lambda settings: settings.rollout_steps
    offline: bool = True
    passes: Callable[[Settings], int] | None = None
    follows: tuple[str, ...] | None = None


def stack(terms: list[Term]) -> Term:
    """Terms of one structure as a stack."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *terms)


def known_noise(x0: jax.Array, noise: jax.Array, step: Step, coefficients: Coefficients, weight: jax.Array) -> Term:
    """A term that starts where ``noise`` is mixed into clean latents ``x0``, both [B, N, C]."""
    return Term(flow.add_noise(x0, noise, step.sigma_from), noise, step.sigma_from, step.sigma_to, coefficients, weight)


def one_step(state: jax.Array, sigma: jax.Array, coefficients: Coefficients, weight: float = 1.0) -> Term:
    """A term that predicts the image in one step from a state [B, N, C] at noise level ``sigma`` [B]."""
    nothing, ones = jnp.zeros_like(state), jnp.ones_like(sigma)
    return Term(state, nothing, sigma, jnp.zeros_like(sigma), coefficients, weight * ones)


def target(settings: Settings, batch: int) -> Coefficients:
    """What the recipe follows, for methods whose terms say nothing else."""
    return preference.target(settings.target, batch, settings.discount, settings.form)


# --- SRPO, Direct-Align -----------------------------------------------------------------------------------------------


def _grid_position(settings: Settings, key_for: KeyFor, shape: tuple[int, int, int]) -> jax.Array:
    """``mid`` [B]."""
    return direct_align.sample_mid(key_for(GRID_POSITION), shape[0], settings.grid.length)


def srpo(settings: Settings, images: Images, mid: jax.Array) -> Term:
    """SRPO: a denoising step under the wanted words and an inversion step with the words exchanged.

    The network's output enters the inverted state with the opposite sign, so that this branch pushes down what the
    reward model likes whatever the words: the method's guard against reward hacking.
    """
    choices = {
        "denoise": (direct_align.denoising_step, POSITIVE, NEGATIVE),
        "inversion": (direct_align.inversion_step, NEGATIVE, POSITIVE),
    }
    weight = jnp.full(mid.shape, 1 / len(settings.branches), jnp.float32)
    terms = []
    for branch in settings.branches:
        make_step, plus, minus = choices[branch]
        step = make_step(settings.grid, mid)
        coefficients = preference.relative(plus, minus, step.discount, settings.form)
        terms.append(known_noise(images.latents, images.noise, step, coefficients, weight))
    return stack(terms)


def direct_align_only(settings: Settings, images: Images, mid: jax.Array) -> Term:
    """Direct-Align alone: the denoising step with the plain reward of the caption, or ``reward.target``.

    ``settings.weights`` are the loss weights at the grid's (low noise, high noise) ends, linear between: the paper's
    discount that decays towards low noise, where rewards are easiest to hack.
    """
    weight = jnp.asarray(flow.linspace(*settings.weights, settings.grid.length))[mid]
    step = direct_align.denoising_step(settings.grid, mid)
    return stack([known_noise(images.latents, images.noise, step, target(settings, len(mid)), weight)])


# --- ReFL (ImageReward, arXiv 2304.05977) -----------------------------------------------------------------------------


def _late_step(settings: Settings, key_for: KeyFor, shape: tuple[int, int, int]) -> jax.Array:
    first, count = settings.rollout_steps - settings.late_steps, 1 if settings.shared_steps else shape[0]
    step = jax.random.randint(key_for(LATE_STEP), (count,), first, settings.rollout_steps)
    return jnp.broadcast_to(step, shape[:1])


def _keep_late(settings: Settings, step: jax.Array, batch: int) -> jax.Array:
    del settings, batch
    return step[:, None]


def refl(settings: Settings, images: Images, step: jax.Array) -> Term:
    """One-step prediction from the state of the rollout at the start of a late ``step`` [B]."""
    return stack([one_step(images.states[:, 0], passes.levels(settings)[step], target(settings, len(step)))])


# --- DRaFT-LV (arXiv 2309.17400) --------------------------------------------------------------------------------------


def _renoising(settings: Settings, key_for: KeyFor, shape: tuple[int, int, int]) -> jax.Array:
    """Fresh noise [B, n, N, C]."""
    batch, *rest = shape
    return jax.random.normal(key_for(RENOISING), (batch, settings.renoisings, *rest))


def _keep_last(settings: Settings, own: Any, batch: int) -> jax.Array:
    del own
    return jnp.full((batch, 1), settings.rollout_steps - 1, jnp.int32)


def draft_lv(settings: Settings, images: Images, noises: jax.Array) -> Term:
    """The last step alone: of the rollout itself, and of several re-noisings of its image; the mean of all.

    Of real pictures, which no rollout made, there are the re-noisings alone.
    """
    count, batch = noises.shape[1] + (images.states is not None), len(noises)
    level, coefficients = jnp.full(batch, passes.levels(settings)[-2]), target(settings, batch)
    step = Step(level, jnp.zeros_like(level), jnp.zeros_like(level))
    weight = jnp.full(batch, 1 / count, jnp.float32)
    terms = [] if images.states is None else [one_step(images.states[:, 0], level, coefficients, 1 / count)]
    for noise in noises.swapaxes(0, 1):
        terms.append(known_noise(images.latents, noise, step, coefficients, weight))
    return stack(terms)


def _draft_names(settings: Settings) -> tuple[str, ...]:
    return (*(() if settings.offline else ("base",)), *("renoised",) * settings.renoisings)


# --- the table --------------------------------------------------------------------------------------------------------


def _chained(
    terms: Callable[[Settings, Images, Any], Chain], count: Callable[[Settings], int], **options: Any
) -> Method:
    return Method(lambda _: ("image",), terms, offline=False, passes=count, **options)


METHODS: dict[str, Method] = {
    "srpo": Method(lambda settings: settings.branches, srpo, _grid_position, follows=(POSITIVE, NEGATIVE)),
    "direct_align": Method(lambda _: ("denoise",), direct_align_only, _grid_position),
    "refl": Method(
        lambda _: ("late",),
        refl,
        _late_step,
        _keep_late,
        stop=lambda _, step: step,
        steps=lambda settings: settings.rollout_steps - (settings.late_steps + 1) / 2,
        offline=False,
    ),
    "draft_lv": Method(_draft_names, draft_lv, _renoising, _keep_last),
    "draft_k": _chained(passes.draft_k, lambda settings: settings.draft_steps, keep=passes.last_steps),
    "drtune": _chained(
        passes.drtune,
        lambda settings: settings.drtune.passes,
        draw=passes.drtune_steps,
        keep=passes.keep_own,
        weigh=passes.drtune_sums,
        stop=lambda _, own: own[:, -1] + 1,
        steps=lambda settings: settings.rollout_steps - (settings.drtune.late_steps + 1) / 2 + 1,
    ),
    "leapalign": _chained(
        passes.leapalign, lambda _: 2, draw=passes.leap_steps, keep=passes.keep_own, weigh=passes.leap_sums
    ),
    "flowbp_sparse": _chained(
        passes.sparse, lambda settings: settings.sparse.passes, draw=passes.sparse_steps, keep=passes.keep_own
    ),
    "flowbp_bridge": _chained(
        passes.bridge, lambda settings: settings.bridge.passes, draw=passes.bridge_steps, keep=passes.keep_bridge
    ),
    "flowbp_lagrange": _chained(
        quadrature.lagrange,
        lambda settings: 2 * quadrature.active_count(settings),
        draw=quadrature.lagrange_steps,
        keep=quadrature.keep_lagrange,
        weigh=quadrature.lagrange_sums,
    ),
}


class Cost(NamedTuple):
    """What a sample takes in one update, on average: steps of its rollout, passes with a gradient through the
    transformer, and gradients of the decoder and the rewards."""

    rollout: float
    passes: int
    pictures: int


def cost(settings: Settings) -> Cost:
    """Of a recipe; where a rollout serves several updates, its share."""
    method = METHODS[settings.method]
    pictures = len(method.names(settings))
    rollout = 0.0 if settings.offline else method.steps(settings) / settings.reuse
    return Cost(rollout, pictures if method.passes is None else method.passes(settings), pictures)


def follows(settings: Settings) -> tuple[str, ...]:
    """The variants of a caption whose rewards a recipe follows."""
    relative = (POSITIVE, NEGATIVE) if settings.target == "relative" else (CAPTION,)
    return METHODS[settings.method].follows or relative
