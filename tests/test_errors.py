"""What a command leaves behind when it cannot go on."""

import os
import subprocess
import sys

import pytest

from srpo_jax import errors
from srpo_jax.errors import UserError


def test_exit_codes(capsys):
    def fail():
        raise UserError("name the remedy")

    def fill():
        raise errors.StorageError("the disk is full")

    assert errors.run(lambda: None) == 0
    assert (errors.run(fail), errors.run(fill)) == (1, 74)
    assert capsys.readouterr().err == "error: name the remedy\nerror: the disk is full\n"


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("lines", [1, 100_000])  # less than Python's buffer, and more than a pipe's
def test_a_reader_that_went_away_is_no_fault(lines, unbuffered):
    """``command | head``: no traceback, neither from a print nor from Python's own flush at the end."""
    code = (
        "import sys; from srpo_jax import errors; sys.stdin.read(1); "
        f"sys.exit(errors.run(lambda: print('line\\n' * {lines})))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
    )
    process.stdout.close()
    process.stdin.write("go")
    process.stdin.close()
    assert (process.stderr.read(), process.wait()) == ("", 141)


def test_another_broken_pipe_is_not_hidden(capsys):
    def fail():
        raise BrokenPipeError("a connection's")

    with pytest.raises(BrokenPipeError, match="a connection's"):
        errors.run(fail)
