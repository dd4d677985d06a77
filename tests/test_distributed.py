"""Two processes on one machine, with collectives over loopback."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys

import pytest
import tiny
from test_train import numbers

from srpo_jax import checkpoint, distributed, train
from srpo_jax.errors import UserError

CHILD = """
import json, os, pathlib, signal, sys
import tiny
from srpo_jax import errors, main, metrics

path, workdir, changes, coordinator, process = sys.argv[1:]
write = metrics.Metrics.write


def write_and_kill(self, step, values):
    write(self, step, values)
    if step == 2 and process == "1":
        os.kill(os.getpid(), signal.SIGTERM)  # one of the two is asked to stop


metrics.Metrics.write = write_and_kill
config = tiny.config(pathlib.Path(path), **json.loads(changes))
main.parse = lambda argv: main.Command(config, workdir, coordinator, int(process), 2)
sys.exit(errors.run(main.main))
"""


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_two_processes_train_stop_together_and_one_goes_on(tmp_path):
    """The first process stops because the second was told to. One process then ends the run, with the numbers that one
    process has from the start: neither the data nor the checkpoint know how many there were."""
    models = tiny.write_all(tmp_path / "models")
    changes = dict(steps=3, data__batch_size=2, rollout__noise="per_sample", checkpoint__every=5, sample__every=2)
    coordinator, tests = f"127.0.0.1:{free_port()}", pathlib.Path(__file__).parent
    words = [sys.executable, "-c", CHILD, models, tmp_path / "two", json.dumps(changes), coordinator]
    environment = os.environ | {"PYTHONPATH": f"{tests}:{tests.parent}"}
    children = [
        subprocess.Popen([*map(str, words), str(i)], env=environment, stderr=subprocess.PIPE, text=True) for i in (0, 1)
    ]
    output = [child.communicate()[1] for child in children]
    assert [child.returncode for child in children] == [128 + signal.SIGTERM] * 2, output
    assert "2 cpu device(s)" in output[0] and "stopped after update 2" in output[0] and "step" not in output[1]
    assert checkpoint.steps(tmp_path / "two") == [2]

    train.train(tiny.config(models, **changes), tmp_path / "two")
    train.train(tiny.config(models, **changes), tmp_path / "one")
    for mine, other in zip(numbers(tmp_path / "two"), numbers(tmp_path / "one"), strict=True):
        assert mine == pytest.approx(other, rel=1e-3, abs=1e-5)
    assert {path.name for path in (tmp_path / "two" / "samples").iterdir()} == {
        path.name for path in (tmp_path / "one" / "samples").iterdir()
    }


@pytest.mark.parametrize(
    ("job", "message"),
    [
        (("host:1", None, 2), "--process_id is missing"),
        ((None, 0, None), "--coordinator, --process_count is missing"),
        (("host:1", 2, 2), "--process_id=2 must be"),
    ],
)
def test_half_a_job_is_refused(job, message):
    with pytest.raises(UserError, match=message):
        distributed.start(*job)


def test_a_process_alone_stays_alone(monkeypatch):
    for name in distributed.SLURM:
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr("jax.distributed.initialize", lambda: pytest.fail("there is nobody to meet"))
    distributed.start()
    assert distributed.largest(7) == 7


def test_tasks_of_slurm_meet(monkeypatch):
    for name in distributed.SLURM:
        monkeypatch.setenv(name, "2")
    calls = []
    monkeypatch.setattr("jax.distributed.initialize", lambda *args: calls.append(args))
    distributed.start()
    assert calls == [()]
    monkeypatch.delenv("SLURM_STEP_NODELIST")  # a shell in an allocation, not srun
    distributed.start()
    assert calls == [()]
    distributed.start("host:1", 0, 2)
    assert calls == [(), ("host:1", 2, 0)]
