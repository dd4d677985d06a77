"""The model makes the images that it is then to improve: an Euler rollout without gradient, as cheap as can be.

    noise --S steps, no gradient--> x0

Weights are made ready for rollouts once an update: cast, in 8 bits, gathered onto every device, each block's apart.
Between the steps of a rollout, what the blocks in the middle changed may be kept (``rollout.cache``).
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from srpo_jax.algorithm import flow
from srpo_jax.algorithm.batch import Batch, join_batch, split_batch
from srpo_jax.algorithm.networks import Networks, conditioning, in_compute_dtype
from srpo_jax.algorithm.settings import Settings
from srpo_jax.models import lora
from srpo_jax.models.compute import Params, bind, path_name
from srpo_jax.models.eight_bit import EightBitKernel
from srpo_jax.models.stack import unstack


def with_transformer(networks: Networks, transformer: nnx.Module) -> tuple[Networks, Params]:
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
        if not networks.family.is_modulation(path):
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
        return leaf if placed or networks.family.is_modulation(name) else networks.gather(name, leaf)

    weights = jax.tree_util.tree_map_with_path(gather, weights)
    if not settings.rollout_unroll:
        return networks, weights
    transformer = bind(networks.transformer, weights)
    for name in type(transformer).STACKS:
        setattr(transformer, name, unstack(getattr(transformer, name)))
    return with_transformer(networks, transformer)


def rollout(
    networks: Networks,
    settings: Settings,
    params: Params,
    batch: Batch,
    noise: jax.Array,
    keep: jax.Array | None = None,
    weigh: jax.Array | None = None,
    stop: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """Makes images from ``noise`` without gradient, ``settings.accumulation`` parts of the batch one after the other.

    Args:
      networks, settings, params: of the update; ``params`` are the transformer's.
      batch: what the images are of.
      noise: [B, N, C].
      keep: steps [B, n] at whose start the state is kept, as in ``flow.sample``.
      weigh: weights [B, m, S] of the velocities in m sums over them.
      stop: how many steps each sample needs [B]; a part of the batch takes as many as one of its samples needs.

    Returns:
      Latents [B, N, C] where the rollout ended, the states [B, n, N, C] or None, the sums [B, m, N, C] or None.
    """
    networks, weights = for_rollout(networks, settings, params)
    family, transformer = networks.family, bind(networks.transformer, weights)
    sigmas = flow.shifted_schedule(settings.rollout_steps, settings.shift)
    size = settings.height, settings.width

    def roll(part: tuple[Any, ...]) -> Any:
        condition, noise, keep, weigh, stop = part
        times, scale = conditioning(settings, jnp.asarray(sigmas[:-1]), settings.rollout_guidance, len(noise))
        steps = family.prepare_steps(transformer, condition, times, scale)

        def field(x: jax.Array, sigma: jax.Array, index: jax.Array, change: Any) -> tuple[jax.Array, Any]:
            prepared = of_step(steps, index)
            if settings.cache == 1:
                v = family.velocity(transformer, x, condition, prepared, *size)
            else:
                cached = change, index % settings.cache == 0, settings.cache_ends
                v, change = family.cached_velocity(transformer, x, condition, prepared, *size, *cached)
            return v.astype(jnp.float32), change

        change: Any = ()
        if settings.cache > 1:
            change = family.no_change(transformer, noise, condition)
        last = None if stop is None else stop.max()
        made = flow.sample(field, noise, sigmas, keep, settings.solver, change, weigh, last)
        return made if isinstance(made, tuple) else (made, None, None)

    whole = batch.condition, noise, keep, weigh, stop
    if settings.accumulation == 1:
        made = roll(whole)
    else:
        made = join_batch(jax.lax.map(roll, split_batch(whole, settings.accumulation)))
    return jax.lax.stop_gradient(made)


def of_step(steps: Any, index: jax.Array) -> Any:
    """What was prepared for one step of ``Family.prepare_steps``."""
    return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False), steps)
