"""Running the launch scripts, for real or dry."""

import os
import pathlib
import shlex
import subprocess

ROOT = pathlib.Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
CONFIG = "--config=configs/emoji.py"
TPU = ("--name=pod", "--zone=us-east5-a")
# What a shell would change on the way.
AWKWARD = ["--config.reward.positive=('it''s',\"b c\")", "--config.data.prompts=$HOME/*", "", "~", "a\\b", "{a,b}"]


def clean_environment(**more: str) -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if not k.startswith("SRPO_")} | more


def launch(script: str, *words: str, cwd=ROOT, code: int = 0, **env: str) -> str:
    """Runs a script and returns its stdout, or its stderr if a failure is expected."""
    command = [str(pathlib.Path(cwd, "launch", script)), *words]
    done = subprocess.run(command, cwd=cwd, env=clean_environment(**env), capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stderr + done.stdout
    return done.stderr if code else done.stdout


def dry(script: str, *words: str, **env: str) -> list[list[str]]:
    """The words of each command that a script would run; comments are left out."""
    # PATH without gcloud, xpk, sbatch: a dry run needs none of them.
    lines = launch(script, *words, "--dry-run", PATH="/usr/bin:/bin", **env).splitlines()
    return [shlex.split(line) for line in lines if not line.startswith("#")]


def write_program(path: pathlib.Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
