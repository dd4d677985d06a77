"""JSON lines, TensorBoard, terminal."""

import json

import pytest
from helpers.runs import scalars

from srpo_jax import metrics


def test_lines_on_disk_and_terminal(tmp_path, capsys):
    report = metrics.Metrics(tmp_path, 0, 3)
    report.write(1, {"loss": 0.5, "denoise/reward": 1.25})
    report.say("hello")
    report.write(2, {"loss": 0.25, "denoise/reward": 1.5})
    report.close()
    assert metrics.read(tmp_path) == [
        {"step": 1, "loss": 0.5, "denoise/reward": 1.25},
        {"step": 2, "loss": 0.25, "denoise/reward": 1.5},
    ]
    assert capsys.readouterr().err.splitlines() == [
        "step 1/3 loss 0.5 denoise/reward 1.25", "hello", "step 2/3 loss 0.25 denoise/reward 1.5",
    ]  # fmt: skip


def test_a_resumed_run_drops_what_came_after_its_checkpoint(tmp_path):
    lines = [json.dumps({"step": step, "loss": 1.0}) + "\n" for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines) + '{"step": 4, "lo')
    report = metrics.Metrics(tmp_path, 2, 9)
    report.write(3, {"loss": 2.0})
    report.close()
    assert [(r["step"], r["loss"]) for r in metrics.read(tmp_path)] == [(1, 1.0), (2, 1.0), (3, 2.0)]


def test_tensorboard(tmp_path):
    report = metrics.Metrics(tmp_path, 0, 3)
    report.write(1, {"loss": 0.5})
    report.write(2, {"loss": 0.25})
    report.close()
    assert scalars(tmp_path / "tensorboard") == {("loss", 1): 0.5, ("loss", 2): 0.25}


def test_a_bar_on_a_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    report = metrics.Metrics(tmp_path, 1, 3)
    report.write(2, {"loss": 0.5})
    report.write(3, {"loss": 0.25})
    report.close()
    shown = capsys.readouterr().err
    assert "3/3" in shown and "loss 0.25" in shown


def test_only_finite_numbers_are_written(tmp_path):
    assert metrics.not_finite({"a": 1.0, "b": float("nan"), "c": float("-inf")}) == ["b", "c"]
    report = metrics.Metrics(tmp_path, 0, 3)
    with pytest.raises(ValueError, match="not JSON compliant"):
        report.write(1, {"loss": float("nan")})
    report.close()
