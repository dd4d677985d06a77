"""SIGINT and SIGTERM while a run trains: noted, so that the update that is being made is finished and saved."""

import signal
import socket
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from srpo_jax import terminal


class Interruption:
    """While entered, SIGINT and SIGTERM are noted in ``signal`` for the loop to see; a second one acts at once.

    Args:
      outlook: what to say when one comes, at once, though the program may be in the middle of an update: what is going
        to happen, and how long it takes.
    """

    def __init__(self, outlook: Callable[[], str] = str) -> None:
        self.signal: int | None = None
        self._outlook, self._noted = outlook, 0.0
        self._before: dict[int, Any] = {}

    @property
    def seconds(self) -> float:
        """Since the signal came, or 0."""
        return time.monotonic() - self._noted if self._noted else 0.0

    def __enter__(self) -> "Interruption":
        # Python lets only the main thread handle signals; elsewhere whoever started the thread has to.
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
            # Handlers run when the main thread comes back to Python, which an update keeps it from.
            self._bell, rings = socket.socketpair()
            rings.setblocking(False)
            self._rings, self._fd_before = rings, signal.set_wakeup_fd(rings.fileno(), warn_on_full_buffer=False)
            threading.Thread(target=self._listen, name="interruption", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._before:
            signal.set_wakeup_fd(self._fd_before)
            self._rings.close()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        for caught, handler in self._before.items():
            signal.signal(caught, handler)

    def _listen(self) -> None:
        with self._bell:
            while rung := self._bell.recv(1):
                if not self._noted and rung[0] in self._before:
                    self._noted = time.monotonic()
                    terminal.say(f"{signal.Signals(rung[0]).name}: {self._outlook()}")
