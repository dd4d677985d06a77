"""One update: rollout -> gradient-carrying steps -> rewards -> ``jax.grad`` -> optimiser. What training compiles.

    noise --Euler, no gradient--> x0 --method--> terms --transformer, recover, decode, reward--> losses --> gradient
    --> AdamW

The batch is global; it may pass in parts (gradient accumulation) with the same result up to the order of sums, since
every random number of a sample is drawn for the whole batch first. All parts are rolled out before the first gradient,
so that the weights are made ready for rollouts once. Terms (SRPO's two branches) run one after the other in a scan, in
the memory of one, or merged into one batch (``optim.merge_terms``).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax import nnx

from srpo_jax.algorithm import direct_align, flow, methods, rewards
from srpo_jax.algorithm.methods import Term
from srpo_jax.algorithm.rewards import Reward
from srpo_jax.algorithm.settings import Settings
from srpo_jax.models import lora
from srpo_jax.models.compute import Params, bind, cast_weights, join, path_name
from srpo_jax.models.eight_bit import EightBitKernel
from srpo_jax.models.flux import Flux, is_modulation
from srpo_jax.models.stack import unstack
from srpo_jax.optim import Optimizer


class Rollout(NamedTuple):
    """Images that the model made, ``latents`` [B, N, 64] (clean, packed), from ``noise`` of the same shape; float32."""

    latents: jax.Array
    noise: jax.Array


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


def _where_it_lies(path: str, leaf: jax.Array) -> jax.Array:
    """Leaves a parameter where it is."""
    del path
    return leaf


@dataclasses.dataclass(frozen=True)
class Networks:
    """The graph definitions that an update runs; parameters come as arguments.

    Attributes:
      transformer: of ``models.flux.Flux``.
      guidance: whether that transformer has a guidance embedding.
      autoencoder: of ``models.autoencoder.Autoencoder``.
      rewards: the mixture, by name.
      gather: called as ``gather(path, leaf)`` on each of the transformer's parameters before rollouts; returns it,
        perhaps put onto every device.
    """

    transformer: nnx.GraphDef
    guidance: bool
    autoencoder: nnx.GraphDef
    rewards: dict[str, Reward]
    gather: Callable[[str, jax.Array], jax.Array] = _where_it_lies


class Frozen(NamedTuple):
    """Parameters that training reads and never changes; ``base`` is the rest of the transformer's, beside low-rank
    factors that are trained (LoRA), or None."""

    autoencoder: Params
    rewards: dict[str, Params]
    base: Params | None = None


class Batch(NamedTuple):
    """What one update is conditioned on, B samples over all devices.

    Attributes:
      text: T5 features ``[B, T, C]``.
      pooled: CLIP-L features ``[B, P]``.
      reward_ids: by reward, int32 token ids ``[B, T']`` of the "positive" and "negative" captions (with control
        words) and of the plain "caption".
      latents: clean packed latents of images ``[B, N, 64]``: real ones, or those that a rollout made (ReFL: states
        that it stopped at); None before that.
    """

    text: jax.Array
    pooled: jax.Array
    reward_ids: dict[str, dict[str, jax.Array]]
    latents: jax.Array | None = None


# --- randomness: one key per purpose, drawn for the whole batch -----------------------------------------------------


class Draws(NamedTuple):
    """The random numbers of an update: ``noise`` [B, N, 64], grid positions ``mid`` [B], rollout steps before a late
    stop ``stop`` [B] (ReFL), and ``renoise`` [B, n, N, 64] (DRaFT-LV). What a method does not use is None."""

    noise: jax.Array
    mid: jax.Array | None
    stop: jax.Array | None
    renoise: jax.Array | None


def draw(settings: Settings, key: jax.Array, batch: int) -> Draws:
    """Draws an update's random numbers for ``batch`` samples from the update's key."""
    noise_key, mid_key, stop_key, renoise_key = (jax.random.fold_in(key, purpose) for purpose in range(4))
    shape = (settings.tokens, settings.token_width)
    count = 1 if settings.shared_noise else batch
    noise = jnp.broadcast_to(jax.random.normal(noise_key, (count, *shape)), (batch, *shape))
    mid = stop = renoise = None
    if settings.method in ("srpo", "direct_align"):
        mid = direct_align.sample_mid(mid_key, batch, settings.grid.length)
    elif settings.method == "refl":
        first = settings.rollout_steps - settings.late_steps
        stop = jax.random.randint(stop_key, (batch,), first, settings.rollout_steps)
    elif settings.method == "draft_lv":
        renoise = jax.random.normal(renoise_key, (batch, settings.renoisings, *shape))
    return Draws(noise, mid, stop, renoise)


# --- the transformer ------------------------------------------------------------------------------------------------


def velocity(
    networks: Networks,
    settings: Settings,
    params: Params,
    batch: Batch,
    x: jax.Array,
    sigma: jax.Array,
    guidance: float,
) -> jax.Array:
    """The transformer's velocity, float32, at latents ``x`` [B, N, 64] and noise level ``sigma`` (scalar or [B])."""
    levels = jnp.broadcast_to(jnp.asarray(sigma), (len(x),))
    time, scale = conditioning(networks, settings, levels, guidance, len(x))
    ids = position_ids(settings, batch)
    return bind(networks.transformer, params)(x, batch.text, batch.pooled, time, scale, *ids).astype(jnp.float32)


