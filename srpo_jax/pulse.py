"""Signs of life between the processes of a job: one that hangs ends the others, with a word, and not in silence.

Collectives wait for ever for a process that does not come. Each process therefore tells JAX's coordination service
every few seconds that it is there, and reads what the others tell. One that falls silent (its machine hangs, somebody
stopped it) counts as lost. One that gives signs of life and yet does not come is noticed by the bound on what waits.
"""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from srpo_jax import errors

# Exit code of a process that notices by itself that another one is lost: 128 + SIGABRT, since JAX aborts when it
# notices. XPK starts a job again for codes from 127.
LOST = 134
AGAIN = "The same command in all processes goes on from what was saved"
KEY = "srpo_jax/pulse/"
LEFT = "left"  # told by a process that has nothing more to do


class Pulse:
    """The signs of life of this process and its view of the others'.

    Args:
      client: of JAX's coordination service.
      process, count: this process's number, and how many there are.
      silence: seconds without a sign after which a process is lost.
      end: called with the reason when one is; does not return in earnest.
    """

    def __init__(self, client: Any, process: int, count: int, silence: float, end: Callable[[str], None]):
        self._client, self._process, self._silence, self._end = client, process, silence, end
        now = time.monotonic()
        self._seen = {other: ("", now) for other in range(count) if other != process}  # last sign, and when it came
        self._answered = now  # by the coordination service, which lives in process 0
        self._bounds: list[list] = []  # of what waits, the innermost last: [deadline, seconds, words]
        self._left = threading.Event()

    def start(self) -> None:
        """Begins to give and to read signs, in threads that do not keep the process alive."""
        for work in (self._beat, self._watch):
            threading.Thread(target=work, name=f"pulse{work.__name__}", daemon=True).start()

    def leave(self) -> None:
        """Tells the others not to wait for more signs."""
        self._left.set()
        self._client.key_value_set(f"{KEY}{self._process}", LEFT, allow_overwrite=True)

    @contextlib.contextmanager
    def bounded(self, seconds: float, what: str) -> Iterator[Callable[[], None]]:
        """Bounds a block of the main thread in which this process waits for others; what it yields begins anew. A bound
        within another one stands for it, which begins anew behind it."""
        bound = [time.monotonic() + seconds, seconds, what]

        def renew() -> None:
            bound[0] = time.monotonic() + seconds

        self._bounds.append(bound)
        try:
            yield renew
        finally:
            self._bounds.pop()
            if self._bounds:
                self._bounds[-1][0] = time.monotonic() + self._bounds[-1][1]

    def _beat(self) -> None:
        beats = 0
        while not self._left.is_set():
            beats += 1
            with contextlib.suppress(Exception):  # the service is gone: ``_watch`` sees that it does not answer
                self._client.key_value_set(f"{KEY}{self._process}", str(beats), allow_overwrite=True)
                signs = dict(self._client.key_value_dir_get(KEY))
                now = time.monotonic()
                for other, (before, _) in self._seen.items():
                    sign = signs.get(f"{KEY}{other}", "")
                    if sign != before or sign == LEFT:
                        self._seen[other] = sign, now
                self._answered = now
            self._left.wait(self._silence / 6)

    def _watch(self) -> None:
        while not self._left.wait(min(1, self._silence / 6)):
            now = time.monotonic()
            if now - self._answered > self._silence:
                # Their signs come by way of process 0: no more is known of them.
                self._end(f"process 0, which coordinates, has not answered for {now - self._answered:.0f} s")
            silent = [other for other, (_, when) in self._seen.items() if when < self._answered - self._silence]
            if silent:
                names = ", ".join(map(str, sorted(silent)))
                self._end(f"no sign of life from process {names} for {self._silence:.0f} s")
            for deadline, seconds, what in self._bounds[-1:]:
                if now > deadline:
                    self._end(f"{what} has taken {seconds:.0f} s, though all processes give signs of life: one hangs")


_current: list[Pulse] = []  # of this process's job


def end(reason: str) -> None:
    """Ends this process at once: the usual end would wait for the process that is lost."""
    errors.tell(f"error: another process of this job is lost ({reason}); its own log may say why. {AGAIN}")
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    os._exit(LOST)


@contextlib.contextmanager
def of_job(client: Any, process: int, count: int, silence: float) -> Iterator[None]:
    """Gives and watches signs of life for a block."""
    pulse = Pulse(client, process, count, silence, end)
    pulse.start()
    _current.append(pulse)
    try:
        yield
    finally:
        _current.remove(pulse)
    pulse.leave()


def bounded(seconds: float, what: str) -> contextlib.AbstractContextManager[Callable[[], None]]:
    """Bounds a block that waits for the other processes of this job: if it takes longer, this process ends with
    ``LOST``. What it yields, called, begins the time anew. A process without others waits as long as it wants."""
    return _current[-1].bounded(seconds, what) if _current else contextlib.nullcontext(lambda: None)
