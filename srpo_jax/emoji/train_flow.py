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
import json
import math
import pathlib
import shutil
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

from srpo_jax import command, convert, errors, text
from srpo_jax.algorithm import flow
from srpo_jax.emoji import pictures, tokenizers, world
from srpo_jax.models.clip import ClipText, ClipTextConfig
from srpo_jax.models.compute import Compute, Params, bind, build
from srpo_jax.models.flux import Flux, FluxConfig
from srpo_jax.models.t5 import T5Config, T5Encoder
from srpo_jax.weights import folder

LENGTH = 16  # text tokens; the world's longest prompt has 7
SIDE = pictures.SIZE // 8  # of the latents
WIDTH, TEXT_WIDTH = 192, 128
FLUX = FluxConfig(
    in_channels=64,
    out_channels=64,
    num_layers=2,
    num_single_layers=4,
    attention_head_dim=32,
    num_attention_heads=6,
    joint_attention_dim=TEXT_WIDTH,
    pooled_projection_dim=TEXT_WIDTH,
    guidance_embeds=True,
    axes_dims_rope=(8, 12, 12),
)
EMPTY, BARE = 0.1, 0.45  # shares of the captions that are empty, and that leave the style open
LEVEL_MEAN, LEVEL_DEVIATION = 0.4, 1.0  # noise levels are sigmoid(normal): a little more of the noisy ones
GUIDANCE = (1.0, 5.0)  # the range that is distilled
FAVOURED = (1.0, 2.0, 3.5)  # guidances that a third of the distilled samples have: those that are used later
TEACHER_GUIDANCE, STUDENT_GUIDANCE = 2.5, 3.5  # of sample sheets
AVERAGE = 0.998  # decay of the weights' moving average
SCHEDULER = {  # FLUX.1-dev's
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
}
SHOWN = ("red apple", "dog face", "pizza", "rocket", "sunflower", "owl", "guitar", "house")


# --- data ---


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Data:
    """What is learnt from, on the device.

    Attributes:
      tokens: [S * K, 16, 64], packed scaled latents of the world's K concepts in S styles, style by style.
      t5_ids, clip_ids: [(S + 1) * K + 1, 16], token ids of captions: styled as ``tokens``, then bare, then empty.
    """

    tokens: jax.Array
    t5_ids: jax.Array
    clip_ids: jax.Array

    @property
    def pictures(self) -> int:
        """How many pictures there are, S * K."""
        return len(self.tokens)

    @property
    def empty(self) -> int:
        """The row of the empty caption."""
        return len(self.t5_ids) - 1


def captions() -> list[str]:
    """All captions in the order of ``Data``."""
    concepts = world.world()
    return [world.prompt(concept, style) for style in (*world.STYLES, None) for concept in concepts] + [""]


def load_data(vae: pathlib.Path, tokenizer_folder: pathlib.Path) -> Data:
    """Encodes the world's pictures and captions; trains the tokenizers into their folder if they are not there."""
    texts = captions()
    for name, train in (("tokenizer", tokenizers.train_clip_tokenizer), ("tokenizer_2", tokenizers.train_t5_tokenizer)):
        if not (tokenizer_folder / name).is_dir():
            train(texts, tokenizer_folder / name, LENGTH)
    clip, t5 = (text.load_tokenizer(tokenizer_folder / name) for name in ("tokenizer", "tokenizer_2"))
    _, graphdef, params = folder.load(vae, "autoencoder")

    @jax.jit
    def encode(images: jax.Array) -> jax.Array:
        model = bind(graphdef, params)
        return flow.pack(model.scale_latents(model.encode(images)[0]))

    images = pictures.to_float(pictures.load(world.world()))
    return Data(
        tokens=jnp.concatenate([encode(style) for style in images]),
        t5_ids=jnp.asarray(text.tokenize(t5, texts, LENGTH)),
        clip_ids=jnp.asarray(text.tokenize(clip, texts, LENGTH)),
    )


# --- networks ---


