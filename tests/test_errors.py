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


@pytest.mark.parametrize(
    ("fail", "words"),
    [
        (
            lambda path: _fill("/dev/full"),
            "No space left on device; free some space, or choose a folder on another disk",
        ),
        (lambda path: open(path), "No such file or directory; check the name"),
        (lambda path: os.mkdir(path.parent), "File exists; a file is in the way of a folder: remove it, or choose"),
        (
            lambda path: open(path.parent, "wb"),
            "Is a directory; a folder is in the way of a file: remove it, or choose",
        ),
        (lambda path: os.mkdir(f"{__file__}/x"), "Not a directory; a file is in the way of a folder: remove it, or"),
        (lambda path: open(path.parent / ("a" * 300)), "File name too long; choose a shorter name"),
        (
            lambda path: os.chmod("/proc/self/status", 0),
            "Operation not permitted; change its rights, or choose another",
        ),
        (
            lambda path: _library("[/ckpt/d/0: OS error 28: No space left on device]"),
            "/ckpt/d/0: No space left on device; ",
        ),
        (lambda path: _library("UNKNOWN: read-only?: Read-only file system"), "Read-only file system; choose a folder"),
    ],
)
def test_what_the_operating_system_says_is_one_line(fail, words, tmp_path, capsys):
    assert errors.run(lambda: fail(tmp_path / "x")) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and words in line


def _fill(path):
    with open(path, "w") as file:
        file.write("x")


def _library(words):
    """As Orbax does: an error of its own, which came of another one."""
    try:
        raise ValueError(words)
    except ValueError as error:
        raise RuntimeError("the save failed") from error


def test_a_fault_of_ours_keeps_its_traceback(capsys):
    with pytest.raises(KeyError):
        errors.run(lambda: {}["x"])
    with pytest.raises(ConnectionResetError):  # not of a file
        errors.run(lambda: _raise(ConnectionResetError(104, "Connection reset by peer")))


def _raise(error):
    raise error


def test_a_message_is_one_line_with_everything_visible():
    shown = str(UserError("a\x1b[31m name\r\n with \ud83d, \u2028 and \0."))
    assert shown == r"a\x1b[31m name with \ud83d, \u2028 and \x00."
