"""What a person sees: bars on a terminal, lines in a log."""

import re
import time
import types

import pytest

from srpo_jax import terminal


def redraws(monkeypatch):
    """Standard error is a terminal's from here on."""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)


@pytest.mark.parametrize(
    ("size", "words"), [(143e9, "143 GB"), (2.84e9, "2.84 GB"), (900e3, "900 kB"), (1.5e6, "1.5 MB"), (7, "7 bytes")]
)
def test_bytes_in_words(size, words):
    assert terminal.in_bytes(size) == words


def test_a_log_says_what_is_done_once_it_takes_long(capsys, monkeypatch):
    monkeypatch.setattr(terminal, "PATIENCE", 0.1)
    with terminal.doing("waiting"):
        time.sleep(0.4)
        assert capsys.readouterr().err == "waiting ...\n"  # before it is over
    assert re.fullmatch(r"waiting: [0-9]\.\d s\n", capsys.readouterr().err)
    with terminal.doing("no time"):
        pass
    assert capsys.readouterr().err == "no time: 0.0 s\n"


def test_seconds_run_on_a_terminal(capsys, monkeypatch):
    redraws(monkeypatch)
    monkeypatch.setattr(terminal, "TICK", 0.2)
    with terminal.doing("waiting"):
        time.sleep(1.3)
    said = capsys.readouterr().err
    assert "\rwaiting 00:00" in said and "\rwaiting 00:01" in said and re.search(r"waiting: \d\.\d s\n$", said)


def test_a_failure_is_not_called_done(capsys):
    with pytest.raises(ValueError), terminal.doing("failing"):
        raise ValueError
    assert capsys.readouterr().err == ""


def test_a_log_gets_a_line_now_and_then(capsys, monkeypatch):
    clock = iter([0.0, 1.0, 11.0, 12.0, 21.0])
    monkeypatch.setattr(terminal, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    with terminal.bar(40, "image", "drawing", done=10) as bar:
        for _ in range(4):
            bar.update(5)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("[")[0].strip() for line in lines] == ["drawing:  50% 20/40", "drawing:  75% 30/40"]
    assert all("\r" not in line and "s/image" in line for line in lines)


def test_a_terminal_gets_a_bar_that_goes(capsys, monkeypatch):
    redraws(monkeypatch)
    with terminal.bar(2, "image", "drawing") as bar:
        bar.update(2)
        bar.refresh()
    assert "drawing: 100%" in (said := capsys.readouterr().err) and not said.endswith("\n")


def test_processes_that_are_silent(capsys):
    with terminal.bar(2, "image", "drawing", shown=False) as bar:
        bar.update(2)
    assert capsys.readouterr().err == ""
