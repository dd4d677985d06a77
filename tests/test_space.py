"""Room for checkpoints: what they take, what is left of older ones, and what is refused before the first update."""

import collections
import pathlib
import shutil

import jax
import numpy as np
import pytest
from etils import epath
from helpers import tiny
from helpers.runs import arrays
from helpers.states import abstract, make_state

from srpo_jax import checkpoint, space, stored_weights, train
from srpo_jax.config import default
from srpo_jax.errors import UserError

Disk = collections.namedtuple("Disk", "total used free")


def files(folder):
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def save(workdir, steps, **options):
    checkpoints = checkpoint.Checkpoints(workdir, **options)
    for step in steps:
        checkpoints.save(step, make_state(step), {"data": step})
    checkpoints.close()


# --- older checkpoints ------------------------------------------------------------------------------------------------


def test_older_checkpoints_keep_the_weights_alone(tmp_path):
    save(tmp_path, (1, 2, 3), keep=3)
    folder = tmp_path / "checkpoints"
    assert checkpoint.steps(tmp_path) == [1, 2, 3] and checkpoint.newest(tmp_path) == 3
    assert [(folder / str(step) / "opt_state").exists() for step in (1, 2, 3)] == [False, False, True]
    for ema in (False, True):
        found, wanted = stored_weights.load_params(tmp_path, 1, ema), make_state(1).ema if ema else make_state(1).params
        jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), y), found, wanted)
    checkpoints = checkpoint.Checkpoints(tmp_path, keep=3)
    state, _ = checkpoints.restore(3, abstract(make_state(0)))
    jax.tree.map(np.testing.assert_array_equal, state, make_state(3))
    checkpoints.save(4, make_state(4), {})
    checkpoints.close()
    assert checkpoint.steps(tmp_path) == [2, 3, 4] and not (folder / "3" / "opt_state").exists()


def test_as_many_as_the_config_says_can_be_gone_on_from(tmp_path):
    save(tmp_path, (1, 2, 3), keep=3, resumable=2)
    assert [(tmp_path / "checkpoints" / str(step) / "opt_state").exists() for step in (1, 2, 3)] == [False, True, True]
    shutil.rmtree(tmp_path / "checkpoints" / "3")
    assert checkpoint.newest(tmp_path) == 2


def test_a_run_does_not_begin_anew_beside_weights(tmp_path):
    save(tmp_path, (1, 2), keep=2)
    assert checkpoint.newest(tmp_path / "none") is None
    shutil.rmtree(tmp_path / "checkpoints" / "2")
    with pytest.raises(UserError, match="checkpoints/1 holds weights for `generate`.*choose another --workdir"):
        checkpoint.newest(tmp_path)


def test_an_interrupted_deletion_is_no_checkpoint_to_go_on_from_and_goes_on(tmp_path):
    save(tmp_path, (1, 2), keep=2, resumable=2)
    first = tmp_path / "checkpoints" / "1"
    (first / checkpoint.WEIGHTS_ONLY).touch()
    shutil.rmtree(first / "opt_state" / "d", ignore_errors=True)
    assert not checkpoint.resumable(first) and checkpoint.steps(tmp_path) == [1, 2]
    save(tmp_path, (3,), keep=3)
    assert not (first / "opt_state").exists() and checkpoint.steps(tmp_path) == [1, 2, 3]


def test_what_cannot_be_deleted_costs_room_and_not_the_run(tmp_path, capsys, monkeypatch):
    def refuse(self):
        raise OSError("device busy")

    with monkeypatch.context() as patch:
        patch.setattr(type(epath.Path(tmp_path)), "rmtree", refuse)
        save(tmp_path, (1, 2), keep=2)
    assert checkpoint.steps(tmp_path) == [1, 2] and checkpoint.newest(tmp_path) == 2
    assert "the optimizer state of" in (said := capsys.readouterr().err) and "deleted: device busy" in said
    save(tmp_path, (3,), keep=3)
    assert not (tmp_path / "checkpoints" / "1" / "opt_state").exists()


def test_what_a_copy_left_out_is_still_no_checkpoint(tmp_path):
    save(tmp_path, (1, 2), keep=2)
    shutil.rmtree(tmp_path / "checkpoints" / "2" / "opt_state")
    assert checkpoint.steps(tmp_path) == [1]


def test_a_damaged_one_without_another_to_go_on_from(tmp_path):
    save(tmp_path, (1, 2), keep=2)
    for path in (tmp_path / "checkpoints" / "2" / "params").rglob("*"):
        if path.is_file() and path.name != "_METADATA":
            path.write_bytes(b"")
    checkpoints = checkpoint.Checkpoints(tmp_path, keep=2)
    with pytest.raises(UserError, match="has 0 bytes instead of"):
        checkpoints.restore(2, abstract(make_state(0)))
    # Update 1 has its weights alone: training cannot go on from there.
    with pytest.raises(UserError, match="no checkpoint in .* that training can go on from can be read"):
        checkpoints.restore_newest(abstract(make_state(0)))
    checkpoints.close()
    assert checkpoint.steps(tmp_path) == [1]


def test_a_save_says_how_large_it_is_and_how_long_it_took(tmp_path, capsys):
    save(tmp_path, (1, 2), keep=2)
    said = capsys.readouterr().err
    state = make_state(1)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves((state.params, state.ema, state.opt_state)))
    for step in (1, 2):
        assert f"saved checkpoint {step}: {size} bytes in " in said


