"""A checkpoint is opened as soon as it is written."""

import pathlib

import jax.numpy as jnp
import pytest

from srpo_jax import checkpoint, opening, storage
from srpo_jax.algorithm.step import TrainState
from srpo_jax.errors import UserError

ARRAYS = {"a": {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(2)}}
STATE = TrainState(jnp.int32(0), params=ARRAYS, opt_state=(ARRAYS, {"count": jnp.int32(1)}), ema=None, rollout=None)


def save(workdir, *steps):
    found = checkpoint.Checkpoints(workdir, keep=1)
    try:
        for step in steps:
            found.save(step, STATE, {"config": {}})
    finally:
        found.close()


def test_one_that_cannot_be_opened_ends_the_run(tmp_path):
    """In a folder in which Orbax does not find what it has written; commands refuse it before."""
    with pytest.raises(UserError, match="was written that cannot be opened again .*1/params: .*nothing was deleted"):
        save(tmp_path / "lr[1e-5]", 1, 2)
    assert checkpoint.steps(tmp_path / "lr[1e-5]") == [1]


@pytest.mark.parametrize("left", ["params/manifest.ocdbt", "opt_state/_METADATA", "params/d"])
def test_what_is_missing_is_noticed(tmp_path, left):
    save(tmp_path, 1)
    folder = tmp_path / "checkpoints" / "1"
    parts = {"params": STATE.params, "opt_state": STATE.opt_state}
    assert opening.trouble(storage.path(folder), parts) == ""
    (folder / left).rename(tmp_path / "away")
    words = opening.trouble(storage.path(folder), parts)
    assert words.startswith(str(folder / pathlib.Path(left).parent)) and "\n" not in words
