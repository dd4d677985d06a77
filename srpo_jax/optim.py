"""The optimiser of the recipe: AdamW behind a clip of the gradient's global norm, and its state in fewer bits.

Bytes of a trained parameter, its gradient aside, by ``optim.weights`` and ``optim.moments``:

| weights | moments | bytes |
|---|---|---|
| float32 | float32 | 12, the recipe |
| bfloat16 | float32 | 10 |
| bfloat16 | bfloat16 | 6 |
| bfloat16 | float8 | 4.06 |

With ``optim.offload`` the moments lie in the host's memory, and only what is being updated visits the device.

Everything is computed in float32; what is stored in fewer bits is rounded stochastically (``rounding``), without which
bfloat16 weights of the size of 1 do not move at all at a rate of 5e-6.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from srpo_jax import rounding
from srpo_jax.models.compute import Params

FLOAT8 = jnp.float8_e4m3fn
# Parameters that are updated at a time. A larger stack of layers is updated layer by layer, in its own memory: what is
# between gradient and weights, float32 all of it, is then as large as a layer and not as a stack.
LARGEST = 2**26
LARGEST_GRADIENT = 1e18  # whose square and its sums float32 holds


class Optimizer(NamedTuple):
    """What an update of a training step needs.

    Attributes:
      init: ``init(params) -> state``.
      apply: ``apply(params, grads, state, key, norm, good=True) -> (params, state)``: the parameters after the update,
        in their dtypes. ``grads`` are float32 and ``norm`` is their global norm; ``key`` is for stochastic rounding.
        Where ``good``, a boolean scalar, is false, both are as before, bit for bit; that takes no memory.
      keeps_finite: ``keeps_finite(state, norm, largest) -> bool scalar``: whether an update by a finite gradient of
        this norm leaves numbers finite, if none of the parameters is larger than ``largest``.
    """

    init: Callable[[Params], Any]
    apply: Callable[..., tuple[Params, Any]]
    keeps_finite: Callable[[Any, jax.Array, jax.Array], jax.Array]


class Moment(NamedTuple):
    """A moment of every parameter: ``values``, a tree like the parameters, and their scales if they are 8-bit floats
    (``rounding.Scaled``), else None."""

    values: Params
    scale: Params | None


class AdamState(NamedTuple):
    """Adam's state: updates done, the first moment, and the root of the second one, whose range is half as wide."""

    count: jax.Array
    mean: Moment
    root: Moment


def learning_rate(optim: Any) -> optax.Schedule:
    """The learning rate by update (counted from 0): constant, after a linear rise over ``optim.warmup_steps``.

    The first update already moves: update i of w warmup updates has (i + 1) / w of the rate.
    """
    if not optim.warmup_steps:
        return optax.constant_schedule(optim.learning_rate)
    start = optim.learning_rate / optim.warmup_steps
    return optax.linear_schedule(start, optim.learning_rate, optim.warmup_steps - 1)


