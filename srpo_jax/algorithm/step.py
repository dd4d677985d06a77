"""One update: images -> gradient-carrying steps -> rewards -> ``jax.grad`` -> optimiser. What training compiles.

    rollout or real pictures --method--> terms --transformer, recover, decode, reward--> losses --> gradient --> AdamW
                                         chain --decode, reward--> loss --> its gradient --passes--> gradient --> AdamW

The batch is global; it may pass in parts (gradient accumulation) with the same result up to the order of sums, since
every random number of a sample is drawn for the whole batch first. All parts are rolled out before the first gradient,
so that the weights are made ready for rollouts once. Terms (SRPO's two branches) run one after the other in a scan, in
the memory of one, or merged into one batch (``optim.merge_terms``); so do the passes of a chain, of which each may
send on a part of the gradient of its input.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax

from srpo_jax.algorithm import direct_align, flow, preference
from srpo_jax.algorithm.batch import NOISE, ROUNDING, Batch, Draws, Images, Rollout, join_batch, split_batch
from srpo_jax.algorithm.methods import METHODS, Term
from srpo_jax.algorithm.networks import Frozen, Networks, decode, in_compute_dtype, to_unit_range, velocity
from srpo_jax.algorithm.passes import Chain, Passes
from srpo_jax.algorithm.preference import Coefficients, Prepared
from srpo_jax.algorithm.rollout import rollout
from srpo_jax.algorithm.settings import Settings
from srpo_jax.models.compute import Params, join
from srpo_jax.optim import Optimizer


@flax.struct.dataclass
class TrainState:
    """All that changes in training.

    Attributes:
      step: updates done, int32 scalar.
      params: of the transformer; with LoRA, its low-rank factors alone.
      opt_state: of the optimiser.
      ema: moving average of ``params`` (float32), or None.
      rollout: the newest one, where each serves several updates (``Settings.reuse``); None otherwise.
    """

    step: jax.Array
    params: Params
    opt_state: Any
    ema: Params | None = None
    rollout: Rollout | None = None


# --- images -----------------------------------------------------------------------------------------------------------


def draw(networks: Networks, settings: Settings, key: jax.Array, batch: int) -> Draws:
    """Draws an update's random numbers for ``batch`` samples from the update's key, one key for each purpose."""
    key_for = functools.partial(jax.random.fold_in, key)
    shape = networks.tokens(settings)
    count = 1 if settings.shared_noise else batch
    noise = jnp.broadcast_to(jax.random.normal(key_for(NOISE), (count, *shape)), (batch, *shape))
    return Draws(noise, METHODS[settings.method].draw(settings, key_for, (batch, *shape)))


def images_of(
    networks: Networks, settings: Settings, params: Params, frozen: Frozen, batch: Batch, draws: Draws
) -> Images:
    """What an update improves: the batch's real pictures, or a rollout's with the states that the method keeps."""
    if batch.latents is not None:
        return Images(batch.latents, draws.noise)
    method, transformer = METHODS[settings.method], join(params, frozen.base)
    keep = None if method.keep is None else method.keep(settings, draws.own, len(draws.noise))
    weigh = None if method.weigh is None else method.weigh(settings, draws.own)
    stop = None if method.stop is None else method.stop(settings, draws.own)
    latents, states, sums = rollout(networks, settings, transformer, batch, draws.noise, keep, weigh, stop)
    return Images(latents, draws.noise, states, sums)


# --- terms ------------------------------------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """Everything that happens in one term, in order: velocity and recovered latents [B, N, C], the decoder's output
    [B, H, W, 3], what each reward saw, reward [B]. A compiled update keeps what its metrics use."""

    velocity: jax.Array
    recovered: jax.Array
    decoded: jax.Array
    seen: dict[str, Any]
    reward: jax.Array


def run_term(
    networks: Networks,
    settings: Settings,
    params: Params,
    frozen: Frozen,
    condition: Any,
    term: Term,
    prepared: Prepared,
) -> Outcome:
    """Takes a term's transformer step, recovers, decodes and scores the image."""
    v = velocity(networks, settings, params, condition, term.noisy, term.sigma_from, settings.guidance)
    recovered = direct_align.recover(term.noisy, v, term.noise, term.sigma_from, term.sigma_to)
    return Outcome(v, recovered, *score(networks, settings, frozen, recovered, term.coefficients, prepared))


def score(
    networks: Networks,
    settings: Settings,
    frozen: Frozen,
    latents: jax.Array,
    coefficients: Coefficients,
    prepared: Prepared,
) -> tuple[jax.Array, dict[str, Any], jax.Array]:
    """The decoder's output for clean latents, what the rewards see in it, and the reward: as ``Outcome``."""
    decoded = decode(networks, settings, frozen.autoencoder, latents)
    seen = preference.look(networks.rewards, frozen.rewards, to_unit_range(decoded))
    return decoded, seen, preference.mixture(networks.rewards, frozen.rewards, seen, prepared, coefficients)


