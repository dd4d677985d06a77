"""Storage that is slower than a deadline: what is said, and how long a save may take."""

import asyncio
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint._src.serialization import serialization

from srpo_jax import checkpoint, distributed
from srpo_jax.algorithm.step import TrainState
from srpo_jax.errors import UserError


def test_a_save_has_time_by_its_size():
    small = {"kernel": jax.ShapeDtypeStruct((10,), jnp.float32)}
    large = {"kernel": jax.ShapeDtypeStruct((143 * 10**9 // 4,), jnp.float32)}
    assert checkpoint.deadline_of(small) == pytest.approx(1200, abs=1)
    assert 2 * 3600 < checkpoint.deadline_of(large) < 3 * 3600


def test_a_slow_save_is_not_called_a_lost_process(tmp_path, monkeypatch):
    write = serialization.async_serialize_from_host

    async def write_slowly(*args, **options):
        await asyncio.sleep(4)
        await write(*args, **options)

    monkeypatch.setattr(serialization, "async_serialize_from_host", write_slowly)
    params, before = {"kernel": jnp.ones(3)}, set(threading.enumerate())
    checkpoints = checkpoint.Checkpoints(tmp_path, keep=1, deadline=1)
    checkpoints.save(1, TrainState(jax.device_put(np.int32(1)), params, params), {})
    with pytest.raises(UserError, match=r"was not written into .*checkpoints within 0 minutes.*the storage is") as slow:
        checkpoints.close()
    assert "\n" not in str(slow.value) and not distributed.is_loss(slow.value)
    assert checkpoint.steps(tmp_path) == []
    for thread in set(threading.enumerate()) - before:  # the writer, which goes on
        thread.join(timeout=6)


def test_a_barrier_that_ran_out_of_time_is_slow_storage_too(tmp_path, monkeypatch):
    checkpoints = checkpoint.Checkpoints(tmp_path, keep=1)
    manager = checkpoints._manager
    for error in (
        jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: Barrier timed out. Id: async_write_complete"),
        TimeoutError("Timed out while waiting for async_commit_complete barrier."),
    ):
        checkpoints._manager = manager
        monkeypatch.setattr(manager, "wait_until_finished", lambda error=error: (_ for _ in ()).throw(error))
        with pytest.raises(UserError, match="the storage is too slow"):
            checkpoints.latest()
    lost = jax.errors.JaxRuntimeError("UNAVAILABLE: Task 1 heartbeat timeout.")
    checkpoints._manager = manager
    monkeypatch.setattr(manager, "wait_until_finished", lambda: (_ for _ in ()).throw(lost))
    with pytest.raises(jax.errors.JaxRuntimeError):
        checkpoints.latest()
