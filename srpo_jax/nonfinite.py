"""Updates with numbers that are not finite: counted, their inputs kept, and what of them was not finite first.

    WORKDIR/nonfinite/STEP.npz   prompts, stored arrays, step and seed of an update that was skipped; in a job of
                                 several processes STEP.PROCESS.npz, each its share

The update itself leaves the weights as they are (``algorithm.step.make_update``). ``python -m srpo_jax.main
--replay=STEP`` with the flags of the run goes through such an update stage by stage (``replay``).
"""

import dataclasses
import functools
import io
import math
import os
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from srpo_jax import (
    architectures,
    checkpoint,
    conditions,
    distributed,
    lock,
    program,
    record,
    resume,
    seeds,
    sharding,
    storage,
    validation,
)
from srpo_jax.algorithm import preference, step
from srpo_jax.algorithm.batch import Batch, split_batch
from srpo_jax.algorithm.methods import METHODS
from srpo_jax.algorithm.networks import Frozen
from srpo_jax.algorithm.passes import Chain
from srpo_jax.algorithm.step import TrainState
from srpo_jax.data.loading import Examples
from srpo_jax.errands import Errands
from srpo_jax.errors import UserError
from srpo_jax.models.compute import join
from srpo_jax.program import Program

FOLDER = "nonfinite"
KEPT = 10  # newest updates whose inputs stay in the workdir
SHOWN = 6  # names in one line


# --- while a run goes on ----------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Row:
    """The updates that were skipped.

    Attributes:
      workdir, seed: of the run.
      patience: so many in a row end it.
      errands: by which inputs are kept.
      total: of the whole run.
      steps: those of the present row, which the next good update ends.
      examples, before: what ``note`` was given at its first: its inputs, and where to go on from.
    """

    workdir: epath.Path
    seed: int
    patience: int
    errands: Errands
    total: int = 0
    steps: list[int] = dataclasses.field(default_factory=list)
    examples: Examples | None = None
    before: Any = None

    def note(self, step: int, values: dict[str, float], examples: Examples, before: Any) -> str:
        """Takes ``skipped`` and whatever is not finite out of an update's metrics, and puts the count there.

        Args:
          step: of the update.
          values: its metrics.
          examples: this process's share of its batch.
          before: whatever tells how to come back to the moment before it.

        Returns:
          What to say of it; "" of a good update.
        """
        if not values.pop("skipped"):
            self.steps, self.examples, self.before = [], None, None
            values["skipped"] = self.total
            return ""
        if not self.steps:
            self.examples, self.before = examples, before
        self.steps.append(step)
        self.total += 1
        broken = [name for name, value in values.items() if not math.isfinite(value)]
        broken.sort(key=lambda name: ("/" in name, name))  # those of the whole update before those of its terms
        for name in broken:
            del values[name]
        values["skipped"] = self.total
        file = _file(self.workdir, step)
        self.errands.do(str(file), lambda: keep(self.workdir, step, self.seed, examples))
        what = f"{', '.join(broken[:SHOWN])} not finite" if broken else "it would have left weights that are not finite"
        return f"update {step} is skipped: {what}; its inputs are kept in {file}"

    @property
    def is_over(self) -> bool:
        """Whether the patience is at its end."""
        return len(self.steps) >= self.patience


def keep(workdir: epath.Path, step: int, seed: int, examples: Examples) -> None:
    """Writes the inputs of an update; older ones than the newest ``KEPT`` go."""
    arrays = {}
    for name, array in examples.arrays.items():
        plain = array.dtype.kind != "V" and array.dtype.isbuiltin == 1
        arrays[f"array.{name}"] = array if plain else array.view(f"u{array.dtype.itemsize}")
        arrays[f"dtype.{name}"] = np.array(array.dtype.name)
    content = io.BytesIO()
    np.savez(content, step=step, seed=seed, prompts=np.array(examples.prompts), **arrays)
    storage.write(_file(workdir, step), content.getvalue())
    name = re.compile(_file(workdir, 0).name.replace("0", r"(\d+)", 1).replace(".npz", r"\.npz"))
    numbers = sorted(int(match[1]) for path in (workdir / FOLDER).iterdir() if (match := name.fullmatch(path.name)))
    for number in numbers[:-KEPT]:
        _file(workdir, number).unlink(missing_ok=True)


def read(workdir: epath.Path, step: int) -> tuple[int, Examples]:
    """(seed, this process's examples) of an update that was kept. Raises UserError if there is none."""
    file = _file(workdir, step)
    if not file.exists():
        names = sorted(path.name for path in file.parent.iterdir()) if file.parent.is_dir() else []
        raise UserError(
            f"--replay={step}: there is no {file}; " + (f"there are {', '.join(names)}" if names else "none")
        )
    try:
        with np.load(io.BytesIO(file.read_bytes())) as found:
            arrays = {}
            for name in [name.removeprefix("array.") for name in found.files if name.startswith("array.")]:
                dtype = str(found[f"dtype.{name}"])
                arrays[name] = found[f"array.{name}"].view(getattr(ml_dtypes, dtype, None) or np.dtype(dtype))
            return int(found["seed"]), Examples([str(prompt) for prompt in found["prompts"]], arrays)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--replay={step}: {file} cannot be read: {error}") from error


