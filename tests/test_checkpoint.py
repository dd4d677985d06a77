"""Checkpoints of a small state, the workdir, and what export reads."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.states import abstract, make_state

from srpo_jax import checkpoint, record, stored_weights
from srpo_jax.config import default
from srpo_jax.errors import UserError


@pytest.fixture
def workdir(tmp_path):
    """Three checkpoints were saved, two kept."""
    checkpoints = checkpoint.Checkpoints(tmp_path, keep=2, resumable=2)
    for step in (1, 2, 3):
        checkpoints.save(step, make_state(step), {"data": {"next_index": step}})
    checkpoints.save(3, make_state(9), {})  # a step that is there stays as it is
    checkpoints.close()
    return tmp_path


def test_the_newest_are_kept_and_come_back_exactly(workdir):
    assert checkpoint.steps(workdir) == [2, 3]
    checkpoints = checkpoint.Checkpoints(workdir, keep=2)
    assert checkpoints.latest() == 3
    for step in (2, 3):
        state, run = checkpoints.restore(step, abstract(make_state(0)))
        assert run == {"step": step, "data": {"next_index": step}}
        jax.tree.map(np.testing.assert_array_equal, state, make_state(step))
        assert jax.tree.structure(state) == jax.tree.structure(make_state(step))
    checkpoints.close()


@pytest.mark.parametrize(
    ("like", "message"),
    [
        (make_state(0, dtype=jnp.bfloat16), r"bias is float32\[3\] there, bfloat16\[3\] here"),
        (make_state(0).replace(params={"bias": jnp.ones(4)}), r"bias is float32\[3\] there, float32\[4\] here"),
        (make_state(0).replace(opt_state=()), "opt_state is not of this model"),
    ],
)
def test_nothing_is_cast_or_cut_silently(workdir, like, message):
    checkpoints = checkpoint.Checkpoints(workdir, keep=2)
    with pytest.raises(UserError, match=message):
        checkpoints.restore(3, abstract(like))
    checkpoints.close()


def test_half_written_checkpoints_do_not_count(workdir):
    folder = workdir / "checkpoints"
    (folder / "4.orbax-checkpoint-tmp").mkdir()
    (folder / "7" / "params").mkdir(parents=True)
    (folder / "7.incomplete").mkdir()  # an earlier one
    (folder / "1").mkdir()  # was being deleted
    assert checkpoint.steps(workdir) == [2, 3]
    checkpoints = checkpoint.Checkpoints(workdir, keep=2)
    assert checkpoints.latest() == 3
    checkpoints.save(7, make_state(7), {})  # the place is free
    checkpoints.close()
    assert checkpoint.steps(workdir) == [3, 7]
    assert sorted(path.name for path in folder.iterdir()) == ["3", "7", "7.incomplete", "7.incomplete.2"]


# --- export -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("step", "ema"), [(None, False), (2, False), (3, True)])
def test_parameters_are_read_one_by_one(workdir, step, ema):
    params = stored_weights.load_params(workdir, step, ema)
    state = make_state(step or 3)
    expected = state.ema if ema else state.params
    assert jax.tree.structure(params) == jax.tree.structure(expected)
    for found, wanted in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
        assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
        np.testing.assert_array_equal(np.asarray(found), wanted)


def test_parameters_that_are_not_there(workdir, tmp_path_factory):
    with pytest.raises(UserError, match="no checkpoint of step 1; there are 2, 3"):
        stored_weights.load_params(workdir, 1)
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(UserError, match="no complete checkpoint"):
        stored_weights.load_params(empty)
    with pytest.raises(UserError, match="not a folder"):
        stored_weights.load_params(empty / "none")
    checkpoints = checkpoint.Checkpoints(empty, keep=1)
    checkpoints.save(1, make_state(1, ema=False), {})
    checkpoints.close()
    with pytest.raises(UserError, match="no moving average"):
        stored_weights.load_params(empty, ema=True)


# --- the workdir ------------------------------------------------------------------------------------------------------


def test_a_workdir_belongs_to_one_config(tmp_path):
    config = default()
    record.check(tmp_path / "new", config, {})
    assert not (tmp_path / "new").exists()
    record.write(tmp_path / "new", config, {})
    record.check(tmp_path / "new", config, {})
    assert json.loads((tmp_path / "new" / "config.json").read_text())["steps"] == 19
    config.seed, config.steps = 1, 99
    with pytest.raises(UserError, match=r"another config: seed is 0 there, 1 here\. Choose another --workdir"):
        record.check(tmp_path / "new", config, {})


def test_strange_workdirs(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is no folder; choose another place"):
        record.check(tmp_path / "file", default(), {})
    (tmp_path / "bare" / "checkpoints" / "3" / "params").mkdir(parents=True)
    with pytest.raises(UserError, match="config.json is gone, and no checkpoint beside it holds the configuration"):
        record.check(tmp_path / "bare", default(), {})
    (tmp_path / "bare" / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read as JSON"):
        record.check(tmp_path / "bare", default(), {})
