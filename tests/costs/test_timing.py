"""Measuring on tiny networks: what is called, counted and refused. No time is judged."""

import json
import types

import jax
import jax.numpy as jnp
import pytest
from helpers import plans, tiny

from srpo_jax import program, sharding
from srpo_jax.costs import timing, work
from srpo_jax.errors import UserError


@pytest.fixture
def config(tmp_path):
    return tiny.config(tmp_path, optim__accumulation=2, rollout__reuse=2)


def test_everything_is_measured(config):
    lines = []
    report = timing.benchmark(config, plans.ARCHITECTURE, 1, (*work.PARTS, "update"), lines.append)
    report = json.loads(json.dumps(report))
    assert list(report["parts"]) == [*work.PARTS, "update"]
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
    config.data.images, config.data.encode, config.rollout.reuse = "stored", "stored", 1
    report = timing.benchmark(config, plans.ARCHITECTURE, 1, (*work.PARTS, "update"), lambda line: None)
    assert list(report["parts"]) == [name for name in (*work.PARTS, "update") if name != "rollout"]
    total = sum(part["model_flops"] for name, part in report["parts"].items() if name != "update")
    assert report["parts"]["update"]["model_flops"] == pytest.approx(total)
    built = program.build(config, sharding.make_mesh(config.mesh), plans.ARCHITECTURE)
    assert built.batch.latents.shape == (2, 6, 64) and built.batch.latents.dtype == jnp.float32


def test_a_program_that_does_not_fit(monkeypatch):
    """The plan is compared with what the device offers before anything is made."""
    device = types.SimpleNamespace(memory_stats=lambda: {"bytes_limit": 2**20})
    monkeypatch.setattr(timing.jax, "local_devices", lambda: [device])
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wide = jax.ShapeDtypeStruct((512, 1024), jnp.float32, sharding=where)
    with pytest.raises(UserError, match=r"needs 0\.0 GiB, .* try a smaller --device-batch"):
        timing.clock(jax.jit(lambda x: x + 1), (wide,), 1)


def test_a_profile_of_each_part(config, tmp_path):
    timing.benchmark(config, plans.ARCHITECTURE, 1, ("captions",), lambda line: None, tmp_path / "trace")
    assert [path.name for path in (tmp_path / "trace").iterdir()] == ["captions"]
    assert list((tmp_path / "trace").rglob("*.xplane.pb"))