def _file(workdir: epath.Path, step: int) -> epath.Path:
    process, count = distributed.place()
    return workdir / FOLDER / (f"{step}.npz" if count == 1 else f"{step}.{process}.npz")


# --- stage by stage ---------------------------------------------------------------------------------------------------


def stages(
    built: Program, state: TrainState, frozen: Frozen, batch: Batch, step_number: int, seed: int
) -> Iterator[tuple[str, bool]]:
    """(name, whether it is finite) of the stages of an update, in their order. Every process has to go through them."""
    networks, settings, params = built.networks, built.settings, state.params
    jit = functools.partial(jax.jit, compiler_options=program.compiler_options(built.mesh))
    for name, features in batch.condition.items():
        yield f"text features ({name})", _is_finite(features)
    if batch.latents is not None:
        yield "latents of the pictures", _is_finite(batch.latents)
    key = jax.random.fold_in(seeds.key(seed), step_number)
    draws = jit(lambda key: step.draw(networks, settings, key, len(jax.tree.leaves(batch.condition)[0])))(key)
    images = jit(functools.partial(step.images_of, networks, settings))(params, frozen, batch, draws)
    if batch.latents is None:
        yield "latents of the rollout", _is_finite((images.latents, images.states))

    def parts_of(batch: Batch, images: Any, own: Any) -> Any:
        """What passes at a time, as in the update; a stack of one part where all do."""
        return split_batch((batch._replace(latents=None), images, own), settings.accumulation)

    parts = jit(parts_of)(batch, images, draws.own)

    def term(params: Any, frozen: Frozen, part: tuple, index: jax.Array) -> dict[str, jax.Array]:
        batch, images, own = part
        prepared = preference.prepare(networks.rewards, frozen.rewards, batch.reward_tokens)
        terms = METHODS[settings.method].terms(settings, images, own)
        if isinstance(terms, Chain):
            coefficients = terms.coefficients
            decoded, seen, _ = step.score(networks, settings, frozen, terms.latents, coefficients, prepared)
            found = {"scored latents": terms.latents, "decoded image": decoded}
        else:
            one = jax.tree.map(lambda leaf: leaf[index], terms)
            read, coefficients = join(params, frozen.base), one.coefficients
            outcome = step.run_term(networks, settings, read, frozen, batch.condition, one, prepared)
            decoded, seen = outcome.decoded, outcome.seen
            found = {"velocity": outcome.velocity, "recovered latents": outcome.recovered, "decoded image": decoded}
        for name, scorer in networks.rewards.items():
            found[f"reward {name}"] = preference.mixture({name: scorer}, frozen.rewards, seen, prepared, coefficients)
        return {name: _flag(tree) for name, tree in found.items()}

    names = METHODS[settings.method].names(settings)
    run = jit(term)
    for number in range(settings.accumulation):
        part = jax.tree.map(lambda leaf, number=number: leaf[number], parts)
        for index, name in enumerate(names):
            for what, flag in jax.device_get(run(params, frozen, part, np.int32(index))).items():
                yield f"{what} ({name})", bool(flag)

    def gradient(params: Any, frozen: Frozen, part: tuple) -> Any:
        grads, _ = step.gradient(networks, settings, params, frozen, *part)
        return _by_layer(grads)

    flags: dict[str, np.ndarray] = {}
    run = jit(gradient)
    for number in range(settings.accumulation):
        part = jax.tree.map(lambda leaf, number=number: leaf[number], parts)
        for name, flag in jax.device_get(run(params, frozen, part)).items():
            flags[name] = flags.get(name, True) & flag
    for name, flag in flags.items():
        yield from ((f"gradient of {layer}", good) for layer, good in _layers(name, flag))


def broken_weights(state: TrainState, frozen: Frozen, encoders: Any = None) -> Iterator[tuple[str, str]]:
    """(network, parameter or layer) of all weights that are not finite; ``encoders`` are those of text encoders."""
    trees = {"transformer": state.params, "frozen transformer": frozen.base, "autoencoder": frozen.autoencoder}
    trees |= {f"reward {name}": tree for name, tree in frozen.rewards.items()} | {"text encoders": encoders}
    for network, tree in trees.items():
        for name, flag in jax.device_get(jax.jit(_by_layer)(tree)).items():
            yield from ((network, layer) for layer, good in _layers(name, flag) if not good)


