"""Trains the small world's FLUX pipeline from nothing: the transformer with a small T5 and a small CLIP text encoder.

    python -m srpo_jax.emoji.train_flow --workdir=/tmp/flow --vae=/tmp/vae/ours

The same workdir resumes. Two stages, each with checkpoints of its own:

  teacher   flow matching (Lipman et al., arXiv 2210.02747; noise levels as in Esser et al., arXiv 2403.03206, 3.1) on
            the latents of the world's pictures. A caption names its style ("3D. red apple") or leaves it open ("red
            apple"), so that the model draws a bare caption in any of the styles; a tenth of the captions is empty.
  student   classifier-free guidance distilled into the guidance input, after Meng et al. (arXiv 2210.03142), as is
            told of FLUX.1-dev: at guidance g the target is ``v + (g - 1) * (v - v_empty)`` of the teacher's average.
            Guidance 1 stays the plain conditional model, and one forward pass draws what took the teacher two.

Now and then, and at the end, ``WORKDIR/pipeline`` is written anew: a diffusers ``FluxPipeline`` folder in bfloat16.
The shipped pipeline took 47 minutes on two CPU cores that had other work too (931 steps of a teacher
planned for 3,300, then resumed with the defaults) and ended at losses of 0.21 and 0.50. At guidance 3.5 the judge names
the concept in 98 % of the pictures of bare captions; it calls 11 % of them 3D, 56 % Flat, 34 % Mono.
"""

import argparse
import dataclasses
import functools
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from srpo_jax import command, errors, text
from srpo_jax.algorithm import flow
from srpo_jax.emoji import training
from srpo_jax.emoji.flow_data import FlowData, draw_batch, load_world
from srpo_jax.emoji.flow_networks import FlowNetworks, make_flow_networks
from srpo_jax.emoji.flow_results import SampleSheet, write_pipeline
from srpo_jax.models.compute import Params

GUIDANCE = (1.0, 5.0)  # the range that is distilled
FAVOURED = (1.0, 2.0, 3.5)  # guidances that a third of the distilled samples have: those that are used later
TEACHER_GUIDANCE, STUDENT_GUIDANCE = 2.5, 3.5  # of sample sheets
AVERAGE = 0.998  # decay of the weights' moving average
Losses = tuple[jax.Array, training.Values]  # a loss and what is told of it


def teacher_loss(networks: FlowNetworks, batch: int, params: Params, data: FlowData, key: jax.Array) -> Losses:
    """Flow matching's mean squared error over a batch drawn with ``key``."""
    caption, sigma, noisy, target = draw_batch(data, key, batch)
    encoded = networks.encode(params, data.t5_ids[caption], data.clip_ids[caption])
    velocity = networks.velocity(params, noisy, sigma, jnp.ones_like(sigma), encoded)
    loss = jnp.mean(jnp.square(velocity - target))
    return loss, {"loss": loss}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Teacher:
    """What the student learns from.

    Attributes:
      data: as the teacher's.
      params: the first stage's averaged parameters.
      encoded: (text, pooled) of all captions by the teacher's text encoders, which the student keeps.
    """

    data: FlowData
    params: Params
    encoded: tuple[jax.Array, jax.Array]


def student_loss(networks: FlowNetworks, batch: int, params: Params, teacher: Teacher, key: jax.Array) -> Losses:
    """Mean squared error to the guided velocity of the teacher; ``params`` are ``{"transformer": ...}``."""
    draw_key, *keys = jax.random.split(key, 4)
    caption, sigma, noisy, _ = draw_batch(teacher.data, draw_key, batch)
    guidance = jax.random.uniform(keys[0], (batch,), minval=GUIDANCE[0], maxval=GUIDANCE[1])
    favoured = jax.random.choice(keys[1], jnp.asarray(FAVOURED), (batch,))
    guidance = jnp.where(jax.random.uniform(keys[2], (batch,)) < 1 / 3, favoured, guidance)
    given = jax.tree.map(lambda table: table[caption], teacher.encoded)
    empty = jax.tree.map(lambda table: jnp.broadcast_to(table[-1], (batch, *table.shape[1:])), teacher.encoded)

    both = jax.tree.map(lambda *parts: jnp.concatenate(parts), given, empty)
    twice = jnp.tile(noisy, (2, 1, 1)), jnp.tile(sigma, 2)
    conditional, unconditional = jnp.split(networks.velocity(teacher.params, *twice, jnp.ones(2 * batch), both), 2)
    target = conditional + flow.per_sample(guidance - 1, 3) * (conditional - unconditional)
    velocity = networks.velocity(params, noisy, sigma, guidance, given)
    loss = jnp.mean(jnp.square(velocity - target))
    return loss, {"loss": loss}


