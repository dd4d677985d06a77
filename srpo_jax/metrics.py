"""What a run reports while it goes: JSON lines, TensorBoard, and a progress bar or plain lines on the terminal.

Nothing can be appended to an object of a bucket. For a workdir there, the files grow in a folder of this machine and
are copied as wholes: every ``COPY_EVERY`` seconds, and before each checkpoint, so that a run that is resumed has every
line up to its checkpoint.
"""

import json
import os
import sys
import tempfile
import time
from typing import Any

import jax
import tqdm
from etils import epath

from srpo_jax import storage, wandb_board

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
      board: of Weights & Biases, which gets all numbers too; None without.
    """

    def __init__(self, workdir: str | os.PathLike, done: int, total: int, board: wandb_board.Board | None = None):
        self._active = jax.process_index() == 0
        if not self._active:
            return
        from tensorboardX import SummaryWriter

        self._workdir = storage.path(workdir)
        self._copied = self._temporary = None
        folder = self._workdir
        if storage.in_bucket(folder):
            self._temporary = tempfile.TemporaryDirectory(prefix="srpo_jax.")
            folder = epath.Path(self._temporary.name)
        kept = [record for record in read(workdir) if record["step"] <= done]
        storage.write(folder / JSONL, "".join(json.dumps(record) + "\n" for record in kept).encode())
        self._folder, self._wandb = folder, board
        self._file = open(folder / JSONL, "a", encoding="utf-8")
        # Files are named by the second: of two within one, the later would take the place of the other in a bucket.
        self._board = SummaryWriter(str(folder / TENSORBOARD), purge_step=done + 1, filename_suffix=f".{done}")
        self.flush()
        self._done, self._total, self._began = done, total, None
        # A bar needs a terminal that redraws its line; a log file gets a line a step.
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm.tqdm(total=total, initial=done, bar_format="{bar:10} {desc}", dynamic_ncols=True)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Reports the metrics of a step, finite numbers by name."""
        if not self._active:
            return
        self._file.write(json.dumps({"step": step} | values, allow_nan=False) + "\n")
        self._file.flush()
        self.plot(step, values)
        if self._temporary and time.monotonic() > self._copied + COPY_EVERY:
            self.flush()
        now = time.monotonic()
        self._began = self._began or now - values.get("step_seconds", 0.0)  # before that, programs were compiled
        left = (now - self._began) / (step - self._done) * (self._total - step)
        shown = line(step, self._total, values, left)
        if self._bar is None:
            print(shown, file=sys.stderr, flush=True)
        else:
            self._bar.set_description_str(shown, refresh=False)
            self._bar.update(step - self._bar.n)

    def plot(self, step: int, values: dict[str, float]) -> None:
        """Gives numbers by name to the boards alone: TensorBoard, and Weights & Biases if there is one."""
        if not self._active:
            return
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(step, values)

    def flush(self) -> None:
        """Sees to it that all that was reported is in the workdir."""
        if not self._active:
            return
        self._file.flush()
        self._board.flush()
        if self._temporary:
            for file in (self._folder / JSONL, *(self._folder / TENSORBOARD).iterdir()):
                storage.write(self._workdir / file.relative_to(self._folder), file.read_bytes())
            self._copied = time.monotonic()

    def close(self) -> None:
        """Flushes and closes everything."""
        if self._active:
            if self._bar is not None:
                self._bar.close()
            self.flush()
            self._board.close()
            if self._wandb is not None:
                self._wandb.close()
            self._file.close()
            if self._temporary:
                self._temporary.cleanup()


def read(workdir: str | os.PathLike) -> list[dict[str, Any]]:
    """The metrics of a workdir, one dictionary a step, up to one that is broken, as a last
    line that was cut off. [] if there are none."""
    file = storage.path(workdir) / JSONL
    if not file.exists():
        return []
    records = []
    for line in file.read_bytes().decode(errors="replace").splitlines():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            break
        records.append(record)
    return records


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
