"""Two processes on one machine, with collectives over loopback: killed, resumed, stopped, and compared with one."""

import json
import re
import signal
import socket
import threading
import types

import jax
import numpy as np
import pytest
from helpers import jobs, tiny
from helpers.runs import arrays, assert_same, numbers
from PIL import Image

from srpo_jax import checkpoint, distributed, metrics, pulse, train
from srpo_jax.errors import UserError
from srpo_jax.evaluation import history


def test_two_processes_lose_one_twice_resume_stop_and_one_goes_on(models, tmp_path):
    """Four updates by two processes, with nothing in their way, and with one process killed in an update and the other
    one in the middle of a save: the same numbers and weights, bit for bit. The disturbed run is then asked to stop, and
    one process alone does the fifth update, with the numbers that one process has from the start: neither the data nor
    the checkpoint know how many there were."""
    changes = dict(
        method="direct_align", steps=5, data__batch_size=2, rollout__noise="per_sample", checkpoint__every=1,
        compilation_cache=str(tmp_path / "cache"),
    )  # fmt: skip
    calm, lost, alone = (tmp_path / name for name in ("calm", "lost", "alone"))
    evaluating = dict(evaluate__every=4, evaluate__prompts=str(models / "held_out.txt"), evaluate__steps=2)

    # === Nothing happens ==============================================================================================
    (first, second) = jobs.start_two(models, calm, changes | evaluating | dict(steps=4, sample__every=4))
    assert first[0] == second[0] == 0, (first, second)
    assert "2 cpu device(s)" in first[2] and "step 4/4" in first[2]
    assert "step" not in second[2] and len(list((calm / "tensorboard").iterdir())) == 1  # only the first reports
    batches = [dict(map(json.loads, re.findall(r"^\[\d.*", child[1], re.M))) for child in (first, second)]
    assert all(len(rows) == 1 for part in batches for rows in part.values()), batches  # each its own half
    for step in (1, 2, 3, 4):
        assert batches[0][step] != batches[1][step]
    for process in (0, 1):  # all of them write
        assert any((calm / "checkpoints" / "4" / "params" / f"ocdbt.process_{process}" / "d").iterdir())

    # === The second process is killed while the first goes on to the next update ======================================
    event = {"step": 2, "process": 1, "where": "update", "signal": signal.SIGKILL}
    (first, second) = jobs.start_two(models, lost, changes, event)
    assert (first[0], second[0]) == (pulse.LOST, -signal.SIGKILL), (first, second)
    assert first[2].splitlines()[-1].startswith("error: another process of this job is lost (")

    # === Both again; the first is killed when a checkpoint is written but not committed ===============================
    event = {"step": 3, "process": 0, "where": "save", "signal": signal.SIGKILL}
    (first, second) = jobs.start_two(models, lost, changes, event)
    assert first[0] == -signal.SIGKILL and "from update 1 to 5" in first[2], first
    assert second[0] in (pulse.LOST, -signal.SIGABRT), second  # by itself, or by JAX: the first coordinates
    assert list((lost / "checkpoints").glob("3.*tmp*")) and checkpoint.steps(lost)[-1] == 2

    # === Both again; one is told to stop, and both do =================================================================
    event = {"step": 4, "process": 1, "where": "update", "signal": signal.SIGTERM}
    (first, second) = jobs.start_two(models, lost, changes, event)
    assert first[0] == second[0] == 128 + signal.SIGTERM, (first, second)
    assert "from update 2 to 5" in first[2] and "stopped after update 4" in first[2]
    assert numbers(lost) == numbers(calm) and [record["step"] for record in metrics.read(lost)] == [1, 2, 3, 4]
    assert_same(arrays(lost, 4), arrays(calm, 4), configs=False)

    # === One process ends the run =====================================================================================
    changes |= dict(checkpoint__every=5, sample__every=4)
    train.train(tiny.config(models, **changes), lost)
    train.train(tiny.config(models, **changes, **evaluating), alone)
    for mine, other in zip(numbers(lost), numbers(alone), strict=True):
        assert mine == pytest.approx(other, rel=1e-3, abs=1e-5)
    for name in ("000000.png", "000004.png"):
        pictures = [np.asarray(Image.open(run / "samples" / name), int) for run in (calm, alone)]
        assert np.abs(pictures[0] - pictures[1]).mean() < 0.5
    for mine, other in zip(history.read(calm), history.read(alone), strict=False):
        assert mine.step == other.step and mine.how == other.how and mine.signals.keys() == other.signals.keys()
        assert mine.scores["clip"].mean == pytest.approx(other.scores["clip"].mean, abs=2e-3)
        assert mine.signals["drift"] == pytest.approx(other.signals["drift"], rel=1e-2, abs=1e-6)
    assert [entry.step for entry in history.read(calm)] == [0, 4]


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (UserError("no such file"), 1, "error: no such file\n"),
        (jax.errors.JaxRuntimeError("UNKNOWN: Gloo AllGather failed: Connection closed"), pulse.LOST, "is lost"),
        (ValueError("UNKNOWN: Gloo AllGather failed: [pair.cc:538] Read error"), pulse.LOST, "is lost"),
        (ValueError("too many values"), 1, "ValueError: too many values\n"),
        (jax.errors.JaxRuntimeError("UNAVAILABLE: Task 1 heartbeat timeout."), pulse.LOST, "is lost"),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"), 1, "RESOURCE_EXHAUSTED: Out of memory\n"),
    ],
)
def test_a_process_that_fails_does_not_wait_for_the_others(monkeypatch, capsys, error, code, told):
    codes = []
    monkeypatch.setattr("jax.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("os._exit", codes.append)
    with distributed.job():
        raise error
    assert codes == [code] and told in capsys.readouterr().err


def test_a_process_without_others_ends_as_usual():
    with pytest.raises(UserError, match="no such file"), distributed.job():
        raise UserError("no such file")


@pytest.mark.parametrize(
    ("job", "message"),
    [
        (("host:1", None, 2), "--process-id is missing"),
        ((None, 0, None), "--coordinator, --process-count is missing"),
        (("host:1", 2, 2), "--process-id=2 must be"),
    ],
)
def test_half_a_job_is_refused(job, message):
    with pytest.raises(UserError, match=message):
        distributed.start(*job)


def test_a_process_alone_stays_alone(monkeypatch):
    for name in distributed.SLURM:
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr("jax.distributed.initialize", lambda **_: pytest.fail("there is nobody to meet"))
    distributed.start()
    assert distributed.largest(7) == 7


def test_tasks_of_slurm_meet(monkeypatch):
    for name in distributed.SLURM:
        monkeypatch.setenv(name, "2")
    calls = []
    monkeypatch.setattr("jax.distributed.initialize", lambda *args, **_: calls.append(args))
    distributed.start()
    assert calls == [()]
    monkeypatch.delenv("SLURM_STEP_NODELIST")  # a shell in an allocation, not srun
    distributed.start()
    assert calls == [()]
    distributed.start("host:1", 0, 2)
    assert calls == [(), ("host:1", 2, 0)]


def test_processes_meet_before_they_exchange_anything_for_the_first_time(monkeypatch):
    """Gloo waits 30 s for those that it connects: a restart on a busy machine failed for it."""
    told = []
    client = types.SimpleNamespace(wait_at_barrier=lambda name, timeout_in_ms: told.append(name))
    monkeypatch.setattr(distributed.internals.global_state, "client", client)
    monkeypatch.setattr(distributed, "_met", set())
    monkeypatch.setattr("jax.process_count", lambda: 2)
    gather = lambda value: told.append("gather") or np.array([value, 9])  # noqa: E731
    monkeypatch.setattr(distributed.multihost_utils, "process_allgather", gather)
    assert distributed.largest(4) == distributed.largest(5) == 9
    assert told == ["srpo_jax/meet/agreeing", "gather", "gather"]


def test_a_port_that_is_still_taken_is_waited_for_and_then_refused(monkeypatch):
    """Another coordinator could listen on it beside the one that is left of a killed job."""
    monkeypatch.setattr(distributed, "HEARTBEAT", 1)
    monkeypatch.setattr("jax.distributed.initialize", lambda *place, **_: None)
    with socket.create_server(("127.0.0.1", 0), reuse_port=True) as left:
        place = f"127.0.0.1:{left.getsockname()[1]}"
        with pytest.raises(UserError, match=rf"--coordinator={place}: another process of this machine listens"):
            distributed.start(place, 0, 2)
        threading.Timer(0.3, left.close).start()
        distributed.start(place, 0, 2)
        assert left.fileno() == -1