def train_stage(
    name: str,
    workdir: pathlib.Path,
    loss: Callable[[Params, Any, jax.Array], Losses],
    params: Params,
    constants: Any,
    rate: float,
    steps: int,
    minutes: float,
    show: Callable[[Params], None],
) -> Params:
    """Trains one stage to its end, from its last checkpoint if there is one.

    Args:
      name: of the stage and of its folder of checkpoints.
      workdir: of the command.
      loss: of (parameters, constants, random key).
      params: to begin with.
      constants: arrays that the loss needs.
      rate: of learning; it rises at first and falls over the last 70 % of the steps to nearly zero.
      steps: updates in all.
      minutes: between two checkpoints.
      show: called with the averaged parameters before every checkpoint.

    Returns:
      The moving average of the parameters.
    """
    warmup, fall = min(100, steps // 10 + 1), int(0.7 * steps)
    decay = optax.linear_schedule(rate, 0.02 * rate, fall)
    transformation = training.clipped_adamw(rate, warmup, steps - fall, decay, b2=0.98, weight_decay=0.01)

    @functools.partial(jax.jit, donate_argnums=0)
    def update(state: training.State, constants: Any, step: jax.Array) -> tuple[training.State, training.Values]:
        key = training.step_key(0, step)
        new, moments, values = training.descend(loss, transformation, state["params"], state["moments"], constants, key)
        kept = jnp.minimum(AVERAGE, (1.0 + step) / (10.0 + step))
        average = jax.tree.map(lambda a, b: kept * a + (1 - kept) * b, state["average"], new)
        return {"params": new, "moments": moments, "average": average}, values

    state = training.fit(
        name,
        workdir / name,
        {"params": params, "moments": transformation.init(params), "average": params},
        update,
        lambda step: (constants, jnp.asarray(step)),
        steps,
        minutes=minutes,
        show=lambda state: show(state["average"]),
    )
    return state["average"]


def make_pipeline(flags: argparse.Namespace) -> None:
    """Both stages, then the export."""
    workdir = flags.workdir
    workdir.mkdir(parents=True, exist_ok=True)
    data = load_world(flags.vae, workdir)
    sizes = [len(text.load_tokenizer(workdir / name)) for name in ("tokenizer", "tokenizer_2")]
    networks, params = make_flow_networks(*sizes, flags.seed)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    deviation = float(data.tokens.std())
    print(f"{count / 1e6:.2f} M parameters, {data.pictures} pictures, latents' deviation {deviation:.3f}", flush=True)
    sheet = SampleSheet(networks, data, flags.vae)
    target = workdir / "pipeline"

    def show_teacher(average: Params) -> None:
        sheet(average, TEACHER_GUIDANCE, False, workdir / "teacher.png")
        write_pipeline(average, networks, flags.vae, workdir, target)

    loss = functools.partial(teacher_loss, networks, flags.batch)
    rate, steps = flags.learning_rate, flags.steps
    teacher = train_stage("teacher", workdir, loss, params, data, rate, steps, flags.minutes, show_teacher)

    def show_student(average: Params) -> None:
        sheet(teacher | average, STUDENT_GUIDANCE, True, workdir / "student.png")
        write_pipeline(teacher | average, networks, flags.vae, workdir, target)

    constants = Teacher(data, teacher, jax.jit(networks.encode)(teacher, data.t5_ids, data.clip_ids))
    loss = functools.partial(student_loss, networks, flags.batch)
    begin = {"transformer": teacher["transformer"]}
    rate, steps = 0.5 * flags.learning_rate, flags.distil_steps
    train_stage("student", workdir, loss, begin, constants, rate, steps, flags.minutes, show_student)
    print(f"wrote {target}", flush=True)


def main(arguments: list[str] | None = None) -> None:
    """Parses the flags and trains. Raises UserError."""
    parser = command.parser("emoji.train_flow", __doc__)
    parser.add_argument("--workdir", type=command.local, required=True, help="checkpoints and results; resumes")
    parser.add_argument("--vae", type=command.local, required=True, help="the world's autoencoder, in our format")
    parser.add_argument("--steps", type=command.at_least(1), default=2000, help="of the teacher (default: 2000)")
    parser.add_argument("--distil-steps", type=command.at_least(1), default=450, help="of the student (default: 450)")
    parser.add_argument("--batch", type=command.at_least(1), default=64, help="(default: 64)")
    parser.add_argument("--learning-rate", type=command.positive, default=1.5e-3, help="(default: 1.5e-3)")
    words = "between checkpoints, sheets and exports (default: 5)"
    parser.add_argument("--minutes", type=command.not_negative, default=5.0, help=words)
    parser.add_argument("--seed", type=command.seed, default=0, help="(default: 0)")
    flags = parser.parse_args(arguments)
    make_pipeline(flags)


if __name__ == "__main__":
    sys.exit(errors.run(main))