def make_optimizer(optim: Any) -> Optimizer:
    """AdamW (arXiv 1711.05101) from the ``optim`` part of a config; decoupled weight decay on every parameter.

    The moving average of the weights and the accumulation of gradients belong to the training step, see
    ``step.make_update``.
    """
    adam, schedule = optax.scale_by_adam(optim.b1, optim.b2, optim.eps), learning_rate(optim)
    scaled = optim.moments == "float8"
    dtype = jnp.dtype(FLOAT8 if scaled else optim.moments)

    def zeros(params: Params) -> Moment:
        values = jax.tree.map(lambda p: jnp.zeros(p.shape, dtype), params)
        if not scaled:
            return Moment(values, None)
        return Moment(values, jax.tree.map(lambda p: jnp.ones(rounding.scale_shape(p.shape)), params))

    def on_device(moments: tuple[Moment, Moment]) -> tuple[Moment, Moment]:
        return jax.device_put(moments, jax.memory.Space.Device) if optim.offload else moments

    def read(moment: Moment) -> jax.Array:
        return rounding.unscaled(rounding.Scaled(*moment)) if scaled else moment.values.astype(jnp.float32)

    def write(x: jax.Array, key: jax.Array, floor: bool) -> Moment:
        return Moment(*rounding.scaled(x, dtype, key, floor)) if scaled else Moment(_store(x, dtype, key), None)

    def init(params: Params) -> AdamState:
        return AdamState(jnp.zeros((), jnp.int32), zeros(params), zeros(params))

    def apply(
        params: Params, grads: Params, state: AdamState, key: jax.Array, norm: jax.Array, good: jax.Array | bool = True
    ) -> tuple[Params, AdamState]:
        clip = jnp.minimum(1.0, optim.clip_norm / jnp.maximum(norm, jnp.finfo(jnp.float32).tiny))
        rate = schedule(state.count)

        def change(p: jax.Array, mean: Moment, root: Moment, grad: jax.Array, key: jax.Array) -> tuple:
            """Of one parameter, or of one layer of a stack of them."""
            keys = jax.random.split(key, 3)
            held = on_device((mean, root))
            before = optax.ScaleByAdamState(state.count, read(held[0]), jnp.square(read(held[1])))
            direction, after = adam.update(grad * clip, before)
            old = p.astype(jnp.float32)
            new = old - rate * (direction + optim.weight_decay * old)
            moments = write(after.mu, keys[0], floor=False), write(jnp.sqrt(after.nu), keys[1], floor=True)
            made = _store(new, p.dtype, keys[2]), *moments
            # Number by number, where the new one is made: the old tree is not kept beside the new one.
            p, *moments = jax.tree.map(lambda new, old: jnp.where(good, new, old), made, (p, *held))
            return p, *(jax.device_put(moments, jax.memory.Space.Host) if optim.offload else moments)

        structure = jax.tree.structure(params)
        columns = [_leaves(structure, tree) for tree in (params, state.mean, state.root, grads)]
        changed = [
            _by_layers(change, *row, jax.random.fold_in(key, number))
            for number, row in enumerate(zip(*columns, strict=True))
        ]
        params, mean, root = (_tree(structure, column) for column in zip(*changed, strict=True))
        return params, AdamState(state.count + jnp.asarray(good, jnp.int32), mean, root)

    def keeps_finite(state: AdamState, norm: jax.Array, largest: jax.Array) -> jax.Array:
        # A clipped gradient is no larger than its norm, the first moment than the gradients, and what it is divided by
        # is eps at the least: so far an update can move a parameter. Gradients whose squares are not finite come first.
        clipped = jnp.minimum(norm, optim.clip_norm)
        furthest = 2 * jnp.minimum(optim.clip_norm, LARGEST_GRADIENT) / optim.eps + optim.weight_decay * largest
        after = largest + schedule(state.count) * furthest
        return (clipped < LARGEST_GRADIENT) & (after < jnp.finfo(jnp.float32).max / 2)

    return Optimizer(init, apply, keeps_finite)


def _store(x: jax.Array, dtype: Any, key: jax.Array) -> jax.Array:
    return x if dtype == jnp.float32 else rounding.stochastic(x, dtype, key)


def _by_layers(change: Callable, p: jax.Array, mean: Moment, root: Moment, grad: jax.Array, key: jax.Array) -> tuple:
    """``change`` of a parameter; of a large stack, layer by layer in its own memory."""
    if p.size <= LARGEST or p.ndim < 3:
        return change(p, mean, root, grad, key)

    def layer(i: jax.Array, kept: tuple) -> tuple:
        taken, slope = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), (kept, grad))
        made = change(*taken, slope, jax.random.fold_in(key, i))
        return jax.tree.map(lambda x, new: jax.lax.dynamic_update_index_in_dim(x, new, i, 0), kept, made)

    return jax.lax.fori_loop(0, p.shape[0], layer, (p, mean, root))


def _leaves(structure: Any, tree: Any) -> list:
    """What belongs to each parameter, in order: arrays of a tree like the parameters, or ``Moment`` of arrays."""
    if not isinstance(tree, Moment):
        return structure.flatten_up_to(tree)
    scales = [None] * structure.num_leaves if tree.scale is None else structure.flatten_up_to(tree.scale)
    return [Moment(*pair) for pair in zip(structure.flatten_up_to(tree.values), scales, strict=True)]


def _tree(structure: Any, leaves: tuple) -> Any:
    """Undoes ``_leaves``."""
    if not isinstance(leaves[0], Moment):
        return structure.unflatten(leaves)
    scales = None if leaves[0].scale is None else structure.unflatten([leaf.scale for leaf in leaves])
    return Moment(structure.unflatten([leaf.values for leaf in leaves]), scales)
