"""The optimiser of the recipe: AdamW behind a clip of the gradient's global norm, on float32 weights."""

from typing import Any

import optax


def learning_rate(optim: Any) -> optax.Schedule:
    """The learning rate by update (counted from 0): constant, after a linear rise over ``optim.warmup_steps``.

    The first update already moves: update i of w warmup updates has (i + 1) / w of the rate.
    """
    if not optim.warmup_steps:
        return optax.constant_schedule(optim.learning_rate)
    start = optim.learning_rate / optim.warmup_steps
    return optax.linear_schedule(start, optim.learning_rate, optim.warmup_steps - 1)


def make_optimizer(optim: Any) -> optax.GradientTransformation:
    """AdamW (arXiv 1711.05101) from the ``optim`` part of a config; decoupled weight decay on every parameter.

    Moments have the dtype and the shape of the parameters. The moving average of the weights and the accumulation of
    gradients belong to the update, see ``step.make_update``.
    """
    return optax.chain(
        optax.clip_by_global_norm(optim.clip_norm),
        optax.adamw(learning_rate(optim), b1=optim.b1, b2=optim.b2, eps=optim.eps, weight_decay=optim.weight_decay),
    )
