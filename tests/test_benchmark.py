"""The benchmark's plumbing on tiny networks: what it calls, counts, writes and refuses. No time is judged."""

import json
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tiny

from srpo_jax import architectures, benchmark, errors, program, sharding
from srpo_jax.costs import flops, hardware, parts
from srpo_jax.errors import UserError
from srpo_jax.models import clip

TOWERS = clip.ClipConfig(
    clip.ClipTextConfig(50, 32, 32, 1, 4, 16, "gelu", 49), clip.ClipVisionConfig(32, 32, 1, 4, 32, 16, "gelu"), 16
)
ARCHITECTURE = program.Architecture(tiny.FLUX, tiny.VAE, {"clip": TOWERS})


@pytest.fixture
def config(tmp_path):
    return tiny.config(tmp_path, optim__accumulation=2, rollout__reuse=2)


def test_everything_is_measured(config):
    lines = []
    report = benchmark.benchmark(config, ARCHITECTURE, 1, (*flops.PARTS, "update"), lines.append)
    report = json.loads(json.dumps(report))
    assert list(report["parts"]) == [*flops.PARTS, "update"]
    calls = {name: part["calls"] for name, part in report["parts"].items()}
    assert calls == {
        "captions": 2, "rollout": 0.5, "transformer": 4, "autoencoder": 4, "reward": 4, "optimizer": 1, "update": 1,
    }  # fmt: skip
    for part in report["parts"].values():
        assert part["seconds"] == pytest.approx(part["calls"] * part["call_seconds"])
        assert part["mfu"] == pytest.approx(part["model_flops"] / part["seconds"] / report["peak_flops"])
        assert len(part["runs"]) == 1 and part["memory"]["arguments"] > 0
    total = sum(part["model_flops"] for name, part in report["parts"].items() if name != "update")
    assert report["parts"]["update"]["model_flops"] == pytest.approx(total)
    assert report["samples_per_second"] == pytest.approx(2 / report["parts"]["update"]["seconds"])
    assert report["planned_bytes"] > 0 and report["peak_source"].endswith("measured")
    assert sum(line.startswith(tuple(calls)) for line in lines) == len(calls)


def test_pictures_in_the_place_of_rollouts_have_no_rollout_to_measure(config):
    config.data.rollout, config.data.encode, config.rollout.reuse = "offline", "stored", 1
    report = benchmark.benchmark(config, ARCHITECTURE, 1, (*flops.PARTS, "update"), lambda line: None)
    assert list(report["parts"]) == [name for name in (*flops.PARTS, "update") if name != "rollout"]
    total = sum(part["model_flops"] for name, part in report["parts"].items() if name != "update")
    assert report["parts"]["update"]["model_flops"] == pytest.approx(total)
    built = program.build(config, sharding.make_mesh(config.mesh), ARCHITECTURE)
    assert built.batch.latents.shape == (2, 6, 64) and built.batch.latents.dtype == jnp.float32


def test_parts_ask_for_what_the_update_has(config):
    """Arguments of the parts are one pass of the batch, of rollouts the whole batch, in the program's dtypes and
    places."""
    config.data.batch_size = 8
    built = program.build(config, sharding.make_mesh(config.mesh), ARCHITECTURE)
    found = {part.name: part for part in parts.take_apart(config, built)}
    assert tuple(found) == flops.PARTS
    weights, base, batch, noise = found["rollout"].arguments
    assert jax.tree.structure(weights) == jax.tree.structure(built.state.params) and base is None
    assert batch.text.shape == built.batch.text.shape and noise.shape == (8, 6, 64)
    assert jax.eval_shape(found["rollout"].function, weights, base, batch, noise).shape == noise.shape
    grads = jax.eval_shape(found["transformer"].function, *found["transformer"].arguments)
    assert jax.tree.map(jnp.shape, grads) == jax.tree.map(jnp.shape, weights)
    config.optim.merge_terms = True
    built = program.build(config, sharding.make_mesh(config.mesh), ARCHITECTURE)
    merged = {part.name: part for part in parts.take_apart(config, built)}
    assert merged["rollout"].arguments[3].shape == noise.shape
    for name in ("transformer", "autoencoder", "reward"):
        jax.eval_shape(merged[name].function, *merged[name].arguments)
        assert merged[name].calls == found[name].calls / 2
        assert jax.tree.leaves(merged[name].arguments[-1])[0].shape[0] == 8


