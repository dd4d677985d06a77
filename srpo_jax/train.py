"""The training loop, from a configuration to checkpoints.

``train`` reads from top to bottom: mesh, networks, data, then step by step update, metrics, evaluation, checkpoints,
samples. What is compiled lives in ``program`` and ``step``.
"""

import contextlib
import functools
import json
import math
import os
import sys
import time
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
    goodput,
    lock,
    metrics,
    nonfinite,
    program,
    pulse,
    record,
    resume,
    run_page,
    run_pictures,
    sampling,
    sharding,
    space,
    storage,
    terminal,
    validation,
    wandb_board,
)
from srpo_jax import config as config_lib
from srpo_jax.algorithm.networks import Frozen
from srpo_jax.algorithm.step import TrainState
from srpo_jax.costs import keeping
from srpo_jax.data import loading, sources
from srpo_jax.errands import Errands
from srpo_jax.errors import UserError
from srpo_jax.evaluation import in_training, prompts
from srpo_jax.families.base import TRANSFORMER
from srpo_jax.interruption import Interruption
from srpo_jax.models.compute import join


def train(
    config: ConfigDict,
    workdir: str | os.PathLike,
    changes: tuple[str, ...] = (),
    recipe: record.Recipe | None = None,
) -> int | None:
    """Trains until ``config.steps`` updates are done, or ``evaluate.patience`` is at its end, going on from the newest
    checkpoint of ``workdir``.

    Args:
      config: of the run.
      workdir: its folder.
      changes: keys of ``config`` that may differ from what the run had so far.
      recipe: that ``config`` came from, to tell what differs.

    Returns:
      None, or the number of the signal (SIGINT, SIGTERM) that ended training early, its last update saved.

    Raises UserError for anything the user can mend, before anything is written if it can be known before, and if
    ``optim.patience`` updates in a row are not finite: the newest checkpoint is then of the moment before them.
    """
    with lock.Lock(workdir) as held, terminal.warnings() as heard:
        return _train(config, workdir, changes, recipe, held, heard)