def diagnose(
    built: Program, state: TrainState, frozen: Frozen, batch: Batch, step_number: int, seed: int, encoders: Any
) -> tuple[str, bool]:
    """(what was not finite first in an update, in words; whether it is because of weights)."""
    first = next((name for name, good in stages(built, state, frozen, batch, step_number, seed) if not good), None)
    found = list(broken_weights(state, frozen, encoders))
    words = f"the first that was not: {first}" if first else "every stage of it by itself was finite"
    if found:
        names = ", ".join(f"{layer} of the {network}" for network, layer in found[:3])
        words += f"; weights that are not: {names}" + (f" and {len(found) - 3} more" if len(found) > 3 else "")
    return words, bool(found)


def verdict(
    config: ConfigDict, built: Program, state: TrainState, frozen: Frozen, conditioner: conditions.Conditioner, row: Row
) -> str:
    """Why a run ends after a row of skipped updates, and what to do, in one line."""
    first = row.steps[0]
    count = f"{len(row.steps)} updates in a row were" if row.steps[1:] else "it was"
    try:
        batch = conditioner.batch(row.examples, first)
        words, blame = diagnose(built, state, frozen, batch, first, config.seed, conditioner.encoder_params)
    except jax.errors.JaxRuntimeError as error:  # no memory for the stages beside the update
        if distributed.is_loss(error):
            raise
        words, blame = f"why could not be found out ({str(error).splitlines()[0][:100]})", False
    remedy = (
        "bring back a copy of these weights, or convert them again"
        if blame
        else f"try a lower learning rate: --config.optim.learning_rate={config.optim.learning_rate / 2:g} "
        "--change=optim.learning_rate"
    )
    return (
        f"update {first}: {count} not finite and changed nothing; {words}. --replay={first} shows every stage; {remedy}"
    )


def _is_finite(tree: Any) -> bool:
    return bool(jax.device_get(jax.jit(_flag)(tree)))


def _flag(tree: Any) -> jax.Array:
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    found = [jnp.isfinite(leaf).all() for leaf in leaves]
    return jnp.stack(found).all() if found else jnp.array(True)


def _by_layer(tree: Any) -> dict[str, jax.Array]:
    """Whether parameters are finite, by dotted path; of a stack of blocks, [blocks]."""

    def name(path: tuple) -> str:
        return ".".join(str(next(getattr(entry, kind) for kind in ("key", "idx", "name") if hasattr(entry, kind)))
                        for entry in path)  # fmt: skip

    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            stacked = "blocks" in name(path).split(".")[0]
            found[name(path)] = jnp.isfinite(leaf).all(axis=tuple(range(int(stacked), leaf.ndim)))
    return found


def _layers(name: str, flag: np.ndarray) -> Iterator[tuple[str, bool]]:
    """(path, whether it is finite) of a parameter; of a stack with a bad block, of each of its blocks by itself."""
    if flag.ndim == 0 or flag.all():
        yield name, bool(flag.all())
    else:
        stack, _, rest = name.partition(".")
        yield from ((f"{stack}.{index}.{rest}", bool(good)) for index, good in enumerate(flag))


# --- again ------------------------------------------------------------------------------------------------------------


def replay(config: ConfigDict, workdir: str | os.PathLike, number: int, changes: tuple[str, ...] = ()) -> None:
    """Prints, stage by stage, what of an update that was kept is finite. The weights are those of the newest checkpoint
    before it, or the pipeline's if there is none.

    Args:
      config, workdir, changes: of the run, as ``train.train`` takes them.
      number: of the update.

    Raises UserError if it was not kept, or as ``train.train``.
    """
    validation.validate(config)
    validation.check_files(config)
    record.check(workdir, config, resume.fingerprints(config), changes)
    workdir = storage.path(workdir)
    seed, examples = read(workdir, number)
    with lock.Lock(workdir) as held:
        held.acquire()  # a run that goes on would move what is read here
        architecture = architectures.read(config)
        built = program.build(config, sharding.make_mesh(config.mesh), architecture)
        online = config.data.encode == "online"
        encode = conditions.prompt_encoder(config, built, architecture) if online else None
        conditioner = conditions.Conditioner(config, built, encode)
        before = [step for step in checkpoint.steps(workdir) if step < number]
        if before:
            checkpoints = checkpoint.Checkpoints(
                workdir, config.checkpoint.keep, checkpoint.deadline_of(built.state), config.checkpoint.resumable
            )
            weights = dataclasses.replace(built.state, opt_state=None, ema=None, rollout=None)
            state, _ = checkpoints.restore(before[-1], weights)
            checkpoints.close()
        else:
            state = program.initial_state(config, built)
        frozen = program.load_frozen(config, built)
        batch = conditioner.batch(examples, number)
        told = jax.process_index() == 0
        where = f"the weights of update {before[-1]}" if before else "the weights that the run started with"
        if told:
            print(f"update {number} again, with {where}; prompts: {'; '.join(examples.prompts)}")
        for name, good in stages(built, state, frozen, batch, number, seed):
            if told:
                print(f"{'finite    ' if good else 'NOT FINITE'}  {name}", flush=True)
        for network, layer in broken_weights(state, frozen, conditioner.encoder_params):
            if told:
                print(f"NOT FINITE  weights: {layer} of the {network}", flush=True)
