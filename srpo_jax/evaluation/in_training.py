"""Evaluation while a run trains: the same prompts from the same noise, once before training and every so many updates.

Noise is that of ``python -m srpo_jax.evaluate``: it depends on a prompt, the number of its picture and a seed. The
run's own rewards are scored always, with the weights that it trains with; ``config.evaluate.scores`` names others. The
moving average of the weights is evaluated if there is one.
"""

import concurrent.futures
import contextlib
import dataclasses
import io
import json
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from srpo_jax import conditions, program, sampling, storage, terminal
from srpo_jax.algorithm.networks import Frozen
from srpo_jax.algorithm.step import TrainState
from srpo_jax.architectures import used_rewards
from srpo_jax.errors import UserError
from srpo_jax.evaluation import cautions, history, prompts, scoring, signals, statistics, stopping
from srpo_jax.evaluation.candidates import Item
from srpo_jax.evaluation.clock import Clock
from srpo_jax.evaluation.drift import Drift, Trace
from srpo_jax.evaluation.history import Entry, Figure
from srpo_jax.evaluation.scoring import DIVERSITY, Judges, Score, Scorer
from srpo_jax.evaluation.stopping import Aim
from srpo_jax.models.compute import join
from srpo_jax.weights import fingerprint

SAVERS = 4  # threads that write pictures and compute their signals while the devices draw
BASE = "base.npz"  # where the first weights pass, see drift; in the folder of the evaluations


class Plan(NamedTuple):
    """What a configuration asks for.

    Attributes:
      items: the pictures.
      scores: beside the run's own rewards.
      own: names of these.
      held_out: names of the scores whose models the run is not trained with.
      aim: by which the best update is chosen; None keeps none.
      how: see ``history.Entry``.
    """

    items: tuple[Item, ...]
    scores: tuple[Score, ...]
    own: tuple[str, ...]
    held_out: tuple[str, ...]
    aim: Aim | None
    how: str


class Outcome(NamedTuple):
    """What follows from an evaluation: numbers for the boards, whether the update is the best so far, and whether the
    run has gone on long enough without a better one."""

    values: dict[str, float]
    is_best: bool
    is_over: bool


def plan(config: ConfigDict, models: dict[str, str]) -> Plan | None:
    """Reads prompts and the scores' folders; None if ``config.evaluate.every`` is 0.

    ``models`` are the run's fingerprints (``resume.fingerprints``). Raises UserError for what is not there or does not
    fit.
    """
    asked = config.evaluate
    if not asked.every:
        return None
    chosen = prompts.read(asked.prompts or prompts.SHIPPED, asked.column, count=asked.count)
    items = tuple(Item(prompt.text, number) for prompt in chosen for number in range(asked.images))
    own, scores = tuple(used_rewards(config)), scoring.parse(asked.scores, "--config.evaluate.scores")
    for score in scores:
        if score.name in own:
            raise UserError(
                f"config.evaluate.scores: {score.name!r} is the name of a reward of this run, which is scored anyway; "
                f"give another one: NAME={score.source}"
            )
        if score.kind == DIVERSITY and asked.images < 2:
            raise UserError(
                "config.evaluate.images=1: diversity compares the pictures of a prompt; draw 2 or more of each"
            )
    aim = stopping.parse(config.checkpoint.best) if config.checkpoint.best else None
    known = (*own, *(score.name for score in scores))
    if aim and aim.score not in known:
        raise UserError(f"config.checkpoint.best={config.checkpoint.best}: there is no such score; choose one of "
                        f"{', '.join(known)}, or name more in config.evaluate.scores")  # fmt: skip
    trained = [models[f"reward.models.{name}.path"] for name in own]
    judged = [score for score in scores if score.kind != DIVERSITY]
    held_out = tuple(score.name for score in judged if score.content not in trained and not score.figure)
    told = [(item.prompt, item.image) for item in items], [(score.name, score.kind, score.content) for score in scores]
    look = config.data.height, config.data.width, asked.steps, asked.guidance, asked.seed
    how = fingerprint.joined([json.dumps([*told, look, sorted(models.items())])])
    return Plan(items, scores, own, held_out, aim, how)


def ended(workdir: str | os.PathLike, what: Plan, patience: int, done: int) -> bool:
    """Whether the run of a workdir has ended with update ``done``, ``patience`` evaluations after its best."""
    entries = [entry for entry in history.read(workdir) if entry.step <= done]
    alike = bool(entries) and entries[-1].how == what.how
    return bool(alike and what.aim) and stopping.is_over(entries, what.aim, patience)


