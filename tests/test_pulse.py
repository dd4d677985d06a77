"""Two processes of a job of which one hangs: the other ends by itself, says why, and in time."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
from helpers.children import free_port

from srpo_jax import pulse

SILENCE = 5  # seconds; a minute in earnest

# Agrees on a number ten times a second, until told otherwise. What happens to which process: "stop", "sleep", "leave".
CHILD = f"""
import os, signal, sys, time
import jax
from srpo_jax import distributed

distributed.HEARTBEAT, distributed.PATIENCE = {SILENCE}, 2 * {SILENCE}
coordinator, process, event, struck = sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
with distributed.job(coordinator, process, 2):
    for step in range(20):
        distributed.largest(step)
        time.sleep(0.1)
    print("agreed", flush=True)
    if process == struck:
        if event == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif event == "sleep":
            time.sleep(1000)
    elif event == "leave":
        time.sleep(2 * {SILENCE})
    if event != "leave":
        distributed.largest(step)
"""


def run_two(event, struck):
    """(exit code, stderr, seconds after the agreement) of the process that was not struck."""
    words = [sys.executable, "-c", CHILD, f"127.0.0.1:{free_port()}"]
    environment = os.environ | {"PYTHONPATH": str(pathlib.Path(pulse.__file__).parents[1]), "JAX_PLATFORMS": "cpu"}
    children = [
        subprocess.Popen(
            [*words, str(process), event, str(struck)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for process in (0, 1)
    ]  # fmt: skip
    try:
        other = children[1 - struck]
        assert "agreed\n" in iter(other.stdout.readline, "")
        started = time.monotonic()
        _, told = other.communicate(timeout=100)
        return other.returncode, told, time.monotonic() - started
    finally:
        for child in children:
            child.send_signal(signal.SIGCONT)
            child.kill()
            child.communicate()


@pytest.mark.parametrize(
    ("event", "struck", "reason"),
    [
        ("stop", 1, f"no sign of life from process 1 for {SILENCE} s"),
        ("stop", 0, "process 0, which coordinates, has not answered for "),
        ("sleep", 1, f"agreeing with the other processes has taken {2 * SILENCE} s, though all processes give signs"),
    ],
)
def test_a_process_that_hangs_ends_the_other(event, struck, reason):
    code, told, seconds = run_two(event, struck)
    assert code == pulse.LOST, told
    line = told.splitlines()[-1]
    assert line.startswith(f"error: another process of this job is lost ({reason}") and line.endswith("was saved")
    assert seconds < 6 * SILENCE  # JAX alone took twice its own time


def test_a_process_whose_others_do_not_come_says_what_to_do():
    code = f"""
from srpo_jax import distributed
distributed.ARRIVAL, distributed.SAY_SO = 3, 1
with distributed.job("127.0.0.1:{free_port()}", 0, 2):
    pass
"""
    root = pathlib.Path(pulse.__file__).parents[1]
    child = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=100)
    assert child.returncode == pulse.LOST, child.stderr
    waiting, error = child.stderr.splitlines()
    assert waiting.startswith("waiting for the other processes of this job: start the command on all machines")
    assert (
        error.startswith("error: not all processes of this job have come within 3 s") and "JAX_PLATFORMS=cpu" in error
    )


def test_a_process_that_has_nothing_more_to_do_is_not_lost():
    code, told, _ = run_two("leave", 1)
    assert code == 0, told
