"""Host memory of a save: what Orbax pins for GPUs, and what a report says of it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from srpo_jax import checkpoint, host
from srpo_jax.algorithm.step import TrainState
from srpo_jax.costs import host_memory
from srpo_jax.costs.host_memory import HostMemory

GIB = 2**30


def state(width=256):
    params = {"kernel": jnp.ones((width, width)), "bias": jnp.ones(width)}
    opt_state = optax.adam(1e-3).init(params)
    return TrainState(jax.device_put(np.int32(0)), params, opt_state, jax.tree.map(jnp.copy, params))


@pytest.fixture
def pinning(monkeypatch):
    """Orbax as on GPUs, with a pool of ``pool["limit"]`` bytes for what it pins, as XLA's client has one."""
    pool, put = {"limit": 0, "taken": 0}, jax.device_put

    def put_pinned(array, place=None, **options):
        if getattr(place, "memory_kind", None) == "pinned_host":
            pool["taken"] += array.nbytes
            if pool["taken"] > pool["limit"]:
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory in region 1")
        return put(array, place, **options)

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "device_put", put_pinned)
    return pool


def test_a_save_pins_what_is_counted(pinning, tmp_path):
    saved = state()
    counted = host_memory.of_save([saved.params, saved.opt_state, saved.ema], 1, "gpu")
    pinning["limit"] = counted.pinned
    checkpoints = checkpoint.Checkpoints(tmp_path / "enough", keep=1)
    checkpoints.save(1, saved, {})
    checkpoints.close()
    assert pinning["taken"] == counted.pinned == counted.state
    assert checkpoint.steps(tmp_path / "enough") == [1]

    pinning.update(limit=counted.pinned - 1, taken=0)
    checkpoints = checkpoint.Checkpoints(tmp_path / "less", keep=1)
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        checkpoints.save(1, saved, {})


def test_a_process_saves_its_share():
    device = jax.devices()[0]
    kinds = [jax.sharding.SingleDeviceSharding(device, memory_kind=kind) for kind in ("device", "pinned_host")]
    tree = [jax.ShapeDtypeStruct((1000,), jnp.float32, sharding=kind) for kind in kinds]
    assert host_memory.of_save(tree, 2, "gpu") == HostMemory(4000, 2000, 4000, 3200, 6000)
    assert host_memory.of_save(tree, 2, "tpu") == HostMemory(4000, 2000, 4000, 3200, 0)
    assert host_memory.of_save(tree[:1], 1, "cpu") == HostMemory(4000, 0, 0, 3200, 0)


def test_a_report_says_what_is_missing():
    memory = HostMemory(143 * GIB, 0, 143 * GIB, 114 * GIB, 143 * GIB)
    assert host_memory.describe(memory) == [
        "a save takes 257.0 GiB of each process's host (the copy 143.0, the writer 114.0), 143.0 of it pinned"
    ]
    assert len(host_memory.describe(memory, 1024 * GIB)) == 1
    _, missing, pinned = host_memory.describe(memory, 100 * GIB)
    assert missing.startswith("157.0 GiB of host memory are missing")
    assert "143 GiB of it are pinned for GPUs, and 80 may be" in pinned and f"{host.PINNED_LIMIT}=179" in pinned
    assert len(host_memory.describe(memory, 1024 * GIB, limit=64)) == 2
