"""Processes that a test starts."""

import inspect
import json
import os
import pathlib
import socket
import subprocess
import sys

TESTS = pathlib.Path(__file__).parents[1]


def environment(*folders: pathlib.Path, devices: int = 1, **more: str) -> dict[str, str]:
    """A child's environment: the package, the helpers and what lies in ``folders`` can be imported.

    Args:
      devices: virtual CPU devices.
      more: further variables.
    """
    changed = {"PYTHONPATH": ":".join(map(str, (*folders, TESTS, TESTS.parent)))}
    if devices > 1:
        changed["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    return os.environ | changed | more


def call(function, *words, devices: int = 8):
    """Runs a function of a test module in a process of its own; returns what it prints last, which must be JSON.

    Args:
      words: its arguments, which it receives as text.
    """
    file, name = pathlib.Path(inspect.getfile(function)), function.__name__
    code = f"import sys, {file.stem}; {file.stem}.{name}(*sys.argv[1:])"
    child = subprocess.run(
        [sys.executable, "-c", code, *map(str, words)],
        env=environment(file.parent, devices=devices),
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout.splitlines()[-1])


def together(commands, timeout):
    """[(exit code, stdout, stderr)] of commands that run at the same time; fails if one does not end in so many
    seconds."""
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    started = [subprocess.Popen([*map(str, words)], env=environment(), **pipes) for words in commands]
    try:
        told = [child.communicate(timeout=timeout) for child in started]
    finally:
        for child in started:
            child.kill()
    return [(child.returncode, *texts) for child, texts in zip(started, told, strict=True)]


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
