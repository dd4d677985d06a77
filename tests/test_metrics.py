"""JSON lines, TensorBoard, terminal."""

import json
import types

import pytest
from helpers.runs import scalars

from srpo_jax import errands, metrics, storage


def reporting(workdir, done, total):
    return metrics.Metrics(workdir, done, total, errands.Errands(storage.path(workdir)))


def test_lines_on_disk_and_terminal(tmp_path, capsys):
    report = reporting(tmp_path, 0, 3)
    report.write(1, {"loss": 0.5, "denoise/reward": 1.25})
    report.write(2, {"loss": 0.25, "denoise/reward": 1.5})
    report.close()
    assert metrics.read(tmp_path) == [
        {"step": 1, "loss": 0.5, "denoise/reward": 1.25},
        {"step": 2, "loss": 0.25, "denoise/reward": 1.5},
    ]
    lines = capsys.readouterr().err.splitlines()
    assert [line.rsplit("  ", 1)[0] for line in lines] == [
        "step 1/3  loss 0.5 denoise 1.25", "step 2/3  loss 0.25 denoise 1.5",
    ]  # fmt: skip
    assert all(line.endswith(" left") for line in lines)


VALUES = {
    "loss": 1.23456789, "grad_norm": 0.0123456, "denoise/loss": 0.6, "denoise/reward": -0.0012345,
    "denoise/caption_reward": 0.28, "inversion/loss": 0.6, "inversion/reward": 0.0112345,
    "inversion/caption_reward": 0.28, "step_seconds": 15.3456, "images_per_second": 2.1, "data_seconds": 0.01,
}  # fmt: skip


@pytest.mark.parametrize(
    ("step", "left", "words"),
    [(3, 245.0, "  4 min left"), (3, 45.2, "  45 s left"), (3, 9000, "  2.5 h left"), (19, 0, "")],
)
def test_a_steps_line(step, left, words):
    shown = metrics.line(step, 19, VALUES, left)
    assert shown == (
        f"step {step}/19  loss 1.235 denoise -0.00123 inversion 0.0112 gradient 0.0123  15.3 s/step{words}"
    )
    assert len(shown) <= metrics.COLUMNS == 100


def test_a_steps_line_leaves_out_the_terms_for_which_there_is_no_room():
    many = VALUES | {f"renoising_{n}/reward": -1.234e-5 for n in range(5)}
    shown = metrics.line(10000, 20000, many, 1e6)
    assert len(shown) <= 100 and "denoise" in shown and "gradient 0.0123" in shown and shown.endswith("277.8 h left")


def test_the_time_left_is_by_all_that_a_step_takes(tmp_path, capsys, monkeypatch):
    """Samples and checkpoints among it, and not what came before the first step."""
    clock, report = iter([1000.0, 1110.0, 1220.0]), reporting(tmp_path, 4, 10)
    monkeypatch.setattr(metrics, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    for step in (5, 6, 7):
        report.write(step, {"loss": 0.5, "step_seconds": 10.0})
    said = [line.rsplit("  ", 1)[1] for line in capsys.readouterr().err.splitlines()]
    assert said == ["50 s left", "4 min left", "4 min left"]  # 5 x 10, 4 x 120 / 2, 3 x 230 / 3


def test_a_resumed_run_drops_what_came_after_its_checkpoint(tmp_path):
    lines = [json.dumps({"step": step, "loss": 1.0}) + "\n" for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines) + '{"step": 4, "lo')
    report = reporting(tmp_path, 2, 9)
    report.write(3, {"loss": 2.0})
    report.close()
    assert [(r["step"], r["loss"]) for r in metrics.read(tmp_path)] == [(1, 1.0), (2, 1.0), (3, 2.0)]


def test_tensorboard(tmp_path):
    report = reporting(tmp_path, 0, 3)
    report.write(1, {"loss": 0.5})
    report.write(2, {"loss": 0.25})
    report.close()
    assert scalars(tmp_path / "tensorboard") == {("loss", 1): 0.5, ("loss", 2): 0.25}


def test_a_bar_on_a_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    report = reporting(tmp_path, 1, 3)
    report.write(2, {"loss": 0.5})
    report.write(3, {"loss": 0.25})
    report.close()
    shown = capsys.readouterr().err
    assert "3/3" in shown and "loss 0.25" in shown


def test_only_finite_numbers_are_written(tmp_path):
    report = reporting(tmp_path, 0, 3)
    with pytest.raises(ValueError, match="not JSON compliant"):
        report.write(1, {"loss": float("nan")})
    report.close()


LINES = [json.dumps({"step": step, "loss": 0.5}) for step in (1, 2, 3)]


@pytest.mark.parametrize(
    "damage", [b"", b"\0\0\0", b"null", b"\xff\xfe", b'{"step": "2"}', b'{"loss": 1}', b'{"st', b"[1]"]
)
def test_what_is_broken_takes_no_other_line_with_it(tmp_path, damage, capsys):
    content = b"\n".join([LINES[0].encode(), damage, *(line.encode() for line in LINES[1:]), b'{"step": 4, "lo'])
    (tmp_path / "metrics.jsonl").write_bytes(content)
    reporting(tmp_path, 2, 5).close()
    assert [record["step"] for record in metrics.read(tmp_path)] == [1, 2]
    copies = [path.read_bytes() for path in tmp_path.glob("metrics.jsonl.unreadable*")]
    assert copies == ([content] if damage else [])
    assert ("1 lines cannot be read, as line 2; they are left out" in capsys.readouterr().err) == bool(damage)
