"""The training loop, from a configuration to checkpoints.

``train`` reads from top to bottom: mesh, networks, data, then step by step update, metrics, checkpoints, samples. What
is compiled lives in ``program`` and ``step``.
"""

import contextlib
import math
import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from srpo_jax import (
    architectures,
    checkpoint,
    conditions,
    distributed,
    lock,
    metrics,
    nonfinite,
    program,
    pulse,
    record,
    resume,
    sampling,
    sharding,
    space,
    storage,
    terminal,
    validation,
)
from srpo_jax import config as config_lib
from srpo_jax.algorithm.networks import Frozen
from srpo_jax.algorithm.step import TrainState
from srpo_jax.costs import keeping
from srpo_jax.data import loading, sources
from srpo_jax.errors import UserError
from srpo_jax.evaluation import prompts
from srpo_jax.families.base import TRANSFORMER
from srpo_jax.models.compute import join


def train(config: ConfigDict, workdir: str | os.PathLike, changes: tuple[str, ...] = ()) -> int | None:
    """Trains until ``config.steps`` updates are done, going on from the newest checkpoint of ``workdir``.

    Args:
      config: of the run.
      workdir: its folder.
      changes: keys of ``config`` that may differ from what the run had so far.

    Returns:
      None, or the number of the signal (SIGINT, SIGTERM) that ended training early, its last update saved.

    Raises UserError for anything the user can mend, before anything is written if it can be known before, and if
    ``optim.patience`` updates in a row are not finite: the newest checkpoint is then of the moment before them.
    """
    with lock.Lock(workdir) as held:
        return _train(config, workdir, changes, held)


def _train(config: ConfigDict, workdir: str | os.PathLike, changes: tuple[str, ...], held: lock.Lock) -> int | None:
    # === Checks that need no device ===================================================================================
    validation.validate(config)
    validation.check_files(config)
    models = resume.fingerprints(config)
    record.check(workdir, config, models, changes)
    workdir = storage.path(workdir)
    if workdir.exists():
        held.acquire()  # before the work that a second run would do in vain
    newest = distributed.largest(checkpoint.newest(workdir) or 0) or None
    if newest is not None and newest >= config.steps:
        print(f"{workdir} has all of its {config.steps} updates; nothing to do")
        return None
    architecture = architectures.read(config)
    source = loading.open_examples(config, architecture)
    held_out = []
    if config.sample.every:
        held_out = sources.read(config.sample.prompts or prompts.SHIPPED, config.sample.column)
    # A program for CPUs that comes out of the cache runs collectives at once that do not depend on each other.
    if config.compilation_cache and not distributed.between_cpus():
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(config.compilation_cache))

    # === Mesh and program =============================================================================================
    mesh = sharding.make_mesh(config.mesh)
    built, settled = keeping.build(config, mesh, architecture)
    if config.remat.transformer == "auto":
        terminal.say(f"remat.transformer=auto stands for {settled.remat.transformer} here")
    for words in _describe(config, built):
        terminal.say(words)
    terminal.say(space.check(workdir, config, built.state, newest or 0))
    online, encode, samples = config.data.encode == "online", None, None
    if online or held_out:
        with terminal.doing("loading the text encoders"):
            encode = conditions.prompt_encoder(config, built, architecture)
    if held_out:
        with terminal.doing("encoding the held-out prompts"):
            samples = SampleGrid(config, built, encode, held_out[: config.sample.count], workdir)
    conditioner = conditions.Conditioner(config, built, encode if online else None)
    del encode  # with stored features, text encoders make room here for what is trained
    state = None
    if newest is None:
        with terminal.doing("loading the transformer" if built.frozen.base is None else "making low-rank factors"):
            state = program.initial_state(config, built)
    base = [] if built.frozen.base is None else [TRANSFORMER]
    with terminal.doing(f"loading {', '.join([*base, 'autoencoder', *built.networks.rewards])}"):
        frozen = program.load_frozen(config, built)

    # === State: new, or of the newest checkpoint; from here on the workdir belongs to this run ========================
    held.acquire()
    if newest is None and checkpoint.steps(workdir):
        raise UserError(f"another run has begun and left {workdir} meanwhile; the same command goes on from there")
    record.write(workdir, config, models, changes, newest or 0)
    checkpoints = checkpoint.Checkpoints(
        workdir, config.checkpoint.keep, checkpoint.deadline_of(built.state), config.checkpoint.resumable
    )
    rows = sharding.local_rows(mesh, config.data.batch_size)
    stream = loading.batches(source, config.data.batch_size, config.seed, rows)
    if newest is not None:
        with terminal.doing("reading the newest checkpoint"):
            newest, state, run = checkpoints.restore_newest(built.state)
        if run["source"] != source.digest:
            raise UserError(f"{workdir} was trained on other prompts or pictures than now; choose another --workdir")
        stream.set_state(run["data"])
    step = newest or 0
    skipped = nonfinite.Row(workdir, config.seed, config.optim.patience, run.get("skipped", 0) if newest else 0)
    report = metrics.Metrics(workdir, step, config.steps)
    terminal.say(source.summary)
    terminal.say(f"from update {step} to {config.steps} in {workdir}")

    signals = contextlib.ExitStack()
    try:
        # === Compile ==================================================================================================
        with terminal.doing("compiling the update"):
            update = built.lower().compile()

        # === Loop =====================================================================================================
        interruption = signals.enter_context(Interruption())
        bound = pulse.bounded(distributed.PATIENCE, "an update with its samples")
        with jax.transfer_guard("disallow"), bound as beat:
            if samples and step % config.sample.every == 0 and samples.lacks(step):
                samples.draw(step, state, frozen)
            position, examples = stream.get_state(), next(stream)
            batch = conditioner.batch(examples, step + 1)
            started = time.perf_counter()
            while step < config.steps:
                beat()
                held.check()
                before, used = (step, position), examples
                step += 1
                state, values = distributed.in_turn(update(state, frozen, batch))
                # The next batch is prepared while the devices are busy with this one. Updates that share a rollout
                # share its prompts; a run that goes on among them starts from where these were read.
                preparing = time.perf_counter()
                renew = step % config.rollout.reuse == 0
                if renew:
                    position = stream.get_state()
                if step < config.steps:
                    examples = next(stream) if renew else examples
                    batch = conditioner.batch(examples, step + 1)
                data_seconds = time.perf_counter() - preparing

                # --- metrics ---
                values = {name: value.item() for name, value in jax.device_get(values).items()}
                seconds = time.perf_counter() - started
                largest = values.pop("largest_weight")
                if words := skipped.note(step, values, used, before):
                    terminal.say(words)
                if skipped.is_over or not math.isfinite(largest):
                    good, read_from = skipped.before
                    # The weights are still those of that moment; a rollout that began before it is another by now.
                    if good and math.isfinite(largest) and good % config.rollout.reuse == 0:
                        checkpoints.save(good, state, _position(config, source, read_from, skipped))
                    with jax.transfer_guard("allow"):
                        words = nonfinite.verdict(config, built, state, frozen, conditioner, skipped)
                    raise UserError(f"{words}; the newest checkpoint is of update {checkpoints.latest() or 0}")
                values |= {"step_seconds": seconds, "images_per_second": config.data.batch_size / seconds}
                values["data_seconds"] = data_seconds  # a part of step_seconds, lost only if it comes near them
                report.write(step, values)

                # --- checkpoint ---
                # A signal reaches the processes of a job at different moments: all leave after the same update.
                stop = distributed.largest(interruption.signal or 0) if step < config.steps else 0
                due = step % config.checkpoint.every == 0 and not skipped.steps
                if stop or step == config.steps or due:
                    report.flush()
                    checkpoints.save(step, state, _position(config, source, position, skipped))
                if stop:
                    terminal.say(f"stopped after update {step}; the same command goes on from there")
                    return stop

                # --- samples ---
                if samples and (step == config.steps or step % config.sample.every == 0):
                    samples.draw(step, state, frozen)
                started = time.perf_counter()
        return None
    finally:
        with signals:  # the first one does not cut off what is being written
            # A checkpoint that is being written waits for all processes of the job: for ever, if one is lost.
            if not distributed.is_loss(sys.exception()):
                checkpoints.close()
            report.close()