@dataclasses.dataclass(frozen=True)
class Networks:
    """The three networks that are trained: graph definitions and configs under the names of the pipeline's folders."""

    graphdefs: dict
    configs: dict

    def encode(self, params: Params, t5_ids: jax.Array, clip_ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Token ids [B, 16] -> (text [B, 16, C], pooled [B, P])."""
        tokens = bind(self.graphdefs["text_encoder_2"], params["text_encoder_2"])(t5_ids)
        return tokens, bind(self.graphdefs["text_encoder"], params["text_encoder"])(clip_ids)

    def velocity(self, params: Params, x: jax.Array, sigma: jax.Array, guidance: jax.Array, encoded) -> jax.Array:
        """The transformer's velocity at packed latents [B, 16, 64], noise levels [B], guidances [B]."""
        flux = bind(self.graphdefs["transformer"], params["transformer"])
        ids = flow.image_ids(SIDE, SIDE), flow.text_ids(LENGTH)
        return flux(x, *encoded, sigma, guidance, *ids).astype(jnp.float32)


def make_networks(clip_words: int, t5_words: int, seed: int) -> tuple[Networks, Params]:
    """The networks for vocabularies of these sizes, with random parameters.

    Modulations and the last layer start at zero, so that every block starts as the identity and the velocity as 0; the
    guidance input starts without effect.
    """
    configs = {
        "transformer": FLUX,
        "text_encoder": ClipTextConfig(
            vocab_size=clip_words,
            hidden_size=TEXT_WIDTH,
            intermediate_size=2 * TEXT_WIDTH,
            num_hidden_layers=1,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
            eos_token_id=clip_words - 1,
        ),
        "text_encoder_2": T5Config(
            vocab_size=t5_words, d_model=TEXT_WIDTH, d_kv=32, d_ff=2 * TEXT_WIDTH, num_layers=1, num_heads=4
        ),
    }
    kinds = {"transformer": Flux, "text_encoder": ClipText, "text_encoder_2": T5Encoder}
    built = {
        name: build(functools.partial(_construct, kind, configs[name]), seed + index)
        for index, (name, kind) in enumerate(kinds.items())
    }
    params = {name: parameters for name, (_, parameters) in built.items()}
    silent = ("img_mod", "txt_mod", "mod", "final_mod", "final_out", "guidance_in")

    def start(path: tuple, leaf: jax.Array) -> jax.Array:
        keys = [entry.key for entry in path]
        ends = keys[-2] in silent or keys[-3:-1] == ["guidance_in", "out_layer"]
        return jnp.zeros_like(leaf) if ends else leaf

    params["transformer"] = jax.tree_util.tree_map_with_path(start, params["transformer"])
    return Networks({name: graphdef for name, (graphdef, _) in built.items()}, configs), params


def _construct(kind: type, config, rngs):
    return kind(config, Compute(), rngs=rngs)


# --- the two stages ---


def draw(data: Data, key: jax.Array, batch: int) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """A batch: rows of captions [B], noise levels [B], noisy latents [B, 16, 64] and the velocities to learn."""
    keys = jax.random.split(key, 4)
    picture = jax.random.randint(keys[0], (batch,), 0, data.pictures)
    concepts = len(world.world())
    kind = jax.random.uniform(keys[1], (batch,))
    caption = jnp.where(kind < EMPTY + BARE, data.pictures + picture % concepts, picture)
    caption = jnp.where(kind < EMPTY, data.empty, caption)
    sigma = jax.nn.sigmoid(LEVEL_MEAN + LEVEL_DEVIATION * jax.random.normal(keys[2], (batch,)))
    clean = data.tokens[picture]
    noise = jax.random.normal(keys[3], clean.shape)
    return caption, sigma, flow.add_noise(clean, noise, sigma), noise - clean


def teacher_loss(networks: Networks, batch: int, params: Params, data: Data, key: jax.Array) -> jax.Array:
    """Flow matching's mean squared error over a batch drawn with ``key``."""
    caption, sigma, noisy, target = draw(data, key, batch)
    encoded = networks.encode(params, data.t5_ids[caption], data.clip_ids[caption])
    velocity = networks.velocity(params, noisy, sigma, jnp.ones_like(sigma), encoded)
    return jnp.mean(jnp.square(velocity - target))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Teacher:
    """What the student learns from.

    Attributes:
      data: as the teacher's.
      params: the first stage's averaged parameters.
      encoded: (text, pooled) of all captions by the teacher's text encoders, which the student keeps.
    """

    data: Data
    params: Params
    encoded: tuple[jax.Array, jax.Array]


def student_loss(networks: Networks, batch: int, params: Params, teacher: Teacher, key: jax.Array) -> jax.Array:
    """Mean squared error to the guided velocity of the teacher; ``params`` are ``{"transformer": ...}``."""
    draw_key, *keys = jax.random.split(key, 4)
    caption, sigma, noisy, _ = draw(teacher.data, draw_key, batch)
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
    return jnp.mean(jnp.square(velocity - target))


def optimiser(rate: float, steps: int) -> optax.GradientTransformation:
    """AdamW with a warm-up and, over the last 70 %, a linear decay to nearly zero."""
    warmup, decay = min(100, steps // 10 + 1), int(0.7 * steps)
    schedule = optax.join_schedules(
        [
            optax.linear_schedule(0.0, rate, warmup),
            optax.constant_schedule(rate),
            optax.linear_schedule(rate, 0.02 * rate, decay),
        ],
        [warmup, steps - decay],
    )
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.01))


