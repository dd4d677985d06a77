"""Disks that are full, folders that are gone or cannot be written, storage that hangs: what a training does then."""

import contextlib
import os
import resource
import threading
import time

import pytest
from helpers.runs import scalars
from helpers.states import make_state

from srpo_jax import checkpoint, distributed, errands, errors, metrics, pulse, storage, terminal, train
from srpo_jax.errors import StorageError


@contextlib.contextmanager
def no_room():
    """While no file of this process can grow, as on a full disk; for the kernel, a limit of it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def after(monkeypatch, events):
    """Calls ``events[step]`` when the metrics of a step were reported, and before its checkpoint."""
    write = metrics.Metrics.write

    def write_and_act(self, step, values):
        write(self, step, values)
        self.flush()
        for thread in threading.enumerate():
            if thread.name == "save_finalize":  # Orbax's: the checkpoint of the update before is there or has failed
                thread.join()
        events.get(step, lambda: None)()

    monkeypatch.setattr(metrics.Metrics, "write", write_and_act)


# --- training ---------------------------------------------------------------------------------------------------------


def test_training_goes_on_where_it_is_to(recipe, tmp_path, monkeypatch, capsys):
    """The disk is full from the end of update 2 to that of 3, the whole workdir gone from 4 to 5; and the folder of
    samples is none."""
    workdir, away, full = tmp_path / "run", tmp_path / "away", contextlib.ExitStack()
    workdir.mkdir()
    (workdir / "samples").write_text("")
    after(monkeypatch, {
        2: lambda: full.enter_context(no_room()), 3: full.close,
        4: lambda: workdir.rename(away), 5: lambda: away.rename(workdir),
    })  # fmt: skip
    changes = dict(steps=6, checkpoint__every=1, checkpoint__keep=9, sample__every=3, sample__count=1)
    with full:
        train.train(recipe(**changes, checkpoint__on_failure="continue"), workdir)
    assert checkpoint.steps(workdir) == [1, 3, 5, 6]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
    assert [record["step"] for record in metrics.read(workdir)] == [1, 2, 3, 4, 5, 6]
    assert {step for _, step in scalars(workdir / "tensorboard")} == {1, 2, 3, 4, 5, 6}
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len([line for line in warnings if line.startswith(f"warning: {workdir}/samples cannot be written")]) == 1
    full, gone = "large; the newest that is there is of update 1", "directory; none is there"
    for step, words in ((2, full), (4, gone)):
        (line,) = [line for line in warnings if f"checkpoint {step} cannot be written into" in line]
        assert f"{words}; training goes on, and tries again" in line
    assert len([line for line in warnings if "metrics.jsonl is written again" in line]) == 2


def test_training_stops_and_goes_on_when_there_is_room(recipe, tmp_path, monkeypatch, capsys):
    workdir, full = tmp_path / "run", contextlib.ExitStack()
    config = recipe(steps=3, checkpoint__every=100, checkpoint__minutes=1e-9, checkpoint__keep=3)  # after each update
    after(monkeypatch, {2: lambda: full.enter_context(no_room())})
    with full:
        code = errors.run(lambda: train.train(config, workdir))
    assert code == 74
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"error: checkpoint 2 cannot be written into {workdir}/checkpoints: File too large; ")
    assert last.endswith("large; the newest that is there is of update 1")
    assert [path.name for path in (workdir / "checkpoints").iterdir() if path.name != "1"] == []
    monkeypatch.undo()
    train.train(config, workdir)
    assert {path.name for path in (workdir / "checkpoints").iterdir()} == {"1", "2", "3"}
    assert checkpoint.steps(workdir) == [1, 2, 3] and [record["step"] for record in metrics.read(workdir)] == [1, 2, 3]


# --- checkpoints ------------------------------------------------------------------------------------------------------


def test_a_checkpoint_without_room_is_not_begun_and_the_last_one_has_to_be_written(tmp_path, monkeypatch, capsys):
    checkpoints = checkpoint.Checkpoints(tmp_path, keep=2, resumable=2, patient=True)
    checkpoints.save(1, make_state(1), {})
    usage = checkpoint.shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage)
    checkpoints.save(2, make_state(2), {})
    assert "and 100 bytes are free on the disk" in capsys.readouterr().err
    with pytest.raises(StorageError, match=r"checkpoint 3 cannot be written .*: it takes .* there is of update 1"):
        checkpoints.save(3, make_state(3), {}, last=True)
    checkpoints.close()
    assert checkpoint.steps(tmp_path) == [1]


# --- reports ----------------------------------------------------------------------------------------------------------


def test_an_errand_that_hangs_is_waited_for_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(errands, "PATIENCE", 0.5)
    done, release, errand = [], threading.Event(), errands.Errands(storage.path(tmp_path))
    errand.do("slow file", release.wait)
    started = time.monotonic()
    for number in range(3 * errands.MOST):  # more than have room
        errand.do("other file", lambda number=number: done.append(number))
        errand.wait()
    assert 0.5 <= time.monotonic() - started < 5 and not done
    release.set()
    while len(done) < errands.MOST - 1:
        time.sleep(0.01)
    errand.wait()
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "warning: writing slow file has taken 0 s; training goes on without waiting for it"
    assert said[1] == "warning: other file cannot be written (storage does not answer); training goes on"
    assert said[2:] == ["warning: other file is written again"] and done == sorted(done)


def test_half_a_line_is_not_left_by_a_full_disk(tmp_path):
    tail = metrics.Tail(storage.path(tmp_path / "file"), b"head\n")
    with open(tmp_path / "file", "ab") as file:
        file.write(b"on")  # for which there was room
    tail.add(b"one\n")
    with no_room(), pytest.raises(OSError, match="File too large"):
        tail.write()
    tail.add(b"two\n")
    tail.write()
    assert (tmp_path / "file").read_bytes() == b"head\none\ntwo\n"
    os.remove(tmp_path / "file")
    tail.add(b"three\n")
    tail.write()
    assert (tmp_path / "file").read_bytes() == b"three\n"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_a_log_on_a_full_disk(monkeypatch):
    """It stops no training, and keeps no process from ending that has lost another one."""
    codes = []
    monkeypatch.setattr("os._exit", codes.append)
    monkeypatch.setattr("jax.distributed.is_initialized", lambda: True)
    with contextlib.suppress(OSError), open("/dev/full", "w", buffering=1) as full:
        monkeypatch.setattr("sys.stderr", full)
        terminal.say("a line")
        terminal.warn("another one")
        pulse.end("a reason")
        with distributed.job():
            raise StorageError("full")
        assert codes == [pulse.LOST, 74]
        with pytest.raises(OSError, match="No space left"):
            print("a line", file=full)


def test_a_file_that_cannot_be_written_is_one_line_and_leaves_nothing(tmp_path):
    with no_room(), pytest.raises(StorageError, match=r"file cannot be written: File too large") as error:
        storage.write(storage.path(tmp_path / "file"), b"content")
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())
