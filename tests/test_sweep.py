"""The sweep's command line."""

import json

import pytest

from srpo_jax import errors, sweep
from srpo_jax.costs import trials


def test_the_command(monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit, match="0"):
        sweep.main(["--help"])
    shown = capsys.readouterr().out
    assert sweep.__doc__.strip() in shown and "--device-batch" in shown
    part = {"mfu": None, "memory": {}, "compile_seconds": 3.0, "seconds": 4.0}
    found = {"config": {"data.batch_size": 2}, "parts": {"update": part}}
    asked = []
    monkeypatch.setattr(trials, "attempt", lambda trial, *words: asked.append((trial.group, *words)) or found)
    words = ["--preset=wide", "--device-batch=2", "--only=baseline,size", "--runs=4", "--minutes=7"]
    sweep.main([f"--out={tmp_path}/new", *words])
    shared = ["--preset=wide", "--device-batch=2", "--runs=4", *trials.COMMON]
    assert asked == [(group, tmp_path / "new", shared, 7.0) for group in ("baseline", "size", "size", "size")]
    assert list(json.loads((tmp_path / "new" / "sweep.json").read_text()))[0] == "baseline"


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "--out is missing"),
        (["--out=x", "--only=lunch"], "'lunch' is unknown"),
        (["--out=x", "--preset=huge"], "huge"),
        (["--out=x", "y"], "y"),
    ],
)
def test_what_is_refused(words, message):
    with pytest.raises(errors.UserError, match=message):
        sweep.main(words)