def test_fill_makes_weights_and_inputs():
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def leaf(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    weights = {"a": {"kernel": leaf(3, 40, 50, dtype=jnp.bfloat16), "scale": leaf(7)}}
    made, inputs, ids = parts.fill((weights, leaf(30, 40), leaf(2, dtype=jnp.int32)))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), made) == jax.tree.map(lambda x: (x.shape, x.dtype), weights)
    kernel = np.asarray(made["a"]["kernel"], np.float32)
    assert abs(kernel.mean()) < 1e-3 and kernel.std() == pytest.approx(parts.INIT / math.sqrt(3), rel=0.05)
    assert np.all(np.asarray(made["a"]["scale"]) == 1) and not np.any(ids)
    assert np.std(inputs) == pytest.approx(1 / math.sqrt(3), rel=0.05)


def test_peaks():
    assert hardware.find("NVIDIA H100 80GB HBM3").flops == 989e12
    assert hardware.find("TPU v5 lite").name == "TPU v5e" and hardware.find("TPU v5p").name == "TPU v5p"
    assert hardware.find("TPU v5").name == "TPU v5p" and hardware.find("Tesla K80") is None
    assert hardware.measured_flops(64, runs=1) > 0


def test_presets_and_flags(tmp_path):
    config, architecture, values = benchmark.parse([])
    assert (config.data.batch_size, values.runs, values.preset) == (8, 5, "small")
    config, architecture, _ = benchmark.parse(
        ["--config.optim.accumulation=2", "--preset=wide", "--device-batch=3", "--depth=1,2"]
    )
    assert config.data.batch_size == 6 and config.data.height == 720
    assert architecture.transformer.num_single_layers == 2
    assert architecture.transformer.width == architectures.FLUX_DEV.width
    recipe = ["--config=configs/flux_dev_pickscore.py"]
    config, architecture, _ = benchmark.parse(recipe)
    assert config.rollout.guidance == 2 and architecture.transformer == architectures.FLUX_DEV
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
        (["--config.reward.weights.hps=1"], "--preset=small has the sizes of clip only"),
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
    """GPUs and CPUs have some; what the environment's flags name is left to them, and what XLA lacks is left out."""

    def options(platform):
        devices = np.array([types.SimpleNamespace(platform=platform)])
        return program.compiler_options(types.SimpleNamespace(devices=devices))

    monkeypatch.delenv("XLA_FLAGS", raising=False)
    assert options("gpu") == {"xla_gpu_enable_triton_gemm": False}
    assert options("cpu") == program.CPU_OPTIONS
    assert options("tpu") == {}
    monkeypatch.setitem(program.CPU_OPTIONS, "xla_cpu_no_such_option", True)
    assert "xla_cpu_no_such_option" not in options("cpu")
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_enable_triton_gemm=true")
    assert options("gpu") == {}


def test_a_program_that_does_not_fit(monkeypatch):
    """The plan is compared with what the device offers before anything is made."""
    device = types.SimpleNamespace(memory_stats=lambda: {"bytes_limit": 2**20})
    monkeypatch.setattr(benchmark.jax, "local_devices", lambda: [device])
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wide = jax.ShapeDtypeStruct((512, 1024), jnp.float32, sharding=where)
    with pytest.raises(UserError, match=r"needs 0\.0 GiB, .* try a smaller --device-batch"):
        benchmark.measure(jax.jit(lambda x: x + 1), (wide,), 1)


def test_a_profile_of_each_part(config, tmp_path):
    benchmark.benchmark(config, ARCHITECTURE, 1, ("captions",), lambda line: None, tmp_path / "trace")
    assert [path.name for path in (tmp_path / "trace").iterdir()] == ["captions"]
    assert list((tmp_path / "trace").rglob("*.xplane.pb"))
