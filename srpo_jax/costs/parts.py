"""An update taken apart: each of its parts as a program of its own, which can be compiled and timed alone.

The parts are those of ``work.PARTS`` and call the functions that the update calls, as the update does: rollouts on the
whole batch, the others on one part of it (``optim.accumulation``). What the compiler does across their borders is lost.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from srpo_jax import sharding
from srpo_jax.algorithm import methods, preference
from srpo_jax.algorithm import networks as calls
from srpo_jax.algorithm import rollout as rollouts
from srpo_jax.algorithm.batch import Batch
from srpo_jax.models.compute import join, path_name
from srpo_jax.program import Program, compiler_options, in_float32, with_sharding

INIT = 0.02  # half the range of random weights; norms keep the activations in bounds


class Part(NamedTuple):
    """A program and what it is called with.

    Attributes:
      name: one of ``work.PARTS``.
      function: jitted.
      arguments: trees of ``ShapeDtypeStruct`` with shardings.
      calls: how often it runs in an update; below 1 where a rollout serves several updates or is cut short.
    """

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    calls: float


def take_apart(config: ConfigDict, built: Program) -> Iterator[Part]:
    """The parts of a program, in the order in which an update runs them."""
    networks, settings, mesh = built.networks, built.settings, built.mesh
    passes, split = settings.accumulation, sharding.of_batch(mesh)
    count, cost = config.data.batch_size // passes, methods.cost(settings)
    # Samples of a gradient, and gradients of a part of the batch: of the transformer, and of what follows it.
    wide, taken, scored = count, cost.passes, cost.pictures
    if settings.merge_terms:
        wide, taken, scored = count * cost.pictures, 1, 1
    params, opt_state = built.state.params, built.state.opt_state
    frozen, base = built.frozen._replace(base=None), built.frozen.base
    in_place = jax.tree.map(lambda leaf: leaf.sharding, params)
    # An update casts its weights before it uses them: once for all rollouts, once for the gradients of a part.
    weights = jax.eval_shape(lambda params, base: calls.in_compute_dtype(networks, params, base), params, base)
    weights = with_sharding(weights, in_place)

    def rows(size: int, tree: Any) -> Any:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype, sharding=split), tree)

    def array(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((wide, *shape), jnp.float32, sharding=split)

    jit = functools.partial(jax.jit, compiler_options=compiler_options(mesh))
    batch = rows(count, built.batch)
    tokens = array(*networks.tokens(settings))
    picture = array(settings.height, settings.width, 3)

    def captions(frozen: Any, batch: Batch) -> Any:
        return preference.prepare(networks.rewards, frozen.rewards, batch.reward_tokens)

    def rollout(weights: Any, base: Any, batch: Batch, noise: jax.Array) -> jax.Array:
        return rollouts.rollout(networks, settings, join(weights, base), batch, noise)[0]

    def transformer(weights: Any, base: Any, batch: Batch, x: jax.Array, sigma: jax.Array, cotangent: jax.Array) -> Any:
        def product(weights: Any) -> jax.Array:
            given = join(weights, base), batch.condition, x, sigma, settings.guidance
            return jnp.vdot(cotangent, calls.velocity(networks, settings, *given))

        return jax.grad(product)(weights)

    def autoencoder(frozen: Any, x: jax.Array, cotangent: jax.Array) -> jax.Array:
        def product(x: jax.Array) -> jax.Array:
            return jnp.vdot(cotangent, calls.decode(networks, settings, frozen.autoencoder, x))

        return jax.grad(product)(x)

    prepared = rows(wide, jax.eval_shape(captions, frozen, batch))
    followed = methods.follows(settings)

    def reward(frozen: Any, decoded: jax.Array, prepared: Any) -> jax.Array:
        def total(decoded: jax.Array) -> jax.Array:
            seen = preference.look(networks.rewards, frozen.rewards, calls.to_unit_range(decoded))
            weights = {variant: jnp.ones(len(decoded)) for variant in followed}
            return preference.mixture(networks.rewards, frozen.rewards, seen, prepared, weights).sum()

        return jax.grad(total)(decoded)

    def optimizer(params: Any, opt_state: Any, grads: Any) -> tuple[Any, Any]:
        return built.optimizer.apply(params, grads, opt_state, jax.random.key(0), optax.tree.norm(grads))

    yield Part("captions", jit(captions), (frozen, batch), passes)
    if config.data.images == "rollout":
        whole = built.batch, rows(config.data.batch_size, tokens)
        yield Part("rollout", jit(rollout), (weights, base, *whole), cost.rollout / settings.rollout_steps)
    arguments = weights, base, rows(wide, batch), tokens, array(), tokens
    yield Part("transformer", jit(transformer, out_shardings=in_place), arguments, taken * passes)
    yield Part("autoencoder", jit(autoencoder), (frozen, tokens, picture), scored * passes)
    yield Part("reward", jit(reward), (frozen, picture, prepared), scored * passes)
    yield Part(
        "optimizer",
        jit(
            optimizer,
            donate_argnums=(0, 1),
            out_shardings=(in_place, jax.tree.map(lambda leaf: leaf.sharding, opt_state)),
        ),
        (params, opt_state, in_float32(params)),
        1,
    )


def fill(tree: Any) -> Any:
    """Arrays for a tree of ``ShapeDtypeStruct``, made where they belong: each device makes its own shards.

    Weights and inputs are evenly spread numbers (weights in +-``INIT``, inputs in +-1), the scales of norms 1, integers
    0. They are as good as random for a clock, and are made in no time at any size.
    """

    def make(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        # What has a name is a weight.
        name = path_name(tuple(entry for entry in path if hasattr(entry, "key"))).rpartition(".")[2]
        limit = 0.0 if name == "scale" else INIT if name else 1.0
        return _maker(leaf.shape, leaf.dtype, leaf.sharding, limit)()

    return jax.tree_util.tree_map_with_path(make, tree)


@functools.cache
def _maker(shape: tuple[int, ...], dtype: Any, where: Any, limit: float) -> Callable[[], jax.Array]:
    """A compiled program that makes numbers in +-limit, or ones for 0."""

    def make() -> jax.Array:
        if not jnp.issubdtype(dtype, jnp.floating):
            return jnp.zeros(shape, dtype)
        if not limit:
            return jnp.ones(shape, dtype)
        place = jnp.zeros(shape, jnp.uint32)
        for axis, size in enumerate(shape):
            place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
        # Multiples of the golden ratio modulo 1 fill the unit interval evenly (Weyl).
        unit = (place * jnp.uint32(0x9E3779B9)).astype(jnp.float32) * jnp.float32(2.0**-32)
        return (limit * (2 * unit - 1)).astype(dtype)

    return jax.jit(make, out_shardings=where)
