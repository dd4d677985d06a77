"""One run at a time in a workdir: two that come at once, holders that are killed, and other machines."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
from helpers import bucket, children, tiny

from srpo_jax import lock, train
from srpo_jax.errors import UserError

# Takes the lock when its input says so, tells it, and holds it until its input ends.
CHILD = """
import sys
from srpo_jax import lock
from srpo_jax.errors import UserError
lock.SILENCE = 3.0
with lock.Lock(sys.argv[1]) as held:
    print("ready", flush=True)
    sys.stdin.readline()
    try:
        held.acquire()
        print("held", flush=True)
    except UserError as error:
        print(f"refused: {error}", flush=True)
    sys.stdin.readline()
"""


def start(workdir, **more):
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(workdir)],
        env=children.environment(JAX_PLATFORMS="cpu", **more),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    return child


def go(*started):
    """Lets children ask for the lock at the same moment; what each of them tells."""
    for child in started:
        assert child.stdout.readline() == "ready\n"
    for child in started:
        child.stdin.write("\n")
        child.stdin.flush()
    return [child.stdout.readline().strip() for child in started]


@pytest.fixture(scope="module")
def server():
    with bucket.here() as server:
        yield server


@pytest.fixture(params=["disk", "bucket"])
def workdir(request, tmp_path):
    if request.param == "disk":
        return tmp_path / "run"
    request.getfixturevalue("server")
    return f"gs://bucket/{tmp_path.name}"


def read(workdir):
    """The lock's content."""
    place = lock.storage.path(workdir) / lock.NAME
    return json.loads(place.read_text()) if place.exists() else None


def write(workdir, content):
    lock.storage.write(lock.storage.path(workdir) / lock.NAME, json.dumps(content).encode())


def test_of_several_that_come_at_once_one_goes_on(workdir):
    started = [start(workdir) for _ in range(3)]
    told = go(*started)
    winner = started[told.index("held")]
    assert sum(line == "held" for line in told) == 1
    holder = read(workdir)
    assert holder["process"] == winner.pid
    for line in told:
        words = f"is in use by process {winner.pid} on host {holder['host']} (since {holder['started']}"
        assert line == "held" or (line.startswith("refused: ") and words in line)
    for child in started:
        child.communicate("\n", timeout=60)
    assert read(workdir) is None, "it is given back"


def test_a_killed_holder_frees_it_at_once(workdir, capsys):
    child = start(workdir)
    assert go(child) == ["held"]
    with lock.Lock(workdir) as second, pytest.raises(UserError, match=f"in use by process {child.pid} on host"):
        second.acquire()
    child.send_signal(signal.SIGKILL)
    child.wait()
    began = time.monotonic()
    with lock.Lock(workdir) as second:
        second.acquire()
        assert read(workdir)["process"] == os.getpid()
    assert time.monotonic() - began < lock.SILENCE / 2 and f"left by process {child.pid}" in capsys.readouterr().err
    assert read(workdir) is None


def test_a_later_process_of_the_same_number_is_another(tmp_path):
    """As in containers, whose first process always has the same number."""
    me = lock._introduction() | {"ticks": "1", "heartbeat": lock._now()}
    write(tmp_path, me)
    with lock.Lock(tmp_path) as held:
        held.acquire()
        assert read(tmp_path)["token"] != me["token"]


ELSEWHERE = {"host": "far", "process": 1, "machine": "another", "ticks": "1", "token": "t", "started": "then"}


def test_a_holder_elsewhere_that_gives_signs_is_named(workdir, monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.2)
    with monkeypatch.context() as patch:
        patch.setattr(lock, "_introduction", lambda: ELSEWHERE | {"token": "other"})
        holder = lock.Lock(workdir)
    with holder:
        holder.acquire()
        with lock.Lock(workdir) as second, pytest.raises(UserError, match=r"process 1 on host far \(since then, last"):
            second.acquire()
        holder.check()
    assert read(workdir) is None


def test_a_holder_elsewhere_that_is_silent_loses_it_and_stops_if_it_wakes(workdir, monkeypatch, capsys):
    for name, value in {"BEAT": 3600, "SILENCE": 0.5, "LOOK": 0.1}.items():
        monkeypatch.setattr(lock, name, value)
    with monkeypatch.context() as patch:
        patch.setattr(lock, "_introduction", lambda: ELSEWHERE | {"token": "other"})
        holder = lock.Lock(workdir)
    with holder, lock.Lock(workdir) as second:
        holder.acquire()
        second.acquire()
        assert "has given no sign of life" in capsys.readouterr().err
        holder.check()
        holder._renew()  # it wakes
        with pytest.raises(UserError, match=f"process {os.getpid()} on host .* has taken"):
            holder.check()
        holder.__exit__()
        assert read(workdir)["process"] == os.getpid(), "it does not take away what is another's"


def test_an_old_heartbeat_is_not_watched(tmp_path, capsys):
    write(tmp_path, ELSEWHERE | {"heartbeat": "2020-01-01T00:00:00+00:00"})
    began = time.monotonic()
    with lock.Lock(tmp_path) as held:
        held.acquire()
    assert time.monotonic() - began < lock.SILENCE / 2 and "silent for" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", "{", "[]", '{"process": "x", "heartbeat": 3}'])
def test_a_lock_that_cannot_be_understood_is_watched(tmp_path, monkeypatch, content):
    monkeypatch.setattr(lock, "SILENCE", 0.2)
    monkeypatch.setattr(lock, "LOOK", 0.1)
    (tmp_path / lock.NAME).write_text(content)
    with lock.Lock(tmp_path) as held:
        held.acquire()
        assert read(tmp_path)["process"] == os.getpid()


def test_a_workdir_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with lock.Lock(tmp_path / "file" / "run") as held, pytest.raises(UserError, match="run.lock cannot be written"):
        held.acquire()


def test_a_second_run_is_refused_before_it_changes_anything(models, compiled, tmp_path):
    config = tiny.config(models, steps=1, compilation_cache=compiled)
    child = start(tmp_path)
    assert go(child) == ["held"]
    with pytest.raises(UserError, match=f"in use by process {child.pid}"):
        train.train(config, tmp_path)
    assert [path.name for path in pathlib.Path(tmp_path).iterdir()] == [lock.NAME]
    child.communicate("\n", timeout=60)
    train.train(config, tmp_path)
    assert not (tmp_path / lock.NAME).exists()
