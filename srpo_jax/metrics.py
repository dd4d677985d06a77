"""What a run reports while it goes: JSON lines, TensorBoard, and a progress bar or plain lines on the terminal."""

import json
import math
import os
import pathlib
import sys
from typing import Any

import jax
import tqdm

JSONL, TENSORBOARD = "metrics.jsonl", "tensorboard"


class Metrics:
    """Writes the metrics of every step; on processes other than the first it does nothing.

    Args:
      workdir: of the run.
      done: steps that the run goes on from; what an interrupted run has written of later steps is dropped.
      total: steps of the whole run.
    """

    def __init__(self, workdir: str | os.PathLike, done: int, total: int):
        self._active = jax.process_index() == 0
        if not self._active:
            return
        from tensorboardX import SummaryWriter

        workdir = pathlib.Path(workdir)
        _drop_after(workdir / JSONL, done)
        self._file = open(workdir / JSONL, "a", encoding="utf-8")
        self._board = SummaryWriter(str(workdir / TENSORBOARD), purge_step=done + 1)
        self._total = total
        # A bar needs a terminal that redraws its line; a log file gets a line a step.
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm.tqdm(total=total, initial=done, unit="step", dynamic_ncols=True)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Reports the metrics of a step, finite numbers by name."""
        if not self._active:
            return
        self._file.write(json.dumps({"step": step} | values, allow_nan=False) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        shown = " ".join(f"{name} {_short(value)}" for name, value in values.items())
        if self._bar is None:
            print(f"step {step}/{self._total} {shown}", file=sys.stderr, flush=True)
        else:
            self._bar.set_postfix_str(shown, refresh=False)
            self._bar.update(step - self._bar.n)

    def say(self, text: str) -> None:
        """A line for the person at the terminal; it does not break the progress bar."""
        if self._active:
            tqdm.tqdm.write(text, file=sys.stderr)

    def close(self) -> None:
        """Flushes and closes everything."""
        if self._active:
            if self._bar is not None:
                self._bar.close()
            self._board.close()
            self._file.close()


def not_finite(values: dict[str, float]) -> list[str]:
    """The names of metrics that are infinite or not a number."""
    return [name for name, value in values.items() if not math.isfinite(value)]


def read(workdir: str | os.PathLike) -> list[dict[str, Any]]:
    """The metrics of a workdir, one dictionary a step, without a last line that was cut off. [] if there are none."""
    file = pathlib.Path(workdir) / JSONL
    if not file.exists():
        return []
    records = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def _drop_after(file: pathlib.Path, step: int) -> None:
    kept = [record for record in read(file.parent) if record["step"] <= step]
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
    os.replace(partial, file)


def _short(value: float) -> str:
    return f"{value:.4g}"
