"""What a run writes for people to look at, by a thread of its own: no report stops training or makes it wait.

A disk may be full, a folder may not be writable or be gone, storage may hang. An errand that fails is named in a
warning once, and once more when it works again; one that hangs is not waited for after ``PATIENCE`` seconds. Where the
whole workdir is gone, as when its disk is not mounted any more, nothing is written in its place.
"""

import queue
import threading
from collections.abc import Callable

from etils import epath

from srpo_jax import errors, storage, terminal

PATIENCE = 60.0  # seconds that anybody waits for errands
MOST = 100  # errands that wait; while storage hangs, further ones are left out


class Errands:
    """Runs functions one after the other; its thread does not keep the process alive.

    Args:
      home: folder in which they write.
    """

    def __init__(self, home: epath.Path) -> None:
        self._home = home
        self._waiting: queue.Queue[tuple[str, Callable[[], None]]] = queue.Queue(MOST)
        self._failed: set[str] = set()  # the errands that did not work when they were run last
        self._doing = ""
        self._stuck = False
        threading.Thread(target=self._run, name="errands", daemon=True).start()

    def do(self, what: str, work: Callable[[], None]) -> None:
        """Asks for an errand and returns at once.

        Args:
          what: a file or folder, for the warning that it cannot be written.
          work: writes it.
        """
        try:
            self._waiting.put_nowait((what, work))
        except queue.Full:
            self._tell_of_failure(what, "storage does not answer")

    def wait(self) -> None:
        """Returns when all that was asked for is done or has failed, at the latest after ``PATIENCE`` seconds; at once
        while an errand hangs for which somebody has waited so long."""
        if self._stuck:
            return
        done = threading.Event()
        self.do("", done.set)
        if not done.wait(PATIENCE):
            self._stuck = True
            terminal.warn(f"writing {self._doing} has taken {PATIENCE:.0f} s; training goes on without waiting for it")

    def _run(self) -> None:
        while True:
            self._doing, work = self._waiting.get()
            try:
                # Who waits is told so wherever the workdir is.
                if self._doing and not storage.in_bucket(self._home) and not self._home.is_dir():
                    raise FileNotFoundError(f"{self._home} is gone")
                work()
            except Exception as error:  # of several libraries, and whatever it is, training goes on
                self._tell_of_failure(self._doing, errors.brief(error))
            else:
                if self._doing in self._failed:
                    self._failed.discard(self._doing)
                    terminal.warn(f"{self._doing} is written again")
            self._stuck = False

    def _tell_of_failure(self, what: str, why: str) -> None:
        if what and what not in self._failed:
            self._failed.add(what)
            terminal.warn(f"{what} cannot be written ({why}); training goes on")