def conditioning(
    networks: Networks, settings: Settings, sigma: jax.Array, guidance: float, count: int
) -> tuple[jax.Array, jax.Array | None]:
    """The times that the transformer is given at noise levels ``sigma``, of their shape, and its guidance [count] or
    None."""
    time, scale = flow.truncate_time(sigma), jnp.full((count,), guidance, jnp.float32)
    if settings.round_time:
        # The released script's autocast rounds what enters the sinusoids: 822 becomes 820, 3500 becomes 3504.
        time, scale = (
            (value.astype(jnp.bfloat16) * jnp.bfloat16(1000)).astype(jnp.float32) / 1000 for value in (time, scale)
        )
    return time, scale if networks.guidance else None


def position_ids(settings: Settings, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Of the image tokens, and of the text tokens."""
    image = flow.image_ids(settings.latent_height, settings.latent_width)
    return jnp.asarray(image), jnp.asarray(flow.text_ids(batch.text.shape[1]))


def in_compute_dtype(networks: Networks, params: Params, base: Params | None = None) -> Params:
    """The transformer's parameters as its layers use them: cast once, where they are about to be used many times.

    With ``base`` (``Frozen``), which has its dtype already, ``params`` are the rest.
    """
    return cast_weights(params, bind(networks.transformer, join(params, base)).compute.dtype)


def with_transformer(networks: Networks, transformer: Flux) -> tuple[Networks, Params]:
    """The networks with another transformer, and its parameters."""
    graphdef, state = nnx.split(transformer)
    return dataclasses.replace(networks, transformer=graphdef), nnx.to_pure_dict(state)


def in_eight_bits(networks: Networks, params: Params, kind: str) -> tuple[Networks, Params]:
    """The networks with a transformer whose blocks multiply 8-bit numbers, and its parameters.

    Modulations stay as they are: they read one vector a sample, and all tokens follow them. What ``Networks.gather``
    is asked to move are the 8-bit numbers.
    """
    transformer = bind(networks.transformer, params)
    for path, (module, name) in lora.layers(transformer).items():
        if not is_modulation(path):
            layer = getattr(module, name)
            layer.kernel = EightBitKernel(layer.kernel[...], kind, functools.partial(networks.gather, f"{path}.kernel"))
    return with_transformer(networks, transformer)


def for_rollout(networks: Networks, settings: Settings, params: Params) -> tuple[Networks, Params]:
    """The networks and the transformer's parameters as rollouts use them: cast, in 8 bits if that is asked for
    (``rollout.dtype``), gathered but for those of modulations (``rollout.gather``), and each block's apart
    (``rollout.unroll``)."""
    weights, eight_bits = in_compute_dtype(networks, params), settings.rollout_dtype != "model"
    if eight_bits:
        networks, weights = in_eight_bits(networks, weights, settings.rollout_dtype)

    def gather(path: tuple, leaf: jax.Array) -> jax.Array:
        name = path_name(path)
        placed = eight_bits and name.endswith((".codes", ".scales"))
        # A rollout reads the kernels of modulations once, and not at every step.
        return leaf if placed or is_modulation(name) else networks.gather(name, leaf)

    weights = jax.tree_util.tree_map_with_path(gather, weights)
    if not settings.rollout_unroll:
        return networks, weights
    transformer = bind(networks.transformer, weights)
    for name in lora.STACKS:
        setattr(transformer, name, unstack(getattr(transformer, name)))
    return with_transformer(networks, transformer)


def rollout(
    networks: Networks,
    settings: Settings,
    params: Params,
    batch: Batch,
    noise: jax.Array,
    stop: jax.Array | None = None,
) -> jax.Array:
    """Latents [B, N, 64] made from ``noise`` without gradient, ``settings.accumulation`` parts of the batch one after
    the other; ``stop`` as in ``flow.sample``."""
    networks, weights = for_rollout(networks, settings, params)
    transformer = bind(networks.transformer, weights)
    sigmas = flow.shifted_schedule(settings.rollout_steps, settings.shift)

    def roll(part: tuple[Batch, jax.Array, jax.Array | None]) -> jax.Array:
        batch, noise, stop = part
        levels = jnp.asarray(sigmas[:-1])
        times, scale = conditioning(networks, settings, levels, settings.rollout_guidance, len(noise))
        steps = transformer.modulations_of_steps(batch.pooled, times, scale)
        ids = position_ids(settings, batch)

        def field(x: jax.Array, sigma: jax.Array, index: jax.Array, change: Any) -> tuple[jax.Array, Any]:
            inputs = x, batch.text, steps.of_step(index), *ids
            if settings.cache == 1:
                return transformer.modulated(*inputs).astype(jnp.float32), change
            renew = index % settings.cache == 0
            v, change = transformer.through_cache(inputs, change, renew, settings.cache_ends)
            return v.astype(jnp.float32), change

        change = ()
        if settings.cache > 1:
            change = transformer.no_change(len(noise), batch.text.shape[1] + settings.tokens)
        return flow.sample(field, noise, sigmas, stop, settings.solver, change)

    whole = batch, noise, stop
    if settings.accumulation == 1:
        made = roll(whole)
    else:
        made = join_batch(jax.lax.map(roll, split_batch(whole, settings.accumulation)))
    return jax.lax.stop_gradient(made)


def decode(networks: Networks, settings: Settings, params: Params, tokens: jax.Array) -> jax.Array:
    """Packed latents [B, N, 64] to the decoder's raw output [B, H, W, 3], about -1 .. 1 and not clipped."""
    autoencoder = bind(networks.autoencoder, params)
    latents = flow.unpack(tokens, settings.latent_height, settings.latent_width)
    return autoencoder.decode(autoencoder.unscale_latents(latents))


def to_unit_range(decoded: jax.Array) -> jax.Array:
    """The decoder's output to an image in [0, 1]; no gradient where it is clipped."""
    return jnp.clip(decoded / 2 + 0.5, 0.0, 1.0)


# --- terms ----------------------------------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """Everything that happens in one term, in order: velocity and recovered latents [B, N, 64], the decoder's output
    [B, H, W, 3], image features by reward [B, E], reward [B]. A compiled update keeps what its metrics use."""

    velocity: jax.Array
    recovered: jax.Array
    decoded: jax.Array
    features: dict[str, jax.Array]
    reward: jax.Array


def run_term(
    networks: Networks, settings: Settings, params: Params, frozen: Frozen, batch: Batch, term: Term
) -> Outcome:
    """Takes a term's transformer step, recovers, decodes and scores the image."""
    v = velocity(networks, settings, params, batch, term.noisy, term.sigma_from, settings.guidance)
    recovered = direct_align.recover(term.noisy, v, term.noise, term.sigma_from, term.sigma_to)
    decoded = decode(networks, settings, frozen.autoencoder, recovered)
    features = rewards.embed_images(networks.rewards, frozen.rewards, to_unit_range(decoded))
    reward = rewards.mixture(networks.rewards, frozen.rewards, features, term.targets)
    return Outcome(v, recovered, decoded, features, reward)


def embed_captions(networks: Networks, frozen: Frozen, batch: Batch) -> methods.Embeddings:
    """Unit-norm text features [B, E] of every caption variant, by reward."""
    return {
        name: {variant: reward.embed_text(frozen.rewards[name], ids) for variant, ids in batch.reward_ids[name].items()}
        for name, reward in networks.rewards.items()
    }


def make_terms(settings: Settings, batch: Batch, draws: Draws, text: methods.Embeddings) -> Term:
    """Lays out the method's terms, a stack, on a batch that has its latents."""
    sigmas, x0 = flow.shifted_schedule(settings.rollout_steps, settings.shift), batch.latents
    if settings.method == "refl":
        return methods.refl(x0, jnp.asarray(sigmas)[draws.stop], text)
    if settings.method == "draft_lv":
        return methods.draft_lv(x0, draws.renoise.swapaxes(0, 1), float(sigmas[-2]), text)
    if settings.method == "direct_align":
        return methods.direct_align_only(x0, draws.noise, draws.mid, settings.grid, text, settings.weights)
    return methods.srpo(x0, draws.noise, draws.mid, settings.grid, text, form=settings.form, branches=settings.branches)


def term_loss(
    networks: Networks,
    settings: Settings,
    params: Params,
    frozen: Frozen,
    batch: Batch,
    term: Term,
    captions: dict[str, jax.Array],
    count: int = 1,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """A term's loss, ``mean(weight * relu(margin - reward))``, and its metrics (means over the samples), each ``[1]``.

    ``count`` > 1 says that so many terms were merged (``merge_terms``): the loss is their sum, the metrics ``[count]``.
    The metric ``caption_reward`` is the reward of the image under its plain caption, without control words.
    """
    outcome = run_term(networks, settings, params, frozen, batch, term)
    plain = rewards.mixture(networks.rewards, frozen.rewards, outcome.features, captions)
    metrics = {
        "loss": term.weight * rewards.hinge(outcome.reward, settings.margin),
        "reward": outcome.reward,
        "caption_reward": plain,
    }
    metrics = {name: values.reshape(-1, count).mean(0) for name, values in metrics.items()}
    return metrics["loss"].sum(), metrics


def merge_terms(batch: Batch, terms: Term, captions: dict[str, jax.Array]) -> tuple[Batch, Term, dict[str, jax.Array]]:
    """A stack of T terms of B samples as one term of B * T samples, and what they are conditioned on.

    The terms of a sample follow each other, so that a batch split over devices stays where it is.
    """
    count = terms.weight.shape[0]
    batch, captions = jax.tree.map(lambda x: jnp.repeat(x, count, axis=0), (batch, captions))
    return batch, join_batch(terms), captions


def gradient(
    networks: Networks,
    settings: Settings,
    params: Params,
    frozen: Frozen,
    batch: Batch,
    draws: Draws,
    total: Params | None = None,
    share: float = 1.0,
) -> tuple[Params, dict[str, jax.Array]]:
    """The gradient of one part of a batch that has its latents, summed over the method's terms, and metrics
    ``[terms]`` by name.

    It is added to ``total``, if that is given: parts and terms then share one sum, and not a sum of sums, each of which
    is as large as the parameters. Sums are float32, whatever the parameters are. ``share`` scales what is added, as for
    a mean over parts of a batch.
    """
    text = embed_captions(networks, frozen, batch)
    weights = in_compute_dtype(networks, params, frozen.base)
    terms = make_terms(settings, batch, draws, text)
    captions = {name: embeddings["caption"] for name, embeddings in text.items()}

    def differentiate(
        batch: Batch, term: Term, captions: dict[str, jax.Array], count: int = 1
    ) -> tuple[Params, dict[str, jax.Array]]:
        def loss(weights: Params) -> tuple[jax.Array, dict[str, jax.Array]]:
            read = join(weights, frozen.base)
            return term_loss(networks, settings, read, frozen, batch, term, captions, count)

        return jax.grad(loss, has_aux=True)(weights)

    def add(total: Params, grads: Params) -> Params:
        return jax.tree.map(lambda t, g: t + share * g.astype(jnp.float32), total, grads)

    count = terms.weight.shape[0]
    if settings.merge_terms or count == 1:  # compilers do less well inside of a loop
        grads, metrics = differentiate(*merge_terms(batch, terms, captions), count)
        if total is None:
            return jax.tree.map(lambda g: share * g.astype(jnp.float32), grads), metrics
        return add(total, grads), metrics

    def add_term(total: Params, term: Term) -> tuple[Params, dict[str, jax.Array]]:
        grads, metrics = differentiate(batch, term, captions)
        return add(total, grads), metrics

    total, metrics = jax.lax.scan(add_term, no_gradient(params) if total is None else total, terms)
    return total, {name: values[:, 0] for name, values in metrics.items()}


def no_gradient(params: Params) -> Params:
    """Zeros to add gradients to, float32."""
    return jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)


# --- the update -----------------------------------------------------------------------------------------------------


def split_batch(tree: Any, parts: int) -> Any:
    """``[B, ...]`` leaves to ``[parts, B / parts, ...]``. Every part takes each parts-th sample, so that a batch
    split over devices stays where it is."""
    return jax.tree.map(lambda x: x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1), tree)