class Evaluator:
    """Evaluates a run, and keeps the history of its evaluations in the workdir.

    Args:
      config, built: of the run.
      encode: the text encoders, which are not kept.
      what: to do.
      workdir: of the run. Nothing is written before ``begin``.
    """

    def __init__(
        self,
        config: ConfigDict,
        built: program.Program,
        encode: conditions.PromptEncoder,
        what: Plan,
        workdir: str | os.PathLike,
    ):
        self._workdir, self._what, self._first = storage.path(workdir), what, jax.process_index() == 0
        self._patience, self._compiled = config.evaluate.patience, False
        self.entries: list[Entry] = []
        networks, asked = built.networks, config.evaluate
        look = sampling.Look(config.data.height, config.data.width, asked.steps, asked.guidance)
        # At most what is known to fit: the samples that pass through an update at once.
        at_once = min(config.data.batch_size // config.optim.accumulation, len(what.items))
        place = built.mesh, networks.family, networks.transformer
        self._painter = sampling.Painter(*place, networks.autoencoder, config.model.path, look, at_once=at_once)
        self._chunks = self._painter.prepare(
            encode,
            [item.prompt for item in what.items],
            seed=asked.seed,
            names=np.stack([item.name for item in what.items]),
        )
        self._drift = Drift(*place, config.model.path, look, self._chunks[0])
        self._base: Trace | None = None
        self._own = {
            name: Scorer(name, networks.rewards[name], networks.rewards[name].tokens(used.path), built.mesh, at_once)
            for name, used in used_rewards(config).items()
        }
        kinds = {used.kind for used in used_rewards(config).values()} | {score.kind for score in what.scores}
        self._cautions = cautions.of_kinds(kinds, "run")
        judges = Judges(built.mesh, at_once)
        # Read here, where nothing is lost yet if one cannot be.
        self._judges = {score.source: judges.judge(score) for score in what.scores if score.kind != DIVERSITY}
        self._features = {score.source: judges.features(score) for score in what.scores if score.kind == DIVERSITY}

    def begin(self, done: int) -> None:
        """Takes up the history of a run that goes on from update ``done``: what is of later updates is dropped."""
        there = history.read(self._workdir)
        self.entries = [entry for entry in there if entry.step <= done]
        for words in self._cautions:
            terminal.say(f"note: {words}")
        if not self._what.held_out:
            terminal.say(
                "config.evaluate.scores names no score but of what the run is trained with: over-optimisation of that "
                "will not be noticed"
            )
        file = self._workdir / history.FOLDER / BASE
        if done and file.exists():
            with np.load(io.BytesIO(file.read_bytes())) as found:
                if str(found["how"]) == self._what.how:
                    self._base = Trace(found["states"], found["velocities"])
        if self._first:
            if len(self.entries) < len(there):
                history.write(self._workdir, self.entries)
            texts = [item.prompt for item in self._what.items]
            content = json.dumps(texts, indent=1, ensure_ascii=False)
            storage.write(self._workdir / history.FOLDER / history.PROMPTS, content.encode())

    def lacks(self, step: int) -> bool:
        """Whether an update was never evaluated, as before training and where a run was stopped."""
        return not self.entries or self.entries[-1].step < step

    @property
    def best(self) -> int | None:
        """The update with the best score so far."""
        return self.entries[-1].best if self.entries else None

    @property
    def is_over(self) -> bool:
        """Whether the run has gone on long enough without a better score."""
        aim = self._what.aim
        return bool(aim and self.entries) and stopping.is_over(self.entries, aim, self._patience)

    def evaluate(self, step: int, state: TrainState, frozen: Frozen, stopped: Callable[[], int]) -> Outcome | None:
        """Draws, scores and writes. ``stopped`` is asked now and then, by all processes at once; None if it says so."""
        clock, items = Clock(), self._what.items
        params = join(state.params if state.ema is None else state.ema, frozen.base)
        found: dict[str, list[np.ndarray]] = {}
        features: dict[str, list[np.ndarray]] = {}
        seen: list[concurrent.futures.Future] = []
        with concurrent.futures.ThreadPoolExecutor(SAVERS) as pool:
            painted, first = iter(self._painter.paint(params, frozen.autoencoder, self._chunks)), 0
            for chunk in self._chunks:
                if stopped():
                    return None
                part = clock.part if self._compiled else _compiling(clock)
                with part("draw"):
                    images = next(painted)
                texts = [item.prompt for item in items[first : first + chunk.count]]
                if self._first:
                    files = [history.picture(self._workdir, step, first + row) for row in range(chunk.count)]
                    seen += [pool.submit(_keep, *pair) for pair in zip(images, files, strict=True)]
                with part("score"):
                    self._judge(images, texts, frozen, found, features)
                if chunk is self._chunks[0]:
                    with part("drift"):
                        drift = self._drift_of(step, params)
                first, self._compiled = first + chunk.count, True
            with clock.part("save pictures"):
                of_pictures = [future.result() for future in seen]
        with clock.part("statistics"):
            values = {name: np.concatenate(parts) for name, parts in found.items()}
            looks = {name: np.concatenate(parts) for name, parts in features.items()}
            of = [item.prompt for item in items]
            values |= {name: signals.unlikeness_of_prompts(look, of) for name, look in looks.items()}
            worth = {f"{name}_vendi": signals.vendi(look) for name, look in looks.items()}
            shown = {name: [one[name] for one in of_pictures] for name in of_pictures[0]} if of_pictures else {}
            worth |= {} if drift is None else {"drift": drift}
            entry = self._entry(step, values, shown, worth, clock)
        if self._first:
            self._write(entry, values, shown)
        self._tell(entry)
        numbers = {f"evaluate/{name}": figure.mean for name, figure in entry.scores.items()}
        numbers |= {f"evaluate/signals/{name}": value for name, value in entry.signals.items()}
        return Outcome(numbers, entry.best == step, self.is_over)

    def _judge(
        self,
        images: np.ndarray,
        texts: list[str],
        frozen: Frozen,
        found: dict[str, list[np.ndarray]],
        features: dict[str, list[np.ndarray]],
    ) -> None:
        for name, scorer in self._own.items():
            found.setdefault(name, []).append(scorer(frozen.rewards[name], images, texts))
        made: dict[str, tuple[np.ndarray, ...]] = {}
        for score in self._what.scores:
            if score.kind == DIVERSITY:
                features.setdefault(score.name, []).append(self._features[score.source](images))
                continue
            if score.source not in made:
                made[score.source] = self._judges[score.source](images, texts)
            found.setdefault(score.name, []).append(made[score.source][score.figure])

    def _drift_of(self, step: int, params: Any) -> float | None:
        """None of a run that was not evaluated, or in another way, before it began to train."""
        if step == 0:
            self._base = self._drift.trace(params)
            if self._first:
                content = io.BytesIO()
                np.savez(content, how=self._what.how, **self._base._asdict())
                storage.write(self._workdir / history.FOLDER / BASE, content.getvalue())
        return None if self._base is None else self._drift(params, self._base)

    def _entry(
        self,
        step: int,
        values: dict[str, np.ndarray],
        shown: dict[str, list[float]],
        beside: dict[str, float],
        clock: Clock,
    ) -> Entry:
        place = {prompt: number for number, prompt in enumerate(dict.fromkeys(i.prompt for i in self._what.items))}
        of = np.array([place[item.prompt] for item in self._what.items])
        scores = {name: _figure(statistics.mean(found, of), len(found)) for name, found in values.items()}
        means = {name: float(np.mean(found)) for name, found in shown.items()} | beside
        means = {name: float(f"{value:.7g}") for name, value in means.items()}
        entry = Entry(step, self._what.how, scores, means, clock.seconds, [], None)
        entries, aim = [*self.entries, entry], self._what.aim
        warnings = stopping.over_optimised(entries, self._what.own, self._what.held_out)
        best = stopping.best(entries, aim) if aim else None
        if aim and stopping.is_over(entries, aim, self._patience):
            warnings.append(
                f"evaluate.patience: {self._patience} evaluations without a better {aim.score} than that of update "
                f"{best}; training ends here"
            )
        entry = dataclasses.replace(entry, warnings=warnings, best=best)
        self.entries = [*self.entries, entry]
        return entry

    def _write(self, entry: Entry, values: dict[str, np.ndarray], shown: dict[str, list[float]]) -> None:
        numbers = {name: [float(f"{value:.7g}") for value in found] for name, found in values.items()}
        content = json.dumps({"scores": numbers, "signals": shown}, allow_nan=False)
        file = history.picture(self._workdir, entry.step, 0).with_name(history.SCORES)
        storage.write(file, content.encode())
        history.write(self._workdir, self.entries)

    def _tell(self, entry: Entry) -> None:
        figures = [
            f"{name} {figure.mean:.4g}" + ("" if figure.low is None else f" ({figure.low:.4g} to {figure.high:.4g})")
            for name, figure in entry.scores.items()
        ]
        parts = ", ".join(f"{part} {seconds:.1f}" for part, seconds in entry.seconds.items())
        best = "" if not self._what.aim else "; the best so far" if entry.best == entry.step else (
            f"; the best is of update {entry.best}"
        )  # fmt: skip
        terminal.say(f"evaluation of update {entry.step}: {', '.join(figures)}{best}; seconds: {parts}")
        for words in entry.warnings:
            terminal.warn(words)


def _compiling(clock: Clock) -> Callable[[str], contextlib.AbstractContextManager[None]]:
    """Parts whose programs are compiled first count as that."""
    return lambda _: clock.part("compile")


def _keep(picture: np.ndarray, file: os.PathLike) -> dict[str, float]:
    """Writes a picture and returns its signals."""
    sampling.save_image(Image.fromarray(picture), file)
    return signals.of_picture(picture)


def _figure(mean: statistics.Estimate, count: int) -> Figure:
    low, high = (float(f"{end:.7g}") if np.isfinite(end) else None for end in (mean.low, mean.high))
    return Figure(float(f"{mean.value:.7g}"), low, high, count)
