"""Which attention backend "auto" stands for, and that every command asks the same question."""

import types

import jax.numpy as jnp
import pytest
from helpers import plans, tiny

from srpo_jax import benchmark, preflight, program
from srpo_jax.costs import plan, topologies
from srpo_jax.models.attention import choose


@pytest.mark.parametrize(
    ("device", "dtype", "expected"),
    [
        ({"platform": "tpu"}, "bfloat16", "splash"),
        ({"platform": "tpu"}, "float32", "splash"),
        ({"platform": "cpu"}, "bfloat16", "xla"),
        ({"platform": "gpu", "compute_capability": "9.0"}, "bfloat16", "cudnn"),
        ({"platform": "cuda", "compute_capability": "8.0"}, "bfloat16", "cudnn"),
        ({"platform": "gpu", "compute_capability": "10.0"}, "bfloat16", "cudnn"),
        ({"platform": "gpu", "compute_capability": "7.5"}, "bfloat16", "xla"),
        ({"platform": "gpu", "compute_capability": "9.0"}, "float32", "xla"),
        ({"platform": "gpu", "compute_capability": "gfx942"}, "bfloat16", "xla"),
        ({"platform": "gpu"}, "bfloat16", "cudnn"),  # described by preflight, which knows no older one
    ],
)
def test_what_auto_stands_for(device, dtype, expected):
    device = types.SimpleNamespace(**device)
    assert choose("auto", device, dtype) == choose("auto", device, jnp.dtype(dtype)) == expected
    assert [choose(name, device, dtype) for name in ("xla", "cudnn", "splash")] == ["xla", "cudnn", "splash"]


def test_a_plan_asks_the_targets_devices(tmp_path, monkeypatch):
    """Here a CPU stands in for an H100: the mesh decides, not the machine's default device or the target's name."""
    mesh = types.SimpleNamespace(devices=types.SimpleNamespace(flat=[types.SimpleNamespace(platform="tpu")]))
    config = tiny.config(tmp_path)
    assert config.model.attention == "auto" and program.attention_of(config, mesh) == "splash"
    candidate = plans.candidate(tmp_path)
    assert candidate.built.computes.transformer.attention == "xla"
    assert {c.attention for c in (candidate.built.computes.text, candidate.built.computes.reward)} == {"xla"}
    devices = list(candidate.built.mesh.devices.flat)
    monkeypatch.setattr(topologies, "devices", lambda target: devices)
    made = plan.prepare(config, plans.ARCHITECTURE, topologies.parse("h100:1"))
    assert made.config.model.attention == "xla" and config.model.attention == "auto"


def test_preflight_of_a_tpu_plans_with_its_kernel(monkeypatch):
    """Whatever this machine's own platform is."""
    topologies.prepare()
    try:
        topologies.devices(topologies.parse("v5e:2x2"))
    except Exception as error:
        pytest.skip(f"no compiler for TPUs here: {error}")
    words = ["--config=configs/flux_dev_hps.py", "--topology=v5e:2x2", "--config.mesh.fsdp=4", "--depth=1,1"]
    (candidate,), _ = preflight.parse(words)
    assert candidate.config.model.attention == candidate.built.computes.transformer.attention == "splash"


def test_benchmark_counts_what_runs():
    config, _, _ = benchmark.parse([])
    assert config.model.attention == "xla"
