"""The benchmark's command line: what it reads, writes and refuses."""

import json
import types

import jax
import pytest

from srpo_jax import benchmark, errors, program
from srpo_jax.families.flux import DEV


def test_presets_and_flags(tmp_path):
    config, architecture, values = benchmark.parse([])
    assert (config.data.batch_size, values.runs, values.preset) == (8, 5, "small")
    config, architecture, _ = benchmark.parse(
        ["--config.optim.accumulation=2", "--preset=wide", "--device-batch=3", "--depth=1,2"]
    )
    assert config.data.batch_size == 6 and config.data.height == 720
    assert architecture.transformer.num_single_layers == 2
    assert architecture.transformer.width == DEV.transformer.width
    recipe = ["--config=configs/flux_dev_pickscore.py"]
    config, architecture, _ = benchmark.parse(recipe)
    assert config.rollout.guidance == 2 and architecture.transformer == DEV.transformer
    assert set(architecture.rewards) == {"pickscore"} and config.data.batch_size == 1


@pytest.mark.parametrize(
    "words, message",
    [
        (["--preset=huge"], "huge"),
        (["--depth=3"], "--depth=3: give two numbers"),
        (["--depth=0,2"], "--depth=0,2: give two numbers"),
        (["--parts=rollout,lunch"], "'lunch' is unknown"),
        (["--config.rollout.stepz=3"], "do you mean config.rollout.steps"),
        (["--config.rollout.steps=0"], "config.rollout.steps=0"),
        (["--config.reward.models.hps.weight=1"], "--preset=small has the sizes of clip only"),
        (["now"], "'now' is not understood"),
    ],
)
def test_what_is_refused(words, message):
    with pytest.raises(errors.UserError, match=message.replace("(", r"\(")):
        benchmark.parse(words)


def test_the_command(capsys, tmp_path):
    with pytest.raises(SystemExit, match="0"):
        benchmark.main(["--help"])
    shown = capsys.readouterr().out
    assert benchmark.__doc__.strip() in shown and "--device-batch" in shown
    out = tmp_path / "new" / "speed.json"
    words = ["--depth=1,1", "--runs=1", "--parts=reward,captions", "--device-batch=1", f"--json={out}"]
    benchmark.main(words)
    report = json.loads(out.read_text())
    assert list(report["parts"]) == ["captions", "reward"] and report["config"]["data.batch_size"] == 1


def test_options_of_compilers(monkeypatch):
    """Every kind of device has some; what the environment's flags name is left to them, and what the device's XLA lacks
    is left out: here, a CPU's XLA is asked for all."""
    ask = program._is_known

    def options(platform):
        device = types.SimpleNamespace(platform=platform)
        return program.compiler_options(types.SimpleNamespace(local_devices=[device]))

    monkeypatch.setattr(program, "_is_known", lambda device, name, value: ask(jax.devices()[0], name, value))
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    monkeypatch.delenv("LIBTPU_INIT_ARGS", raising=False)
    assert options("gpu") == {"xla_gpu_enable_triton_gemm": False}
    assert options("cpu") == program.CPU_OPTIONS
    assert options("tpu") == {}
    monkeypatch.setitem(program.CPU_OPTIONS, "xla_cpu_no_such_option", True)
    assert "xla_cpu_no_such_option" not in options("cpu")
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_enable_triton_gemm=true")
    assert options("gpu") == {}
    monkeypatch.setattr(program, "_is_known", lambda *_: True)
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_enable_async_all_gather=false")
    assert options("tpu").keys() == program.TPU_OPTIONS.keys() - {"xla_enable_async_all_gather"}
