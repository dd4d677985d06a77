"""How much of a run's time is spent in updates, and not in starts, checkpoints, samples, and work that is lost."""

import time


class Goodput:
    """A clock that begins when it is made, at the beginning of a start."""

    def __init__(self) -> None:
        self._began, self._good, self._lost = time.perf_counter(), 0.0, 0.0

    def lose(self, seconds: float) -> None:
        """So many seconds of updates were lost by an interruption, and are made again by this start."""
        self._lost += seconds

    def share(self, seconds: float, good: bool) -> float:
        """The share (0 .. 1) of all time until now, with that of the lost updates, in which updates were made that
        count; one of so many ``seconds`` is the newest, and counts if it is ``good``."""
        self._good += seconds if good else 0.0
        return self._good / (time.perf_counter() - self._began + self._lost)