def run_stage(
    name: str,
    workdir: pathlib.Path,
    loss: Callable[[Params, Any, jax.Array], jax.Array],
    params: Params,
    constants: Any,
    transformation: optax.GradientTransformation,
    steps: int,
    minutes: float,
    show: Callable[[Params], None],
) -> Params:
    """Trains one stage to its end, from its last checkpoint if there is one.

    Args:
      name: of the stage and of its folder of checkpoints.
      loss: of (parameters, constants, random key).
      params: to begin with.
      constants: arrays that the loss needs.
      steps: updates in all.
      minutes: between two checkpoints.
      show: called with the averaged parameters after every checkpoint.

    Returns:
      The moving average of the parameters.

    Raises UserError if the loss is not finite.
    """

    @functools.partial(jax.jit, donate_argnums=0)
    def update(state: dict, constants: Any, step: jax.Array) -> tuple[dict, jax.Array]:
        key = jax.random.fold_in(jax.random.key(0), step)
        value, gradient = jax.value_and_grad(loss)(state["params"], constants, key)
        updates, moments = transformation.update(gradient, state["moments"], state["params"])
        new = optax.apply_updates(state["params"], updates)
        decay = jnp.minimum(AVERAGE, (1.0 + step) / (10.0 + step))
        average = jax.tree.map(lambda a, b: decay * a + (1 - decay) * b, state["average"], new)
        return {"params": new, "moments": moments, "average": average}, value

    state = {"params": params, "moments": transformation.init(params), "average": params}
    state = jax.tree.map(jnp.array, state)  # copies: the update gives its inputs' memory away
    options = ocp.CheckpointManagerOptions(max_to_keep=1)
    with ocp.CheckpointManager((workdir / name).absolute(), options=options) as manager:
        first = manager.latest_step() or 0
        if first:
            abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
            state = manager.restore(first, args=ocp.args.StandardRestore(abstract))
            print(f"{name}: resumed at step {first}", flush=True)
        losses, mark, marked, saved = [], time.monotonic(), first, time.monotonic()
        for step in range(first, steps):
            state, value = update(state, constants, jnp.asarray(step))
            losses.append(value)
            done = step + 1
            if done % 50 == 0 or done == steps:
                mean = float(np.mean(jax.device_get(losses)))
                rate = (done - marked) / (time.monotonic() - mark)
                left = (steps - done) / rate / 60
                print(f"{name} {done}/{steps}: loss {mean:.4f}, {rate:.2f} steps/s, {left:.1f} min left", flush=True)
                if not math.isfinite(mean):
                    raise errors.UserError(f"the loss is not finite at step {done}: lower --learning-rate")
                losses, mark, marked = [], time.monotonic(), done
            if done == steps or time.monotonic() - saved > 60 * minutes:
                manager.save(done, args=ocp.args.StandardSave(state))
                manager.wait_until_finished()
                show(state["average"])
                mark, marked, saved = time.monotonic(), done, time.monotonic()
    return state["average"]


# --- what comes out ---


