"""What a run reports while it goes: JSON lines, TensorBoard, and a progress bar or plain lines on the terminal.

Nothing can be appended to an object of a bucket. For a workdir there, the files grow in a folder of this machine and
are copied as wholes: every ``COPY_EVERY`` seconds, and before each checkpoint, so that a run that is resumed has every
line up to its checkpoint.
"""

import contextlib
import functools
import json
import os
import pathlib
import socket
import sys
import tempfile
import threading
import time
from typing import Any

import jax
import tqdm
from etils import epath

from srpo_jax import leftovers, schema, storage, tensorboard, terminal, wandb_board
from srpo_jax.errands import Errands

JSONL, TENSORBOARD = "metrics.jsonl", "tensorboard"
COPY_EVERY = 30
REWARD, CAPTION = "/reward", "/caption_reward"  # ends of the names of a term's reward, and of its plain one
COLUMNS = 100  # that a step's line has at most; the rest of its metrics is in the files


class Metrics:
    """Writes the metrics of every step; on processes other than the first it does nothing.

    Args:
      workdir: of the run.
      done: steps that the run goes on from; what an interrupted run has written of later steps is dropped.
      total: steps of the whole run.
      errands: by which files are written, so that no disk stops training or makes it wait.
      board: of Weights & Biases, which gets all numbers too; None without.

    Attributes:
      lost: seconds of the updates that were dropped.
      seconds: of the newest update; 0 before the first.

    Raises StorageError if the workdir cannot be written now, at the start.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        done: int,
        total: int,
        errands: Errands,
        board: wandb_board.Board | None = None,
    ):
        self.lost = self.seconds = 0.0
        self._active = jax.process_index() == 0
        if not self._active:
            return
        self._workdir, self._errands = storage.path(workdir), errands
        self._copied = self._temporary = None
        folder = self._workdir
        if storage.in_bucket(folder):
            self._temporary = tempfile.TemporaryDirectory(prefix="srpo_jax.")
            folder = epath.Path(self._temporary.name)
        found, broken = _read(workdir)
        if broken:
            place = leftovers.keep_copy(self._workdir / JSONL)
            terminal.warn(
                f"{self._workdir / JSONL}: {len(broken)} lines cannot be read, as line {broken[0]}; they are left out, "
                f"and the file as it was is {place.name}"
            )
        self.lost = sum(record.get("step_seconds", 0.0) for record in found if record["step"] > done)
        lines = "".join(json.dumps(record) + "\n" for record in found if record["step"] <= done)
        # Files are named by the second: of two within one, the later would take the place of the other in a bucket.
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{done}"
        self._folder, self._wandb = folder, board
        self._lines = Tail(folder / JSONL, lines.encode())
        self._board = Tail(folder / TENSORBOARD / name, tensorboard.head(done))
        self.flush()
        self._done, self._total, self._began = done, total, None
        # A bar needs a terminal that redraws its line; a log file gets a line a step.
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm.tqdm(total=total, initial=done, bar_format="{bar:10} {desc}", dynamic_ncols=True)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Reports the metrics of a step, finite numbers by name."""
        self.seconds = values.get("step_seconds", 0.0)
        if not self._active:
            return
        self._lines.add((json.dumps({"step": step} | values, allow_nan=False) + "\n").encode())
        self._errands.do(self._lines.name, self._lines.write)
        self.plot(step, values)
        if self._temporary and time.monotonic() > self._copied + COPY_EVERY:
            self._copy()
        now = time.monotonic()
        self._began = self._began or now - values.get("step_seconds", 0.0)  # before that, programs were compiled
        left = (now - self._began) / (step - self._done) * (self._total - step)
        shown = line(step, self._total, values, left)
        if self._bar is None:
            terminal.say(shown)
        else:
            with contextlib.suppress(OSError):  # a terminal that was closed
                self._bar.set_description_str(shown, refresh=False)
                self._bar.update(step - self._bar.n)

    def plot(self, step: int, values: dict[str, float]) -> None:
        """Gives numbers by name to the boards alone: TensorBoard, and Weights & Biases if there is one."""
        if not self._active:
            return
        self._board.add(tensorboard.scalars(step, values))
        self._errands.do(self._board.name, self._board.write)
        if self._wandb is not None:
            self._errands.do("Weights & Biases", functools.partial(self._wandb.log, step, values))

    def flush(self) -> None:
        """Sees to it that all that was reported is in the workdir, as far as that can be written."""
        if not self._active:
            return
        if self._temporary:
            self._copy()
        self._errands.wait()

    def close(self) -> None:
        """Flushes and closes everything."""
        if self._active:
            if self._bar is not None:
                with contextlib.suppress(OSError):
                    self._bar.close()
            self.flush()
            if self._wandb is not None:
                self._errands.do("Weights & Biases", self._wandb.close)
                self._errands.wait()
            if self._temporary:
                self._temporary.cleanup()

    def _copy(self) -> None:
        """Asks for copies of all files in the bucket."""

        def copy() -> None:
            for file in (self._folder / JSONL, *(self._folder / TENSORBOARD).iterdir()):
                storage.write(self._workdir / file.relative_to(self._folder), file.read_bytes())

        self._errands.do(f"{self._workdir / JSONL}, or {TENSORBOARD} beside it,", copy)
        self._copied = time.monotonic()


