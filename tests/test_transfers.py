"""What a run moves between devices and hosts, with the transfer guard as accelerators apply it."""

import signal
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import jobs, tiny, transfers

from srpo_jax import checkpoint, metrics, train

INSTALL = "from helpers import transfers\ntransfers.install()\n"


@pytest.fixture
def guarded():
    with transfers.install():
        yield


def test_reads_of_an_array_are_refused_as_on_an_accelerator(guarded):
    array = jnp.arange(3.0)
    number = array.sum()
    ways = (
        lambda: np.asarray(array), lambda: np.concatenate([array, array]), lambda: float(number),
        lambda: number.item(), lambda: array.copy_to_host_async(), lambda: array.tolist(),
    )  # fmt: skip
    with jax.transfer_guard("disallow"):
        for way in ways:
            with pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed device-to-host"):
                way()
        assert jax.device_get(array).tolist() == [0, 1, 2]
        with jax.transfer_guard("allow"):
            assert float(number) == 3
        read = []
        thread = threading.Thread(target=lambda: read.append(float(number)))  # a guard is of its thread alone
        thread.start()
        thread.join()
        assert read == [3]
    assert float(number) == 3


def test_a_run_samples_saves_logs_and_goes_on(guarded, tmp_path):
    models = tiny.write_all(tmp_path / "models")
    changes = dict(optim__ema_decay=0.5, sample__every=2, rollout__reuse=2, compilation_cache=str(tmp_path / "cache"))
    for steps in (2, 3):
        train.train(tiny.config(models, steps=steps, **changes), tmp_path / "run")
    assert checkpoint.steps(tmp_path / "run") == [2, 3]
    assert len(list((tmp_path / "run" / "samples").glob("*.png"))) == 3
    assert [record["step"] for record in metrics.read(tmp_path / "run")] == [1, 2, 3]


def test_a_run_that_is_stopped_is_saved(tmp_path):
    models = tiny.write_all(tmp_path / "models")
    child = jobs.stop_after_three(models, tmp_path / "run", dict(steps=4), INSTALL)
    assert child.returncode == 128 + signal.SIGTERM, child.stderr
    assert checkpoint.steps(tmp_path / "run") == [2, 3]


def test_two_processes_save_sample_stop_and_go_on(tmp_path):
    models = tiny.write_all(tmp_path / "models")
    changes = dict(steps=3, data__batch_size=2, sample__every=2, compilation_cache=str(tmp_path / "cache"))
    stop = {"step": 1, "process": 1, "where": "update", "signal": signal.SIGTERM}
    for event, code in ((stop, 128 + signal.SIGTERM), (None, 0)):
        told = jobs.start_two(models, tmp_path / "run", changes, event, INSTALL)
        assert [child[0] for child in told] == [code, code], told
    assert checkpoint.steps(tmp_path / "run") == [1, 2, 3]