# --- room -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("there", "keep", "resumable", "saves", "expected"),
    [
        ([], 4, 1, 1, 30),
        ([], 4, 1, 2, 60),  # the first is whole until the second is there
        ([], 4, 1, 4, 80),  # 10 + 10 + 30, and 30 more being written
        ([], 4, 1, 9, 90),  # the oldest goes after the newest has come
        ([], 2, 1, 9, 70),
        ([], 2, 2, 9, 90),
        ([], 1, 1, 9, 60),
        ([10, 30], 2, 1, 1, 70),
        ([30, 30], 2, 1, 1, 70),
        ([10, 10, 30], 3, 1, 0, 50),
    ],
)
def test_the_most_that_checkpoints_take(there, keep, resumable, saves, expected):
    assert space.most(there, 30, 10, keep, resumable, saves) == expected


def test_the_best_checkpoint_takes_the_room_of_one_more():
    assert space.most([], 30, 10, 1, 1, 9, best=True) == space.most([], 30, 10, 2, 1, 9)


def test_sizes_are_those_on_the_disk(tmp_path):
    """Of arrays that do not compress."""
    generator = np.random.default_rng(0)
    params = {"kernel": jax.numpy.asarray(generator.normal(size=(400, 400)), jax.numpy.float32)}
    state = make_state(1).replace(params=params, ema=params, opt_state={"mean": params, "root": params})
    checkpoints = checkpoint.Checkpoints(tmp_path, keep=2)
    for step in (1, 2):
        checkpoints.save(step, state, {})
    checkpoints.close()
    whole, weights = space.sizes(state)
    assert (whole, weights) == (4 * 640_000, 2 * 640_000)
    for step, size in ((1, weights), (2, whole)):
        assert 0.85 * size < files(tmp_path / "checkpoints" / str(step)) < 1.05 * size


def test_a_disk_without_room_is_named_with_figures(tmp_path, monkeypatch):
    config, state = default(), abstract(make_state(0, ema=False))
    whole, weights = space.sizes(state)
    config.steps, config.checkpoint.every, config.checkpoint.keep = 30, 10, 3
    needed = 2 * whole + weights
    monkeypatch.setattr(shutil, "disk_usage", lambda place: Disk(0, 0, needed - 1))
    with pytest.raises(UserError, match=rf"at most {needed} bytes in all: {tmp_path} has {needed - 1} bytes free; .*"
                                        r"lower config\.checkpoint\.keep=3"):  # fmt: skip
        space.check(tmp_path / "a" / "run", config, state, 0)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: Disk(0, 0, needed))
    said = space.check(tmp_path / "a" / "run", config, state, 0)
    assert said.startswith(f"checkpoints of {whole} bytes, {weights} bytes once a newer one is there, at most {needed}")
    monkeypatch.setattr(checkpoint, "steps", lambda workdir: [])  # would ask the bucket
    monkeypatch.setattr(shutil, "disk_usage", None)  # what a bucket holds is not known
    assert space.check("gs://bucket/run", config, state, 0) == said.rsplit(",", 1)[0]


def test_the_disk_is_the_one_that_checkpoints_lie_on(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    (tmp_path / "big").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "big")
    asked = []
    monkeypatch.setattr(shutil, "disk_usage", lambda place: asked.append(place) or Disk(0, 0, 1 << 40))
    space.check(tmp_path / "run", default(), abstract(make_state(0, ema=False)), 0)
    assert [place.resolve() for place in map(pathlib.Path, asked)] == [tmp_path / "big"]


def test_a_run_needs_room_before_it_begins(models, compiled, tmp_path, monkeypatch):
    config = tiny.config(models, compilation_cache=compiled)
    with monkeypatch.context() as patch, pytest.raises(UserError, match="lower config.checkpoint.keep"):
        patch.setattr(shutil, "disk_usage", lambda place: Disk(0, 0, 1000))
        train.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_goes_on_from_the_newest_of_which_alone_it_keeps_the_moments(models, compiled, tmp_path, capsys):
    changes = dict(compilation_cache=compiled, checkpoint__every=1, checkpoint__resumable=1)
    train.train(tiny.config(models, steps=4, **changes), tmp_path / "whole")
    train.train(tiny.config(models, steps=2, **changes), tmp_path / "run")
    capsys.readouterr()
    train.train(tiny.config(models, steps=4, **changes), tmp_path / "run")
    said = capsys.readouterr().err
    kept = [(tmp_path / "run" / "checkpoints" / str(step) / "opt_state").exists() for step in (2, 3, 4)]
    assert checkpoint.steps(tmp_path / "run") == [2, 3, 4] and kept == [False, False, True]
    mine, other = (arrays(tmp_path / name, 4)[0] for name in ("run", "whole"))
    assert mine.keys() == other.keys() and all(mine[name].tobytes() == other[name].tobytes() for name in mine)
    for words in ("attention xla; 2 samples an update, 2 at a time", "checkpoints of ", "loading the text encoders: ",
                  "reading the newest checkpoint: ", "loading autoencoder, clip: ",
                  "compiling the update: ", "step 3/4  loss ", "saved checkpoint 4: "):  # fmt: skip
        assert words in said, said
    assert "sampling" not in said and all(len(line) <= 120 for line in said.splitlines() if line.startswith("step"))
