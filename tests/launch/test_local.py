"""One machine: installing, restarts and signals, with a stand-in for Python."""

import shutil
import signal
import subprocess
import time

import pytest
from helpers.launching import CONFIG, LAUNCH, ROOT, clean_environment, dry, launch, write_program


@pytest.fixture
def checkout(tmp_path):
    """A checkout whose Python notes its runs in "runs" and does what the test writes into "play.sh"."""
    shutil.copytree(LAUNCH, tmp_path / "launch")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/emoji.py").touch()
    write_program(tmp_path / ".venv/bin/python", '#!/bin/sh\necho "$@" >>runs\n. ./play.sh\n')
    return tmp_path


def test_local_install():
    venv, pip = dry("local.sh", "install", "--device=cuda", "--python=python3.12")
    assert venv == ["python3.12", "-m", "venv", f"{ROOT}/.venv"]
    assert pip == [f"{ROOT}/.venv/bin/python", "-m", "pip", "install", "--editable", f"{ROOT}[cuda]"]
    assert dry("local.sh", "install")[1][-1] == str(ROOT)


def test_local_run_needs_an_installation(checkout):
    (checkout / ".venv/bin/python").unlink()
    error = launch("local.sh", "run", CONFIG, "--workdir=w", cwd=checkout, code=1)
    assert error.endswith("/.venv/bin/python; use launch/local.sh install\n")


@pytest.mark.parametrize("code, restarts, runs", [(0, 2, 1), (3, 0, 1), (3, 2, 3)])
def test_local_restarts_after_failures(checkout, code, restarts, runs):
    (checkout / "play.sh").write_text(f"exit {code}\n")
    launch("local.sh", "run", CONFIG, "--workdir=w", f"--restarts={restarts}", cwd=checkout, code=code)
    assert (checkout / "runs").read_text() == f"-u -m srpo_jax.main {CONFIG} --workdir=w\n" * runs


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_local_passes_signals_on_and_then_does_not_restart(checkout, number):
    # Saving takes a moment, and the exit code is the training's.
    (checkout / "play.sh").write_text("trap 'sleep 0.2; echo saved >>runs; exit 143' TERM\necho up >>runs\n"
                                      "while :; do sleep 0.02; done\n")  # fmt: skip
    words = [checkout / "launch/local.sh", "run", CONFIG, "--workdir=w", "--restarts=5"]
    # Where the tests run in the background SIGINT is ignored, and a shell cannot trap what it inherits as ignored.
    process = subprocess.Popen(
        words,
        cwd=checkout,
        env=clean_environment(),
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while not (checkout / "runs").exists() or "up" not in (checkout / "runs").read_text():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    assert process.wait(timeout=30) == 143
    assert (checkout / "runs").read_text().splitlines()[1:] == ["up", "saved"]