class Tail:
    """A local file that grows at its end. What cannot be written stays in memory, and is written once it can be.

    Args:
      file: its folder is made.
      content: with which it begins, in the place of what it held.

    Raises StorageError.
    """

    def __init__(self, file: epath.Path, content: bytes):
        self.name = os.fspath(file)
        storage.write(file, content)
        self._file, self._size = pathlib.Path(self.name), len(content)
        self._waiting: list[bytes] = []
        self._lock = threading.Lock()

    def add(self, content: bytes) -> None:
        """Lets the next ``write`` write it."""
        with self._lock:
            self._waiting.append(content)

    def write(self) -> None:
        """Writes all that waits. Raises OSError; it waits then as before."""
        with self._lock:
            waiting = list(self._waiting)
        content = b"".join(waiting)
        with open(self._file, "ab") as file:
            there = file.tell()
            if there > self._size:  # the part of it for which a full disk had room
                file.truncate(self._size)
            self._size = min(self._size, there)  # less if somebody removed it
            file.write(content)
        self._size += len(content)
        with self._lock:
            del self._waiting[: len(waiting)]


def read(workdir: str | os.PathLike) -> list[dict[str, Any]]:
    """The metrics of a workdir, one dictionary a step, without lines that are broken. [] if there are none."""
    return _read(workdir)[0]


def _read(workdir: str | os.PathLike) -> tuple[list[dict[str, Any]], list[int]]:
    """``read``, and the numbers of the lines that are broken, but for a last one that was cut off and empty ones."""
    file = storage.path(workdir) / JSONL
    records, broken = [], []
    whole = file.read_bytes().split(b"\n") if file.exists() else []
    for number, line in enumerate(whole, 1):
        try:
            record = schema.parse(line) if line.strip() else None
        except ValueError:
            record = None
        if isinstance(record, dict) and type(record.get("step")) is int:
            records.append(record)
        elif line.strip() and number < len(whole):
            broken.append(number)
    return records, broken


def line(step: int, total: int, values: dict[str, float], left: float) -> str:
    """A step for the person at the terminal, in ``COLUMNS`` columns: loss, each term's reward as far as there is room,
    the gradient's norm, the seconds of the step, and the ``left`` ones of the run."""
    rewards = [f"{name.removesuffix(REWARD)} {value:.3g}" for name, value in values.items() if name.endswith(REWARD)]
    loss = [f"loss {values['loss']:.4g}"] if "loss" in values else []
    gradient = [f"gradient {values['grad_norm']:.3g}"] if "grad_norm" in values else []
    seconds = [f"{values['step_seconds']:.3g} s/step"] if "step_seconds" in values else []
    seconds += [f"{clock(left)} left"] if step < total else []

    def joined() -> str:
        return "  ".join([f"step {step}/{total}", " ".join([*loss, *rewards, *gradient]), *seconds])

    while rewards and len(joined()) > COLUMNS:
        rewards.pop()
    return joined()


def clock(seconds: float) -> str:
    """Seconds in words."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
