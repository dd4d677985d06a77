"""What a person sees of a command while it works, on standard error: bars where a terminal redraws its line, and whole
lines now and then in a log file. Of a job, process 0 speaks."""

import contextlib
import sys
import threading
import time
from collections.abc import Iterator

import jax
import tqdm

from srpo_jax import distributed, errors

EVERY = 10.0  # seconds between two lines of one bar in a log
PATIENCE = 2.0  # seconds of silence after which a log says what is being done
UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "bytes"))
TICK = 1.0  # seconds between two looks at the clock on a terminal


def in_bytes(size: float) -> str:
    """A number of bytes in words: three digits and the largest unit that leaves one before the point."""
    unit, name = next(((unit, name) for unit, name in UNITS if size >= unit), UNITS[-1])
    return f"{size / unit:.3g} {name}"


def say(text: str) -> None:
    """A line; it does not break a bar."""
    if jax.process_index() == 0:
        _write(text)


def warn(text: str, everywhere: bool = False) -> None:
    """A warning, as a line that does not break a bar, at any time: devices are not asked for.

    It comes from the first process of a job, or from each of them. Whoever has ``warnings`` gets it too."""
    if everywhere or distributed.place()[0] == 0:
        for heard in _HEARD:
            heard.append(text)
        _write(f"warning: {text}")


def _write(text: str) -> None:
    # A log on a full disk, a terminal that was closed: nobody reads it, and what goes on is worth more than the line.
    with contextlib.suppress(OSError, ValueError):
        tqdm.tqdm.write(text, file=sys.stderr)


_HEARD: list[list[str]] = []


@contextlib.contextmanager
def warnings() -> Iterator[list[str]]:
    """The list that warnings of this process, of all its threads, are added to while the block goes on."""
    heard: list[str] = []
    _HEARD.append(heard)
    try:
        yield heard
    finally:
        _HEARD[:] = [other for other in _HEARD if other is not heard]


@contextlib.contextmanager
def doing(what: str) -> Iterator[None]:
    """For a block that is silent for a while: says what it does, and afterwards in how many seconds it was done.

    On a terminal the seconds run. In a log there is one line where it takes less than ``PATIENCE`` seconds, else two.
    Nothing is said in the end if the block fails.
    """
    if jax.process_index() != 0:
        yield
        return
    started, done = time.perf_counter(), threading.Event()
    clock = threading.Thread(target=_run_clock, args=(what, done), daemon=True)
    clock.start()
    try:
        yield
    finally:
        done.set()
        clock.join()
    say(f"{what}: {time.perf_counter() - started:.1f} s")


def _run_clock(what: str, done: threading.Event) -> None:
    if sys.stderr.isatty():
        with tqdm.tqdm(bar_format="{desc} {elapsed}", desc=what, leave=False, file=sys.stderr) as line:
            while not done.wait(TICK):
                line.refresh()
    elif not done.wait(PATIENCE):
        say(f"{what} ...")


class Log:
    """What stands in a bar's place in a log: a line every ``EVERY`` seconds."""

    def __init__(self, total: int, unit: str, label: str, done: int, scale: bool):
        self._total, self._done, self._before = total, done, done
        self._words = {"prefix": label, "unit": unit, "unit_scale": scale, "ncols": 0}
        self._started = self._told = time.monotonic()

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def update(self, count: int = 1) -> None:
        """So many more are done."""
        self._done += count
        now = time.monotonic()
        if now - self._told >= EVERY:
            self._told, elapsed = now, now - self._started
            line = tqdm.tqdm.format_meter(self._done, self._total, elapsed, initial=self._before, **self._words)
            errors.tell(line)

    def close(self) -> None:
        """Says nothing: the command itself says what it has made."""


Bar = tqdm.tqdm | Log


def bar(total: int, unit: str, label: str, *, done: int = 0, scale: bool = False, shown: bool = True) -> Bar:
    """Progress of a command, a context with ``update(count)``.

    Args:
      total: how many there are.
      unit: of them, as "image"; "B" for bytes.
      label: what is being done.
      done: how many were done before.
      scale: write thousands as k, M and G.
      shown: False in the processes of a job that are to be silent.
    """
    if shown and not sys.stderr.isatty():
        return Log(total, unit, label, done, scale)
    return tqdm.tqdm(
        total=total, unit=unit, desc=label, initial=done, unit_scale=scale, leave=False, disable=not shown,
        dynamic_ncols=True, file=sys.stderr,
    )  # fmt: skip
