"""What the small world's trainers share: the loop with its checkpoints and lines, one step of an optimiser, keys.

A trainer says what is its own: network, data, loss, figures. ``fit`` does the rest in one piece. Whatever is random in
a step has to depend on a seed and the step's number alone: then a run that was broken off goes on, bit for bit, as if
it had not been.
"""

import math
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

from srpo_jax import seeds
from srpo_jax.errors import UserError
from srpo_jax.models.compute import Params

State = dict[str, Any]  # a tree of arrays: parameters, the optimiser's state, what else a trainer keeps
Values = dict[str, jax.Array]  # scalars of a step, by the names under which they are told
REPORT_EVERY = 25  # steps between two lines


def fit(
    name: str,
    folder: pathlib.Path,
    state: State,
    update: Callable[..., tuple[State, Values]],
    inputs: Callable[[int], tuple],
    steps: int,
    *,
    every: int = sys.maxsize,
    minutes: float = math.inf,
    keep: int = 1,
    show: Callable[[State], None] = lambda state: None,
) -> State:
    """Updates a state until ``steps`` steps are done, going on from the newest checkpoint if there is one.

    Args:
      name: what the lines begin with.
      folder: of the checkpoints, made if missing.
      state: to begin with; it stays as it is.
      update: ``(state, *inputs) -> (state, values)``, compiled; it may use up the memory of the state it is given.
      inputs: those of a step by its number, from 0 on.
      steps: in all, those of earlier calls included.
      every, minutes: steps and time between two checkpoints, whichever is over first; the last step always has one.
      keep: how many of the newest checkpoints stay.
      show: called with the state before every checkpoint; its time is not in the rate that is told.

    Returns:
      The state after the last step.

    Raises UserError if a value is not finite, before that state is shown and saved, or if the checkpoint is of another
    network.
    """
    state = jax.tree.map(jnp.copy, state)
    with ocp.CheckpointManager(folder.absolute(), options=ocp.CheckpointManagerOptions(max_to_keep=keep)) as manager:
        first = manager.latest_step() or 0
        if first:
            state = _restore(manager, first, state)
            print(f"{name}: resumed at step {first}", flush=True)
        untold, mark, saved = [], time.monotonic(), time.monotonic()
        for step in range(first, steps):
            state, values = update(state, *inputs(step))
            untold.append(values)
            done = step + 1
            saving = done == steps or done % every == 0 or time.monotonic() - saved > 60 * minutes

            # --- progress, and a check of everything that is about to be saved ---
            if saving or done % REPORT_EVERY == 0:
                means = {key: float(np.mean([values[key] for values in jax.device_get(untold)])) for key in values}
                rate = len(untold) / (time.monotonic() - mark)
                told = ", ".join(f"{key} {value:.4f}" for key, value in means.items())
                left = (steps - done) / rate / 60
                print(f"{name} {done}/{steps}: {told}; {rate:.2f} steps/s, {left:.1f} min left", flush=True)
                if broken := [key for key, value in means.items() if not math.isfinite(value)]:
                    raise UserError(
                        f"{name}: {', '.join(broken)} not finite at step {done}; lower the learning rate and go "
                        f"on from the newest checkpoint in {folder}, or choose another --workdir"
                    )
                untold, mark = [], time.monotonic()

            # --- figures, then the checkpoint: where there is one, nothing before it is left to do ---
            if saving:
                show(state)
                manager.save(done, args=ocp.args.StandardSave(state))
                manager.wait_until_finished()
                mark = saved = time.monotonic()
    return state


def _restore(manager: ocp.CheckpointManager, step: int, like: State) -> State:
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    try:
        return manager.restore(step, args=ocp.args.StandardRestore(abstract))
    except (ValueError, KeyError) as error:
        raise UserError(
            f"{manager.directory / str(step)} is a checkpoint of another network; choose another --workdir"
        ) from error


def descend(
    loss: Callable[..., tuple[jax.Array, Values]],
    transformation: optax.GradientTransformation,
    params: Params,
    opt_state: optax.OptState,
    *inputs: Any,
) -> tuple[Params, optax.OptState, Values]:
    """One step down the gradient of ``loss(params, *inputs) -> (loss, values)``, to be compiled by the caller.

    Returns (parameters, the optimiser's state, values).
    """
    gradient, values = jax.grad(loss, has_aux=True)(params, *inputs)
    updates, opt_state = transformation.update(gradient, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, values


def clipped_adamw(
    rate: float, warmup: int, plateau: int, decay: optax.Schedule, **settings: Any
) -> optax.GradientTransformation:
    """AdamW on gradients whose norm is at most 1.

    The rate rises to ``rate`` in ``warmup`` steps, stays there up to step ``plateau`` and then follows ``decay``, which
    counts from there. ``settings`` are those of ``optax.adamw``.
    """
    rise, level = optax.linear_schedule(0.0, rate, warmup), optax.constant_schedule(rate)
    schedule = optax.join_schedules([rise, level, decay], [warmup, plateau])
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, **settings))


def step_key(seed: int, step: int) -> jax.Array:
    """The random key of a step."""
    return jax.random.fold_in(seeds.key(seed), step)