def term_loss(
    networks: Networks,
    settings: Settings,
    params: Params,
    frozen: Frozen,
    condition: Any,
    term: Term,
    prepared: Prepared,
    count: int = 1,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """A term's loss, ``mean(weight * relu(margin - reward))``, and its metrics (means over the samples), each ``[1]``.

    ``count`` > 1 says that so many terms were merged (``merge_terms``): the loss is their sum, the metrics ``[count]``.
    The metric ``caption_reward`` is the reward of the image under its plain caption, without control words.
    """
    outcome = run_term(networks, settings, params, frozen, condition, term, prepared)
    return _loss(networks, settings, frozen, outcome.seen, outcome.reward, term.weight, prepared, count)


def chain_loss(
    networks: Networks, settings: Settings, frozen: Frozen, latents: jax.Array, chain: Chain, prepared: Prepared
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss of a chain's scored ``latents`` and its metrics ``[1]``, as of a term."""
    _, seen, reward = score(networks, settings, frozen, latents, chain.coefficients, prepared)
    return _loss(networks, settings, frozen, seen, reward, chain.weight, prepared)


def _loss(
    networks: Networks,
    settings: Settings,
    frozen: Frozen,
    seen: dict[str, Any],
    reward: jax.Array,
    weight: jax.Array,
    prepared: Prepared,
    count: int = 1,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    plain = preference.plain(len(reward))
    metrics = {
        "loss": weight * preference.hinge(reward, settings.margin),
        "reward": reward,
        "caption_reward": jax.lax.stop_gradient(
            preference.mixture(networks.rewards, frozen.rewards, seen, prepared, plain)
        ),
    }
    metrics = {name: values.reshape(-1, count).mean(0) for name, values in metrics.items()}
    return metrics["loss"].sum(), metrics


def merge_terms(terms: Term, given: Any) -> tuple[Term, Any]:
    """A stack of T terms of B samples as one term of B * T samples, and the tree ``given`` [B, ...] to match.

    The terms of a sample follow each other, so that a batch split over devices stays where it is.
    """
    count = terms.weight.shape[0]
    return join_batch(terms), jax.tree.map(lambda x: jnp.repeat(x, count, axis=0), given)


def gradient(
    networks: Networks,
    settings: Settings,
    params: Params,
    frozen: Frozen,
    batch: Batch,
    images: Images,
    own: Any,
    total: Params | None = None,
    share: float = 1.0,
) -> tuple[Params, dict[str, jax.Array]]:
    """The gradient of one part of a batch, summed over the method's terms or passes, and metrics ``[terms]`` by name.

    Args:
      networks, settings, params, frozen: of the update.
      batch, images, own: of this part; ``own`` are the method's draws.
      total: what the gradient is added to: parts and passes then share one sum, and not a sum of sums, each of which is
        as large as the parameters. Sums are float32, whatever the parameters are.
      share: scales what is added, as for a mean over parts of a batch.
    """
    prepared = preference.prepare(networks.rewards, frozen.rewards, batch.reward_tokens)
    weights = in_compute_dtype(networks, params, frozen.base)
    terms = METHODS[settings.method].terms(settings, images, own)
    given = batch.condition, prepared

    def add(total: Params, grads: Params) -> Params:
        return jax.tree.map(lambda t, g: t + share * g.astype(jnp.float32), total, grads)

    if isinstance(terms, Chain):
        h, metrics = _chain_gradient(networks, settings, frozen, terms, prepared)

        def add_pass(carry: tuple[Params, jax.Array], one: Passes) -> tuple[tuple[Params, jax.Array], None]:
            total, h = carry
            grads, through = _pull_back(networks, settings, weights, frozen, batch.condition, one, h)
            return (add(total, grads), h + flow.per_sample(one.nesting, h.ndim) * through), None

        start = no_gradient(params) if total is None else total
        return jax.lax.scan(add_pass, (start, h), terms.passes)[0][0], metrics

    def differentiate(term: Term, given: Any, count: int = 1) -> tuple[Params, dict[str, jax.Array]]:
        condition, prepared = given

        def loss(weights: Params) -> tuple[jax.Array, dict[str, jax.Array]]:
            read = join(weights, frozen.base)
            return term_loss(networks, settings, read, frozen, condition, term, prepared, count)

        return jax.grad(loss, has_aux=True)(weights)

    count = terms.weight.shape[0]
    if settings.merge_terms or count == 1:  # compilers do less well inside of a loop
        grads, metrics = differentiate(*merge_terms(terms, given), count)
        if total is None:
            return jax.tree.map(lambda g: share * g.astype(jnp.float32), grads), metrics
        return add(total, grads), metrics

    def add_term(total: Params, term: Term) -> tuple[Params, dict[str, jax.Array]]:
        grads, metrics = differentiate(term, given)
        return add(total, grads), metrics

    total, metrics = jax.lax.scan(add_term, no_gradient(params) if total is None else total, terms)
    return total, {name: values[:, 0] for name, values in metrics.items()}


def _chain_gradient(
    networks: Networks, settings: Settings, frozen: Frozen, chain: Chain, prepared: Prepared
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss's gradient of a chain's scored latents [B, N, C], and the metrics."""

    def loss(latents: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        return chain_loss(networks, settings, frozen, latents, chain, prepared)

    return jax.grad(loss, has_aux=True)(chain.latents)


def _pull_back(
    networks: Networks, settings: Settings, weights: Params, frozen: Frozen, condition: Any, one: Passes, h: jax.Array
) -> tuple[Params, jax.Array]:
    """The gradients of the weights and of the input [B, N, C], of one pass whose velocity has ``coefficient * h``."""

    def field(weights: Params, x: jax.Array) -> jax.Array:
        return velocity(networks, settings, join(weights, frozen.base), condition, x, one.sigma, settings.guidance)

    _, back = jax.vjp(field, weights, one.state)
    return back(flow.per_sample(one.coefficient, h.ndim) * h)


def no_gradient(params: Params) -> Params:
    """Zeros to add gradients to, float32."""
    return jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)


def largest_of(params: Params) -> jax.Array:
    """The largest absolute value among parameters, float32; NaN if one is."""
    return jnp.stack([jnp.abs(leaf).max().astype(jnp.float32) for leaf in jax.tree.leaves(params)]).max()


# --- the update -------------------------------------------------------------------------------------------------------


def make_update(
    networks: Networks, settings: Settings, optimizer: Optimizer
) -> Callable[[TrainState, Frozen, Batch, jax.Array], tuple[TrainState, dict[str, jax.Array]]]:
    """Builds ``update(state, frozen, batch, key) -> (state, metrics)``, pure and ready for ``jax.jit``.

    ``key`` is the update's own (derived from the seed and the step number). Metrics are float32 scalars:
    ``NAME/loss``, ``NAME/reward`` and ``NAME/caption_reward`` for every term NAME, ``loss`` (their sum), ``grad_norm``
    (before clipping), ``skipped`` and ``largest_weight``.

    An update whose loss or gradient is not finite, or that could leave parameters which are not, changes nothing but
    the step number and the kept rollout; ``skipped`` is 1 then, else 0. So finite weights stay finite for ever;
    ``largest_weight``, the largest absolute value among them before the update, tells whether they were.
    """
    names = METHODS[settings.method].names(settings)

    def update(state: TrainState, frozen: Frozen, batch: Batch, key: jax.Array) -> tuple[TrainState, dict]:
        samples = len(jax.tree.leaves(batch.condition)[0])
        draws, parts, kept = draw(networks, settings, key, samples), settings.accumulation, None
        roll = functools.partial(images_of, networks, settings, state.params, frozen, batch, draws)
        if settings.reuse == 1:
            images = roll()
        else:
            # A new rollout at every so many updates, which are given the same prompts. The image keeps its noise: the
            # two belong to one trajectory. Grid positions and control words are new.
            renew = state.step % settings.reuse == 0
            kept = jax.lax.cond(renew, lambda: Rollout(roll().latents, draws.noise), lambda: state.rollout)
            images = Images(*kept)

        def add_part(total: Params, part: tuple[Batch, Images, Any]) -> tuple[Params, dict[str, jax.Array]]:
            return gradient(networks, settings, state.params, frozen, *part, total, 1 / parts)

        whole = batch._replace(latents=None), images, draws.own
        if parts == 1:
            grads, metrics = gradient(networks, settings, state.params, frozen, *whole)
        else:
            grads, metrics = jax.lax.scan(add_part, no_gradient(state.params), split_batch(whole, parts))
            metrics = jax.tree.map(lambda m: m.mean(0), metrics)

        norm = optax.tree.norm(grads)
        rounding_key = jax.random.fold_in(key, ROUNDING)
        loss, largest = metrics["loss"].sum(), largest_of(state.params)
        good = jnp.isfinite(loss) & jnp.isfinite(norm) & optimizer.keeps_finite(state.opt_state, norm, largest)
        params, opt_state = optimizer.apply(state.params, grads, state.opt_state, rounding_key, norm, good)
        ema = state.ema
        if ema is not None:
            decay = settings.ema_decay

            def follow(old: jax.Array, new: jax.Array) -> jax.Array:
                return jnp.where(good, decay * old + (1 - decay) * new.astype(jnp.float32), old)

            ema = jax.tree.map(follow, ema, params)
        summary = {"loss": loss, "grad_norm": norm, "skipped": 1.0 - good, "largest_weight": largest}
        for name in dict.fromkeys(names):
            places = [place for place, found in enumerate(names) if found == name]
            for metric, values in metrics.items():
                summary[f"{name}/{metric}"] = values[jnp.array(places)].mean() if places[1:] else values[places[0]]
        return TrainState(state.step + 1, params, opt_state, ema, kept), summary

    return update