class Painter:
    """Draws sheets of samples: per shown concept two bare captions, then one of each style."""

    def __init__(self, networks: Networks, data: Data, vae: pathlib.Path):
        _, graphdef, decoder = folder.load(vae, "autoencoder")
        concepts = len(world.world())
        known = [concept.caption for concept in world.world()]
        shown = [known.index(caption) for caption in SHOWN if caption in known]
        kinds = (len(world.STYLES), len(world.STYLES), *range(len(world.STYLES)))
        rows = jnp.asarray([kind * concepts + concept for concept in shown for kind in kinds])
        noise = jax.random.normal(jax.random.key(0), (len(rows), *data.tokens.shape[1:]))
        sigmas = flow.pipeline_schedule(20, data.tokens.shape[1], SCHEDULER)
        self._columns = len(kinds)

        def sample(params: Params, guidance: float, distilled: bool) -> jax.Array:
            given = networks.encode(params, data.t5_ids[rows], data.clip_ids[rows])
            blank = jnp.full_like(rows, data.empty)
            empty = networks.encode(params, data.t5_ids[blank], data.clip_ids[blank])

            def velocity(x: jax.Array, sigma: jax.Array) -> jax.Array:
                level, one = jnp.full(len(x), sigma), jnp.ones(len(x))
                if distilled:
                    return networks.velocity(params, x, level, guidance * one, given)
                unconditional = networks.velocity(params, x, level, one, empty)
                return unconditional + guidance * (networks.velocity(params, x, level, one, given) - unconditional)

            model = bind(graphdef, decoder)
            latents = flow.unpack(flow.sample(velocity, noise, sigmas), SIDE, SIDE)
            return model.decode(model.unscale_latents(latents))

        self._sample = jax.jit(sample, static_argnames=("guidance", "distilled"))

    def __call__(self, params: Params, guidance: float, distilled: bool, path: pathlib.Path) -> None:
        """Saves a sheet as PNG."""
        images = pictures.to_uint8(self._sample(params, guidance, distilled))
        pictures.sheet(images, 2 * self._columns).save(path)


def export(params: Params, networks: Networks, vae: pathlib.Path, workdir: pathlib.Path, target: pathlib.Path) -> None:
    """Writes the pipeline in our format to ``workdir/ours`` and as a diffusers folder, in bfloat16, to ``target``."""
    ours = workdir / "ours"
    for name, kind in convert.COMPONENTS.items():
        if name in params:
            folder.save(ours / name, kind, networks.configs[name], params[name])
    shutil.copytree(vae, ours / "vae", dirs_exist_ok=True)
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(workdir / name, ours / name, dirs_exist_ok=True)
    (ours / "scheduler").mkdir(exist_ok=True)
    (ours / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER, indent=2) + "\n")
    fresh = target.with_name(f"{target.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    convert.export_folder(ours, fresh, "diffusers", convert.DTYPES["bfloat16"])
    shutil.rmtree(target, ignore_errors=True)
    fresh.rename(target)


def train(flags: argparse.Namespace) -> None:
    """Both stages, then the export."""
    workdir = flags.workdir
    workdir.mkdir(parents=True, exist_ok=True)
    data = load_data(flags.vae, workdir)
    sizes = [len(text.load_tokenizer(workdir / name)) for name in ("tokenizer", "tokenizer_2")]
    networks, params = make_networks(*sizes, flags.seed)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    deviation = float(data.tokens.std())
    print(f"{count / 1e6:.2f} M parameters, {data.pictures} pictures, latents' deviation {deviation:.3f}", flush=True)
    painter = Painter(networks, data, flags.vae)
    target = workdir / "pipeline"

    def show_teacher(average: Params) -> None:
        painter(average, TEACHER_GUIDANCE, False, workdir / "teacher.png")
        export(average, networks, flags.vae, workdir, target)

    loss = functools.partial(teacher_loss, networks, flags.batch)
    tx = optimiser(flags.learning_rate, flags.steps)
    teacher = run_stage("teacher", workdir, loss, params, data, tx, flags.steps, flags.minutes, show_teacher)

    def show_student(average: Params) -> None:
        painter(teacher | average, STUDENT_GUIDANCE, True, workdir / "student.png")
        export(teacher | average, networks, flags.vae, workdir, target)

    constants = Teacher(data, teacher, jax.jit(networks.encode)(teacher, data.t5_ids, data.clip_ids))
    loss = functools.partial(student_loss, networks, flags.batch)
    tx = optimiser(0.5 * flags.learning_rate, flags.distil_steps)
    begin = {"transformer": teacher["transformer"]}
    run_stage("student", workdir, loss, begin, constants, tx, flags.distil_steps, flags.minutes, show_student)
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
    train(flags)


if __name__ == "__main__":
    sys.exit(errors.run(main))