def _position(config: ConfigDict, source: loading.ExampleSource, data: Any, skipped: nonfinite.Row) -> dict[str, Any]:
    """What a checkpoint holds beside arrays: from where in the data the run goes on, and what tells that it is the same
    run."""
    run = {"seed": config.seed, "data": data, "source": source.digest, "skipped": skipped.total}
    return run | {"config": config_lib.flatten(config)}


class SampleGrid:
    """Draws a configuration's held-out prompts, with the same noise every time, into ``WORKDIR/samples/STEP.png``."""

    def __init__(
        self,
        config: ConfigDict,
        built: program.Program,
        encode: conditions.PromptEncoder,
        held_out: list[str],
        workdir: epath.Path,
    ):
        self._folder = workdir / "samples"
        networks, sample = built.networks, config.sample
        self._painter = sampling.Painter(
            built.mesh,
            networks.family,
            networks.transformer,
            networks.autoencoder,
            config.model.path,
            sampling.Look(config.data.height, config.data.width, sample.steps, sample.guidance),
            # At most what is known to fit: the samples that pass through an update at once.
            at_once=min(config.data.batch_size // config.optim.accumulation, len(held_out)),
        )
        self._chunks = self._painter.prepare(encode, held_out, seed=sample.seed)

    def lacks(self, step: int) -> bool:
        """Whether the grid of a step was never drawn, as before training and where a run was stopped."""
        return bool(distributed.largest(jax.process_index() == 0 and not self._file(step).exists()))

    def draw(self, step: int, state: TrainState, frozen: Frozen) -> None:
        """Draws with the moving average of the weights if there is one, and writes the grid."""
        params = join(state.params if state.ema is None else state.ema, frozen.base)
        with terminal.doing(f"sampling into {self._folder.name}/{self._file(step).name}"):
            images = np.concatenate(list(self._painter.paint(params, frozen.autoencoder, self._chunks)))
            if jax.process_index() == 0:
                sampling.save_image(sampling.grid(images), self._file(step))

    def _file(self, step: int) -> epath.Path:
        return self._folder / f"{step:06d}.png"


class Interruption:
    """While entered, SIGINT and SIGTERM are noted in ``signal`` for the loop to see; a second one acts at once."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interruption":
        # Python lets only the main thread handle signals; elsewhere whoever started the thread has to.
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        for caught, handler in self._before.items():
            signal.signal(caught, handler)


def _describe(config: ConfigDict, built: program.Program) -> tuple[str, str]:
    count = sum(leaf.size for leaf in jax.tree.leaves(built.state.params))
    beside = checkpoint.size_of(built.frozen.base)
    words = f" in low-rank factors, beside {terminal.in_bytes(beside)} of frozen weights" if beside else ""
    axes = ", ".join(f"{axis}={size}" for axis, size in built.mesh.shape.items())
    devices = f"{built.mesh.devices.size} {jax.default_backend()} device(s)"
    at_once = config.data.batch_size // config.optim.accumulation
    passes = f"{config.data.batch_size} samples an update, {at_once} at a time"
    attention = f"attention {built.computes.transformer.attention}"
    return f"{count / 1e6:.4g} million parameters{words} on {devices} ({axes})", f"{attention}; {passes}"
