"""One run at a time in a workdir: a lock that names its holder, and that is free again when its holder is gone.

    WORKDIR/run.lock   JSON: host, process, started, heartbeat (UTC), machine, ticks, token

The first process of a job holds it. It is taken, renewed and given back by conditional writes (a generation of the file
or object has to be the one that was read), so that of two who come at the same moment one gets it, on a disk and in a
bucket. A holder that was killed leaves it behind:

- On the machine that asks, a process that no longer runs (by its number and the moment of its start) frees it at once.
- Of another machine, or another container, only its heartbeat is seen, which it writes every ``BEAT`` seconds. Whoever
  asks watches it: if it moves, the holder lives; if it does not for ``SILENCE`` seconds, the lock is free. Clocks that
  differ do not matter. A heartbeat that is more than ``CERTAIN`` seconds old by the clocks is not watched.
"""

import contextlib
import datetime
import json
import os
import pathlib
import secrets
import socket
import threading
import time
from typing import Any

import tensorstore as ts

from srpo_jax import distributed, storage
from srpo_jax.errors import StorageError, UserError, tell

NAME = "run.lock"
BEAT, SILENCE, CERTAIN = 15.0, 120.0, 3600.0
LOOK = 1.0  # seconds between two looks at a lock that is watched
UNTRUE = b""  # the generation that a conditional write gives back whose condition did not hold


class Lock:
    """The lock of a workdir, given back when the block ends that it is used for (``with Lock(workdir) as held``).

    Processes of a job other than the first do nothing. ``flag`` is what names the workdir, for messages.
    """

    def __init__(self, workdir: str | os.PathLike, flag: str = "--workdir"):
        self._flag = flag
        self._place = storage.absolute(storage.path(workdir)) / NAME
        self._active = distributed.place()[0] == 0
        self._me = _introduction()
        self._generation: bytes | None = None  # of what we wrote; None while we do not hold it
        self._lost_to: str | None = None
        self._ended = threading.Event()

    def __enter__(self) -> "Lock":
        return self

    def __exit__(self, *_: object) -> None:
        """Gives the lock back, if it is held."""
        self._ended.set()
        if self._generation is None:
            return
        self._beating.join()
        with contextlib.suppress(Exception):  # who asks next sees that this process is gone
            self._write(None, self._generation)

    def acquire(self) -> None:
        """Takes the lock, unless it is held already; the workdir is made for it.

        Raises UserError that names the holder if there is one, and StorageError if the file cannot be written.
        """
        if not self._active or self._generation is not None:
            return
        try:
            self._store = _store(self._place)
            while True:
                content, generation = self._read()
                if content is not None:
                    self._wait_for_its_end(content, generation)
                self._me["heartbeat"] = _now()
                made = self._write(self._me, generation)
                if made != UNTRUE:
                    break
        except (ValueError, OSError) as error:  # tensorstore's are ValueErrors
            words = " ".join(str(error).split())[:300]
            remedy = f"check the rights of {self._flag}"
            raise StorageError(f"{self._place} cannot be written ({words}); {remedy}") from error
        self._generation = made
        self._beating = threading.Thread(target=self._beat, name="lock", daemon=True)
        self._beating.start()

    def check(self) -> None:
        """Raises UserError if another run has taken the lock meanwhile, since this one gave no sign for too long."""
        if self._lost_to:
            raise UserError(
                f"{self._lost_to} has taken {self._place} while this run gave no sign of life (stopped, or storage did "
                "not answer); this run ends, so that the two do not mix"
            )

    # --- reading and writing ---

    def _read(self) -> tuple[dict[str, Any] | None, bytes]:
        """(content, generation); the content is None if there is no lock, and {} if it cannot be understood."""
        found = self._store.read(NAME).result()
        if found.state != "value":
            return None, found.stamp.generation
        try:
            content = json.loads(found.value)
        except (ValueError, RecursionError):
            content = {}
        return content if isinstance(content, dict) else {}, found.stamp.generation

    def _write(self, content: dict[str, Any] | None, generation: bytes) -> bytes:
        """Writes the lock (None removes it) if it is still what was read; returns its new generation or UNTRUE."""
        value = None if content is None else f"{json.dumps(content, indent=2)}\n".encode()
        return self._store.write(NAME, value, if_equal=generation).result().generation

    def _beat(self) -> None:
        while not self._ended.wait(BEAT) and not self._lost_to:
            # Storage that does not answer for a while must not end a run; the next beat tries again.
            with contextlib.suppress(Exception):
                self._renew()

    def _renew(self) -> None:
        """Gives a sign of life, or notes who has taken the lock. Where the workdir is gone, none is made for it."""
        if not storage.in_bucket(self._place) and not self._place.parent.is_dir():
            return
        self._me["heartbeat"] = _now()
        made = self._write(self._me, self._generation)
        if made == UNTRUE:
            content, generation = self._read()
            if content is None:  # somebody removed it: it is ours still
                made = self._write(self._me, generation)
            elif content.get("token") == self._me["token"]:  # written, though the answer was lost
                made = generation
            else:
                self._lost_to = _who(content)
        if made != UNTRUE:
            self._generation = made

    # --- the holder ---

    def _wait_for_its_end(self, content: dict[str, Any], generation: bytes) -> None:
        """Returns when a lock's holder is gone or has given it back. Raises UserError if it lives."""
        if content.get("machine") == self._me["machine"]:
            if _ticks(content.get("process")) == content.get("ticks") is not None:
                raise self._refusal(content)
            tell(f"{self._place} was left by {_who(content)}, which is gone; this run takes it over")
            return
        age = _age(content)
        if age is not None and age > CERTAIN:
            tell(f"{self._place} was left by {_who(content)}, silent for {age / 3600:.1f} h; this run takes it over")
            return
        tell(f"{self._place} is held by {_who(content)}; watching for {SILENCE:.0f} s whether it gives a sign of life")
        until = time.monotonic() + SILENCE
        while time.monotonic() < until:
            time.sleep(LOOK)
            now, current = self._read()
            if now is None:
                return
            if current != generation:
                raise self._refusal(now)
        tell(f"{_who(content)} has given no sign of life for {SILENCE:.0f} s; this run takes {self._place} over")

    def _refusal(self, content: dict[str, Any]) -> UserError:
        return UserError(
            f"{self._place.parent} is in use by {_who(content)}; wait until that run ends, stop it, or choose another "
            f"{self._flag}"
        )