def join_batch(tree: Any) -> Any:
    """The inverse of ``split_batch``."""
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(x.shape[0] * x.shape[1], *x.shape[2:]), tree)


def with_latents(
    networks: Networks, settings: Settings, params: Params, frozen: Frozen, batch: Batch, draws: Draws
) -> Batch:
    """The batch with its latents: those it has, or a rollout's."""
    if batch.latents is not None:
        return batch
    made = rollout(networks, settings, join(params, frozen.base), batch, draws.noise, draws.stop)
    return batch._replace(latents=made)


def make_update(
    networks: Networks, settings: Settings, optimizer: Optimizer
) -> Callable[[TrainState, Frozen, Batch, jax.Array], tuple[TrainState, dict[str, jax.Array]]]:
    """Builds ``update(state, frozen, batch, key) -> (state, metrics)``, pure and ready for ``jax.jit``.

    ``key`` is the update's own (derived from the seed and the step number). Metrics are float32 scalars:
    ``NAME/loss``, ``NAME/reward`` and ``NAME/caption_reward`` for every term NAME, ``loss`` (their sum) and
    ``grad_norm`` (before clipping).
    """

    def update(state: TrainState, frozen: Frozen, batch: Batch, key: jax.Array) -> tuple[TrainState, dict]:
        draws = draw(settings, key, batch.text.shape[0])
        parts = settings.accumulation
        kept = None
        roll = functools.partial(with_latents, networks, settings, state.params, frozen, batch, draws)
        if settings.reuse == 1:
            batch = roll()
        else:
            # A new rollout at every so many updates, which are given the same prompts. The image keeps its noise: the
            # two belong to one trajectory. Grid positions and control words are new.
            renew = state.step % settings.reuse == 0
            kept = jax.lax.cond(renew, lambda: Rollout(roll().latents, draws.noise), lambda: state.rollout)
            batch, draws = batch._replace(latents=kept.latents), draws._replace(noise=kept.noise)

        def add_part(total: Params, part: tuple[Batch, Draws]) -> tuple[Params, dict[str, jax.Array]]:
            return gradient(networks, settings, state.params, frozen, *part, total, 1 / parts)

        if parts == 1:
            grads, metrics = gradient(networks, settings, state.params, frozen, batch, draws)
        else:
            grads, metrics = jax.lax.scan(add_part, no_gradient(state.params), split_batch((batch, draws), parts))
            metrics = jax.tree.map(lambda m: m.mean(0), metrics)

        norm = optax.tree.norm(grads)
        rounding_key = jax.random.fold_in(key, 4)  # 0 to 3: see draw
        params, opt_state = optimizer.apply(state.params, grads, state.opt_state, rounding_key, norm)
        ema = state.ema
        if ema is not None:
            decay = settings.ema_decay
            ema = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new.astype(jnp.float32), ema, params)
        summary = {"loss": metrics["loss"].sum(), "grad_norm": norm}
        for index, name in enumerate(settings.term_names):
            for metric, values in metrics.items():
                # Several re-noisings share one name: their mean stands for them.
                chosen = values[index] if len(settings.term_names) == len(values) else values.mean()
                summary[f"{name}/{metric}"] = chosen
        return TrainState(state.step + 1, params, opt_state, ema, kept), summary

    return update