def _train(
    config: ConfigDict,
    workdir: str | os.PathLike,
    changes: tuple[str, ...],
    recipe: record.Recipe | None,
    held: lock.Lock,
    heard: list[str],
) -> int | None:
    clock = goodput.Goodput()

    # === Checks that need no device ===================================================================================
    validation.validate(config)
    storage.check(storage.path(workdir))
    validation.check_files(config)
    models = resume.fingerprints(config)
    record.check(workdir, config, models, changes)
    wandb_board.check(config, workdir)
    evaluation = in_training.plan(config, models)
    workdir = storage.path(workdir)
    errands = Errands(workdir)
    if workdir.exists():
        held.acquire()  # before the work that a second run would do in vain
    newest = distributed.largest(checkpoint.newest(workdir) or 0) or None
    if newest is not None and newest >= config.steps:
        print(f"{workdir} has all of its {config.steps} updates; nothing to do")
        return None
    if evaluation and newest and in_training.ended(workdir, evaluation, config.evaluate.patience, newest):
        print(f"{workdir} ended with update {newest}, by evaluate.patience={config.evaluate.patience}; nothing to do")
        return None
    architecture = architectures.read(config)
    source = loading.open_examples(config, architecture)
    held_out = []
    if config.sample.every:
        held_out = sources.read(config.sample.prompts or prompts.SHIPPED, config.sample.column)
        look = config.sample.steps, config.data.height, config.data.width
        architecture.family.schedule(config.model.path, *look)  # what is wrong with its file is told here
    if config.compilation_cache:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(config.compilation_cache))

    # === Mesh and program =============================================================================================
    mesh = sharding.make_mesh(config.mesh)
    built, settled = keeping.build(config, mesh, architecture)
    if config.remat.transformer == "auto":
        terminal.say(f"remat.transformer=auto stands for {settled.remat.transformer} here")
    for words in _describe(config, built):
        terminal.say(words)
    terminal.say(space.check(workdir, config, built.state, newest or 0))
    online, encode, samples, evaluator = config.data.encode == "online", None, None, None
    if online or held_out or evaluation:
        with terminal.doing("loading the text encoders"):
            encode = conditions.prompt_encoder(config, built, architecture)
    if held_out:
        with terminal.doing("encoding the held-out prompts"):
            samples = SampleGrid(config, built, encode, held_out[: config.sample.count], workdir, errands)
    if evaluation:
        with terminal.doing("encoding the prompts of the evaluation"):
            evaluator = in_training.Evaluator(config, built, encode, evaluation, workdir)
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
    record.write(workdir, config, models, changes, newest or 0, recipe)
    kept = config.checkpoint.keep, checkpoint.deadline_of(built.state), config.checkpoint.resumable
    checkpoints = checkpoint.Checkpoints(workdir, *kept, patient=config.checkpoint.on_failure == "continue")
    rows = sharding.local_rows(mesh, config.data.batch_size)
    stream = loading.batches(source, config.data.batch_size, config.seed, rows)
    if newest is not None:
        with terminal.doing("reading the newest checkpoint"):
            newest, state, run = checkpoints.restore_newest(built.state)
        if run["source"] != source.digest:
            raise UserError(f"{workdir} was trained on other prompts or pictures than now; choose another --workdir")
        stream.set_state(run["data"])
    step = newest or 0
    total = run.get("skipped", 0) if newest else 0
    skipped = nonfinite.Row(workdir, config.seed, config.optim.patience, errands, total)
    if evaluator:
        evaluator.begin(step)
        checkpoints.best = evaluator.best
    report = metrics.Metrics(workdir, step, config.steps, errands, wandb_board.open_board(config, workdir))
    clock.lose(report.lost)
    page = run_page.Page(workdir, heard)
    terminal.say(source.summary)
    terminal.say(f"from update {step} to {config.steps} in {workdir}")

    signals = contextlib.ExitStack()
    try:
        # === Compile ==================================================================================================
        with terminal.doing("compiling the update"):
            update = built.lower().compile()
        distributed.meet("the first update")

        # === Loop =====================================================================================================
        outlook = functools.partial(_outlook, checkpoints, built.state, report)
        interruption = signals.enter_context(Interruption(outlook))
        bound = pulse.bounded(distributed.PATIENCE, "an update with its samples")
        with jax.transfer_guard("disallow"), bound as beat:

            def asked_to_stop(late: bool = False) -> tuple[int, bool]:
                """The signal, if one has come to any process, and whether any is ``late``.

                A signal reaches the processes of a job at different moments, and their clocks differ: all do the same
                after the same update.
                """
                beat()
                held.check()
                stop, late = divmod(distributed.largest(2 * (interruption.signal or 0) + late), 2)
                return stop, bool(late)

            def evaluate() -> in_training.Outcome | None:
                outcome = evaluator.evaluate(step, state, frozen, lambda: asked_to_stop()[0])
                if outcome:
                    report.plot(step, outcome.values)
                    checkpoints.best = evaluator.best
                return outcome

            over = False
            if evaluator and step % config.evaluate.every == 0 and evaluator.lacks(step) and (outcome := evaluate()):
                over = outcome.is_over
            if samples and step % config.sample.every == 0 and samples.lacks(step):
                samples.draw(step, state, frozen)
            errands.do(run_page.PAGE, page.write)
            position, examples = stream.get_state(), next(stream)
            batch = conditioner.batch(examples, step + 1)
            started = time.perf_counter()
            while step < config.steps and not over:
                beat()
                held.check()
                checkpoints.check()
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
                values["goodput"] = clock.share(seconds, good=not skipped.steps)
                report.write(step, values)

                # --- evaluation ---
                last = step == config.steps
                late = 0 < 60 * config.checkpoint.minutes < checkpoints.age
                stop, late = (0, late) if last else asked_to_stop(late)
                due = (late or step % config.checkpoint.every == 0) and not skipped.steps
                good = last or (evaluator and step % config.evaluate.every == 0 and not skipped.steps)
                if evaluator and good and not stop:
                    if outcome := evaluate():
                        over = outcome.is_over
                        due, last = due or outcome.is_best, last or over
                    elif not last:
                        stop, _ = asked_to_stop()

                # --- checkpoint ---
                if stop or last or due:
                    report.flush()
                    checkpoints.save(step, state, _position(config, source, position, skipped), bool(stop or last))
                if stop:
                    checkpoints.latest()
                    words = f"stopped after update {step}, {interruption.seconds:.1f} s after the signal"
                    terminal.say(f"{words}; the same command goes on from there")
                    return stop

                # --- samples, and the page ---
                drawn = samples and (last or step % config.sample.every == 0)
                if drawn:
                    samples.draw(step, state, frozen)
                if drawn or (evaluator and good):
                    errands.do(run_page.PAGE, page.write)
                started = time.perf_counter()
        return None
    finally:
        with signals:  # the first one does not cut off what is being written
            # A checkpoint that is being written waits for all processes of the job: for ever, if one is lost.
            if not distributed.is_loss(sys.exception()):
                checkpoints.close()
            errands.do(run_page.PAGE, functools.partial(page.write, ended=True))
            report.close()
            errands.wait()  # of processes that report nothing, too


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
        errands: Errands,
    ):
        self._folder, self._held_out, self._errands = workdir / run_pictures.SAMPLES, held_out, errands
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
            try:
                images = np.concatenate(list(self._painter.paint(params, frozen.autoencoder, self._chunks)))
            except sampling.NotFinite as error:  # whether training can go on, the updates tell
                terminal.warn(f"no samples of update {step}: {error}")
                return
            if jax.process_index() == 0:
                self._errands.do(os.fspath(self._folder), functools.partial(self._write, step, sampling.grid(images)))

    def _write(self, step: int, grid: np.ndarray) -> None:
        sampling.save_image(grid, self._file(step))
        texts = json.dumps(self._held_out, indent=2, ensure_ascii=False)
        storage.write(self._folder / run_pictures.PROMPTS_FILE, f"{texts}\n".encode())

    def _file(self, step: int) -> epath.Path:
        return self._folder / f"{step:06d}.png"


def _outlook(checkpoints: checkpoint.Checkpoints, state: TrainState, report: metrics.Metrics) -> str:
    """What a signal brings about, and how long that takes as far as is known."""
    size = terminal.in_bytes(checkpoint.size_of(state))
    before = f"the last one took {checkpoints.seconds:.0f} s" if checkpoints.seconds else "none was made yet"
    within = f"at most {checkpoint.deadline_of(state) / 60:.0f} min"
    update = f" ({report.seconds:.3g} s each)" if report.seconds else ""
    words = f"this update is finished{update}, and a checkpoint of {size} made ({before}, {within})"
    return f"{words}; another signal ends the run at once"


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
