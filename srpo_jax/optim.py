"""The optimiser of the recipe: AdamW behind a clip of the gradient's global norm, and its state in fewer bits.

Bytes of a trained parameter, its gradient aside, by ``optim.weights`` and ``optim.moments``:

| weights | moments | bytes |
|---|---|---|
| float32 | float32 | 12, the recipe |
| bfloat16 | float32 | 10 |
| bfloat16 | bfloat16 | 6 |
| bfloat16 | float8 | 4.06 |

Everything is computed in float32; what is stored in fewer bits is rounded stochastically (``rounding``), without which
bfloat16 weights of the size of 1 do not move at all at a rate of 5e-6.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from srpo_jax import rounding
from srpo_jax.models.compute import Params

FLOAT8 = jnp.float8_e4m3fn


def learning_rate(optim: Any) -> optax.Schedule:
    """The learning rate by update (counted from 0): constant, after a linear rise over ``optim.warmup_steps``.

    The first update already moves: update i of w warmup updates has (i + 1) / w of the rate.
    """
    if not optim.warmup_steps:
        return optax.constant_schedule(optim.learning_rate)
    start = optim.learning_rate / optim.warmup_steps
    return optax.linear_schedule(start, optim.learning_rate, optim.warmup_steps - 1)


def make_optimizer(optim: Any) -> optax.GradientTransformationExtraArgs:
    """AdamW (arXiv 1711.05101) from the ``optim`` part of a config; decoupled weight decay on every parameter.

    Its ``update`` takes a ``key`` besides gradients (any float dtype), state and parameters, and returns float32
    updates for ``apply_updates``. The moving average of the weights and the accumulation of gradients belong to the
    training step, see ``step.make_update``.
    """
    adam = _in_float32(optax.scale_by_adam(optim.b1, optim.b2, optim.eps))
    if optim.moments != "float32":
        adam = _compressed(adam, optim.moments)
    return optax.chain(
        optax.clip_by_global_norm(optim.clip_norm),
        adam,
        optax.add_decayed_weights(optim.weight_decay),
        optax.scale_by_learning_rate(learning_rate(optim)),
    )


def apply_updates(params: Params, updates: Params, key: jax.Array) -> Params:
    """``params + updates`` in the dtypes of ``params``; what is not float32 is rounded stochastically."""

    def add(p: jax.Array, u: jax.Array, key: jax.Array) -> jax.Array:
        total = p.astype(jnp.float32) + u
        return total if p.dtype == jnp.float32 else rounding.stochastic(total, p.dtype, key)

    return jax.tree.map(add, params, updates, _keys(key, params))


def _in_float32(adam: optax.GradientTransformation) -> optax.GradientTransformation:
    """Adam whose moments are float32 whatever the parameters are."""

    def init(params: Params) -> optax.ScaleByAdamState:
        return adam.init(jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params))

    def update(grads: Params, state: optax.ScaleByAdamState, params: Params | None = None) -> Any:
        return adam.update(jax.tree.map(lambda g: g.astype(jnp.float32), grads), state, params)

    return optax.GradientTransformation(init, update)


# --- moments in fewer bits --------------------------------------------------------------------------------------------


class Moment(NamedTuple):
    """A moment of every parameter: ``values``, a tree like the parameters, and their scales if they are 8-bit floats
    (``rounding.Scaled``), else None."""

    values: Params
    scale: Params | None


class CompressedAdamState(NamedTuple):
    """Adam's state: updates done, the first moment, and the root of the second one, whose range is half as wide."""

    count: jax.Array
    mean: Moment
    root: Moment


def _compressed(adam: optax.GradientTransformation, moments: str) -> optax.GradientTransformationExtraArgs:
    """Adam with moments of type ``moments``, "bfloat16" or "float8", between updates."""
    eight = moments == "float8"
    dtype = jnp.dtype(FLOAT8 if eight else moments)

    def zeros(params: Params) -> Moment:
        values = jax.tree.map(lambda p: jnp.zeros(p.shape, dtype), params)
        if not eight:
            return Moment(values, None)
        return Moment(values, jax.tree.map(lambda p: jnp.ones(rounding.scale_shape(p.shape)), params))

    def read(moment: Moment) -> Params:
        if not eight:
            return jax.tree.map(lambda x: x.astype(jnp.float32), moment.values)
        return jax.tree.map(lambda x, s: rounding.unscaled(rounding.Scaled(x, s)), *moment)

    def write(moment: Params, key: jax.Array, floor: bool) -> Moment:
        keys = _keys(key, moment)
        if not eight:
            return Moment(jax.tree.map(lambda x, k: rounding.stochastic(x, dtype, k), moment, keys), None)
        pairs = jax.tree.map(lambda x, k: rounding.scaled(x, dtype, k, floor), moment, keys)
        inner = jax.tree.structure(rounding.Scaled(0, 0))
        return Moment(*jax.tree.transpose(jax.tree.structure(moment), inner, pairs))

    def init(params: Params) -> CompressedAdamState:
        return CompressedAdamState(jnp.zeros((), jnp.int32), zeros(params), zeros(params))

    def update(
        grads: Params, state: CompressedAdamState, params: Params | None = None, *, key: jax.Array, **extra: Any
    ) -> tuple[Params, CompressedAdamState]:
        whole = optax.ScaleByAdamState(state.count, read(state.mean), jax.tree.map(jnp.square, read(state.root)))
        updates, whole = adam.update(grads, whole, params)
        mean = write(whole.mu, jax.random.fold_in(key, 0), floor=False)
        root = write(jax.tree.map(jnp.sqrt, whole.nu), jax.random.fold_in(key, 1), floor=True)
        return updates, CompressedAdamState(whole.count, mean, root)

    return optax.GradientTransformationExtraArgs(init, update)


def _keys(key: jax.Array, tree: Any) -> Any:
    """A key for every leaf of a tree."""
    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(structure, [jax.random.fold_in(key, i) for i in range(len(leaves))])
