"""The time that the parts of an evaluation take."""

import contextlib
import time
from collections.abc import Iterator


class Clock:
    """Seconds by part of the work; goes on from those that it is given."""

    def __init__(self, seconds: dict[str, float] | None = None):
        self.seconds = {} if seconds is None else seconds

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Counts the time of a block as that of a part."""
        started = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started
