"""What each method asks of a step: where its gradient-carrying transformer steps start and land, and what reward
they follow.

SRPO, Direct-Align, ReFL and DRaFT-LV share one formula (``direct_align.recover``): step from ``sigma_from`` to
``sigma_to``, recover an image, score it against a text direction. With ``sigma_to = 0`` the recovery is the ordinary
one-step prediction, so the relatives are other choices of the same few arrays. A method is a function that makes a
stack of ``Term``; the step runs them one after the other and adds their gradients.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from srpo_jax.algorithm import direct_align, flow, rewards
from srpo_jax.algorithm.direct_align import Grid, Step

Embeddings = dict[str, dict[str, jax.Array]]  # reward name -> {"positive" | "negative" | "caption": [B, E]}

# The names of a method's terms, in the order in which they run.
TERM_NAMES = {
    "srpo": ("denoise", "inversion"),
    "direct_align": ("denoise",),
    "refl": ("late",),
    "draft_lv": ("renoised",),
}


class Term(NamedTuple):
    """One gradient-carrying step and its objective. A stack of terms has a leading axis in every leaf.

    Attributes:
      noisy: packed latents at ``sigma_from``, ``[B, N, 64]``, float32.
      noise: the noise to remove in the recovery, ``[B, N, 64]``.
      sigma_from, sigma_to: noise levels ``[B]``.
      targets: by reward name, the text direction ``[B, E]``.
      weight: of each sample's loss, ``[B]``.
    """

    noisy: jax.Array
    noise: jax.Array
    sigma_from: jax.Array
    sigma_to: jax.Array
    targets: dict[str, jax.Array]
    weight: jax.Array


def _stack(terms: list[Term]) -> Term:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *terms)


def _known_noise_term(
    x0: jax.Array, noise: jax.Array, step: Step, targets: dict[str, jax.Array], weight: jax.Array
) -> Term:
    noisy = flow.add_noise(x0, noise, step.sigma_from)
    return Term(noisy, noise, step.sigma_from, step.sigma_to, targets, weight)


def _captions(text: Embeddings) -> dict[str, jax.Array]:
    return {name: embeddings["caption"] for name, embeddings in text.items()}


def srpo(
    x0: jax.Array,
    noise: jax.Array,
    mid: jax.Array,
    grid: Grid,
    text: Embeddings,
    *,
    form: str,
    branches: tuple[str, ...],
) -> Term:
    """SRPO: a denoising step under the wanted words and an inversion step with the words exchanged.

    The network's output enters the inverted state with the opposite sign, so that this branch pushes down what the
    reward model likes whatever the words: the method's guard against reward hacking.

    Args:
      x0: clean packed latents ``[B, N, 64]``.
      noise: the known noise, same shape.
      mid: grid positions ``[B]``.
      grid: the recipe's training grid.
      text: text features by reward.
      form: of the relative reward, see ``rewards.relative_target``.
      branches: which of ``TERM_NAMES["srpo"]`` run; both are the method.

    Returns:
      A stack of one term a branch, each weighted by 1 / number of branches.
    """
    choices = {
        "denoise": (direct_align.denoising_step, "positive", "negative"),
        "inversion": (direct_align.inversion_step, "negative", "positive"),
    }
    weight = jnp.full(mid.shape, 1 / len(branches), jnp.float32)
    terms = []
    for branch in branches:
        make_step, plus, minus = choices[branch]
        step = make_step(grid, mid)
        targets = {
            name: rewards.relative_target(embeddings[plus], embeddings[minus], step.discount, form)
            for name, embeddings in text.items()
        }
        terms.append(_known_noise_term(x0, noise, step, targets, weight))
    return _stack(terms)


def direct_align_only(
    x0: jax.Array, noise: jax.Array, mid: jax.Array, grid: Grid, text: Embeddings, weights: tuple[float, float]
) -> Term:
    """Direct-Align alone: the denoising step with the plain reward of the caption.

    ``weights`` are the loss weights at the grid's (low noise, high noise) ends, linear between: the paper's discount
    that decays towards low noise, where rewards are easiest to hack.
    """
    weight = jnp.asarray(flow.linspace(*weights, grid.length))[mid]
    return _stack([_known_noise_term(x0, noise, direct_align.denoising_step(grid, mid), _captions(text), weight)])


def refl(noisy: jax.Array, sigma: jax.Array, text: Embeddings) -> Term:
    """ReFL (ImageReward, arXiv 2304.05977): one-step prediction from a late state of the rollout itself.

    Args:
      noisy: states of the rollout ``[B, N, 64]`` at noise levels ``sigma`` ``[B]``.
      sigma: see ``noisy``.
      text: text features by reward.
    """
    ones = jnp.ones_like(sigma)
    return _stack([Term(noisy, jnp.zeros_like(noisy), sigma, jnp.zeros_like(sigma), _captions(text), ones)])


def draft_lv(x0: jax.Array, noises: jax.Array, sigma: float, text: Embeddings) -> Term:
    """DRaFT-LV (arXiv 2309.17400): the last step alone, averaged over several re-noisings of the final sample.

    Args:
      x0: final samples ``[B, N, 64]``.
      noises: fresh noise ``[n, B, N, 64]``, one re-noising each.
      sigma: the noise level at which the rollout's last step starts.
      text: text features by reward.

    Returns:
      A stack of n terms, each weighted by 1/n.
    """
    level = jnp.full(x0.shape[0], sigma, jnp.float32)
    step = Step(level, jnp.zeros_like(level), jnp.zeros_like(level))
    weight = jnp.full(x0.shape[0], 1 / len(noises), jnp.float32)
    return _stack([_known_noise_term(x0, noise, step, _captions(text), weight) for noise in noises])
