"""The trials' plumbing, with a stand-in for the benchmark: what is run, kept and compared."""

import json
import pathlib

import pytest

from srpo_jax import benchmark
from srpo_jax.costs import trials

STAND_IN = """
import json, os, sys
words = dict(word.lstrip("-").split("=", 1) for word in sys.argv[1:])
if words.get("config.remat.transformer") == "none":
    sys.exit("RESOURCE_EXHAUSTED: out | of memory")
speed = 2.0 if words.get("config.remat.transformer") == "dots" else 1.0
names = words.get("parts", "rollout,transformer,update").split(",")
part = {"mfu": 0.5 * speed, "memory": {"temporaries": 2**30}, "compile_seconds": 3.0}
report = {"config": {"data.batch_size": 2}, "parts": {n: part | {"seconds": 4.0 / speed} for n in names}}
report["flags"] = os.environ.get("XLA_FLAGS", "")
json.dump(report, open(words["json"], "w"))
"""


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    script = tmp_path / "stand_in.py"
    script.write_text(STAND_IN)
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    command = trials.command_line

    def instead(trial, out, shared):
        python, _, module, *words = command(trial, out, shared)
        assert module == "srpo_jax.benchmark"
        return [python, str(script), *words]

    monkeypatch.setattr(trials, "command_line", instead)


def test_a_sweep(stand_in, tmp_path, capsys):
    out = tmp_path / "out"
    groups = ("baseline", "remat", "flags")
    trials.run(out, groups)
    results = json.loads((out / "sweep.json").read_text())
    chosen = [trial for trial in trials.TRIALS if trial.group in groups]
    assert list(results) == [trial.name for trial in chosen]
    assert results["remat-none"] == {"failed": "RESOURCE_EXHAUSTED: out | of memory"}
    assert all(results[trial.name]["flags"] == trial.xla for trial in chosen if trial.group == "flags")
    table = (out / "sweep.md").read_text()
    assert "| remat-dots |" in table and "| transformer | 1 | 100.0% | 1 | 3.0 | 2.000 |" in table
    assert "failed: RESOURCE_EXHAUSTED: out / of memory" in table
    assert len({line.count("|") for line in table.splitlines()}) == 1
    # The same command again runs what has failed and nothing else.
    kept = (out / "baseline.json").stat().st_mtime_ns
    capsys.readouterr()
    trials.run(out, groups)
    assert (out / "baseline.json").stat().st_mtime_ns == kept
    assert len(capsys.readouterr().out.splitlines()) == len(chosen)


def test_a_trial_is_given_up(monkeypatch, tmp_path):
    monkeypatch.setattr(trials, "command_line", lambda *_: ["sleep", "60"])
    assert trials.attempt(trials.TRIALS[0], tmp_path, [], minutes=0.0005) == {"failed": "not done in 0.0005 minutes"}


def test_every_trial_is_a_command_line_that_benchmark_takes():
    names = [trial.name for trial in trials.TRIALS]
    assert len(set(names)) == len(names)
    for trial in trials.TRIALS:
        assert trial.against in names and trial.prediction
        words = trials.command_line(trial, pathlib.Path("out"), ["--preset=wide", "--device-batch=1", *trials.COMMON])
        config, _, values = benchmark.parse(words[3:])
        assert str(values.json) == f"out/{trial.name}.json"
        assert all(word.startswith("--xla_gpu") for word in trial.xla.split())
        if trial.name == "batch-4":
            assert config.data.batch_size == 4
        assert config.model.attention == ("xla" if trial.name.endswith("xla") else "cudnn")