# --- who -------------------------------------------------------------------------------------------------------------


def _introduction() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "process": os.getpid(),
        "started": _now(),
        "machine": _machine(),
        "ticks": _ticks(os.getpid()),
        "token": secrets.token_hex(8),
    }


def _who(content: dict[str, Any]) -> str:
    words = {name: content.get(name, "unknown") for name in ("process", "host", "started", "heartbeat")}
    return (
        f"process {words['process']} on host {words['host']} (since {words['started']}, last sign of life "
        f"{words['heartbeat']})"
    )


def _machine() -> str:
    """What tells where a process number means something: this boot of this machine, and the container on it."""
    try:
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # no Linux
        return socket.gethostname()


def _ticks(process: Any) -> str | None:
    """When a process of this machine was started, which tells it from a later one of the same number; None if it does
    not run."""
    if not isinstance(process, int) or process <= 0:
        return None
    try:
        fields = pathlib.Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]
    except OSError:
        pass
    if os.path.exists("/proc/self/stat"):
        return None
    try:  # no Linux: that it runs has to do
        os.kill(process, 0)
        return "runs"
    except ProcessLookupError:
        return None
    except PermissionError:
        return "runs"


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _age(content: dict[str, Any]) -> float | None:
    """Seconds since a lock's heartbeat, by the clocks; None if it has none."""
    try:
        then = datetime.datetime.fromisoformat(content["heartbeat"])
        return (datetime.datetime.now(datetime.UTC) - then).total_seconds()
    except (KeyError, TypeError, ValueError):
        return None


def _store(place: Any) -> ts.KvStore:
    folder = os.fspath(place.parent)
    spec = f"{folder}/" if storage.in_bucket(place) else {"driver": "file", "path": f"{folder}/"}
    return ts.KvStore.open(spec).result()
