"""Files of a workdir and of models that are deleted, emptied, cut, or hold a bit that has turned over."""

import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from helpers import bucket, tiny
from helpers.runs import arrays, assert_same, numbers
from helpers.states import abstract, make_state

from srpo_jax import checkpoint, config, integrity, leftovers, record, storage, stored_weights, train
from srpo_jax.errors import UserError
from srpo_jax.weights import folder
from srpo_jax.weights.files import new_folder


def flip(file, place=None):
    """One bit of a file, in its middle unless told."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2 if place is None else place] ^= 1
    file.write_bytes(bytes(content))


def data_files(path):
    """The files of an item's arrays, the largest first; Orbax leaves some that nobody reads any more."""
    files = [file for file in path.rglob("*") if file.is_file() and file.parent.name == "d"]
    return sorted(files, key=lambda file: -file.stat().st_size)


def data_file(path):
    """The largest of them."""
    return data_files(path)[0]


def each(action):
    """Does something to all of a checkpoint's files of weights."""
    return lambda path: [action(file) for file in data_files(path / "params")]


# What happens to checkpoint 3, and a word of what is said of it if it has checksums.
DAMAGES = {
    "flipped bit": (lambda path: flip(data_file(path / "params")), "is damaged"),
    "flipped bit of the optimiser": (lambda path: flip(data_file(path / "opt_state")), "is damaged"),
    "deleted data": (each(lambda file: file.unlink()), "is missing"),
    "emptied data": (each(lambda file: file.write_bytes(b"")), "has 0 bytes"),
    "cut data": (each(lambda file: cut(file)), "bytes instead of"),
    "broken metadata": (lambda path: (path / "params" / "_METADATA").write_text("{"), "_METADATA has 1 bytes"),
    "emptied metadata": (lambda path: (path / "params" / "_METADATA").write_text(""), "_METADATA has 0 bytes"),
    "other metadata": (lambda path: (path / "params" / "_METADATA").write_text("[]"), "_METADATA has 2 bytes"),
    "deleted metadata": (lambda path: (path / "params" / "_METADATA").unlink(), "is not complete"),
    "broken position": (lambda path: (path / "run" / "metadata").write_text("{"), "metadata has 1 bytes"),
    "deleted manifest": (lambda path: (path / "params" / "manifest.ocdbt").unlink(), "is missing"),
}


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A workdir with checkpoints 2 and 3 and a configuration."""
    workdir = tmp_path_factory.mktemp("saved")
    record.write(workdir, config.default(), {"model.path": "m"})
    checkpoints = checkpoint.Checkpoints(workdir, keep=2, resumable=2)
    for step in (2, 3):
        checkpoints.save(step, make_state(step), {"config": config.flatten(config.default())})
    checkpoints.close()
    return workdir


@pytest.fixture
def workdir(saved, tmp_path):
    return pathlib.Path(shutil.copytree(saved, tmp_path / "run"))


def restore(workdir):
    """(step, state) of the newest checkpoint that can be read."""
    checkpoints = checkpoint.Checkpoints(workdir, keep=2, resumable=2)
    try:
        return checkpoints.restore_newest(abstract(make_state(0)))[:2]
    finally:
        checkpoints.close()


def files(path):
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


# --- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sealed", [True, False])
@pytest.mark.parametrize("kind", DAMAGES)
def test_the_checkpoint_before_a_damaged_one_is_used(workdir, capsys, kind, sealed):
    if not sealed and "flipped" in kind:
        pytest.skip("nobody can see it without checksums")
    path = workdir / "checkpoints" / "3"
    assert integrity.sealed(storage.path(path))
    strike, words = DAMAGES[kind]
    strike(path)
    if not sealed:
        (path / "checksums-0-of-1.json").unlink()
    left = files(path)
    step, state = restore(workdir)
    assert step == 2
    jax.tree.map(np.testing.assert_array_equal, state, make_state(2))
    told = capsys.readouterr().err
    name = "3.incomplete" if kind == "deleted metadata" and not sealed else "3.unreadable"
    assert f"set aside as {name}" in told and (words in told or not sealed)
    assert "no checksums" in told if not sealed and name == "3.unreadable" else "no checksums" not in told
    assert files(path.with_name(name)) == left, "nothing of it is lost"
    assert checkpoint.steps(workdir) == [2]
    checkpoints = checkpoint.Checkpoints(workdir, keep=2, resumable=2)
    checkpoints.save(3, make_state(9), {})  # its place is free
    checkpoints.close()
    step, state = restore(workdir)
    assert step == 3
    jax.tree.map(np.testing.assert_array_equal, state.params, make_state(9).params)
    assert path.with_name(name).exists() == (name == "3.unreadable")


def test_none_that_can_be_read_is_an_error_and_no_fresh_start(workdir):
    for step in "23":
        flip(data_file(workdir / "checkpoints" / step / "params"))
    left = files(workdir)
    with pytest.raises(UserError, match="no checkpoint in .* can be read; nothing was deleted") as error:
        restore(workdir)
    assert "\n" not in str(error.value) and set(files(workdir).values()) == set(left.values())
    with pytest.raises(
        UserError, match=r"no checkpoint that can be read, but 2\.unreadable, 3\.unreadable; bring back"
    ):
        record.check(workdir, config.default(), {})


def test_folders_that_are_none_any_more_are_no_fresh_start(workdir):
    for step in "23":
        (workdir / "checkpoints" / step / "_CHECKPOINT_METADATA").unlink()
    with pytest.raises(UserError, match="no checkpoint that can be read, but 2, 3; bring back a copy"):
        record.check(workdir, config.default(), {})


@pytest.mark.parametrize("message", ["UNAVAILABLE: try again", "RESOURCE_EXHAUSTED: out of memory"])
def test_storage_that_does_not_answer_is_no_damage(workdir, monkeypatch, message):
    def refuse(*_, **__):
        raise ValueError(message)

    monkeypatch.setattr(checkpoint.ocp.CheckpointManager, "restore", refuse)
    with pytest.raises(UserError, match=r"checkpoints/3 cannot be read now .*try again"):
        restore(workdir)
    assert checkpoint.steps(workdir) == [2, 3]


@pytest.mark.parametrize("kind", DAMAGES)
def test_weights_for_sampling_and_export_are_refused(workdir, capsys, kind):
    DAMAGES[kind][0](workdir / "checkpoints" / "3")
    if kind == "deleted metadata":
        assert np.asarray(stored_weights.load_params(workdir)["bias"]).shape == (3,)
        assert "checkpoints/3 is not complete; update 2 is used" in capsys.readouterr().err
    elif "position" in kind or "optimiser" in kind:  # what is not read is not looked at
        assert np.asarray(stored_weights.load_params(workdir)["bias"]).shape == (3,)
    else:
        with pytest.raises(UserError, match=r"checkpoints/3/params/.*; --step=2 is the checkpoint before it"):
            stored_weights.load_params(workdir)
        (workdir / "checkpoints" / "3" / "checksums-0-of-1.json").unlink()
        if "flipped" not in kind:
            with pytest.raises(UserError, match="checkpoints/3/params"):
                jax.tree.map(np.asarray, stored_weights.load_params(workdir))


def test_a_list_of_checksums_that_is_broken_itself_accuses_nobody(workdir, capsys):
    file = workdir / "checkpoints" / "3" / "checksums-0-of-1.json"
    content = file.read_text()
    place = content.index('"crc32c": [') + len('"crc32c": [') + content[content.index('"crc32c": [') :].index('"')
    flip(file, content.index('"', place + 2) + 2)
    assert file.read_text() != content
    assert restore(workdir)[0] == 3
    assert "checkpoints/3 has no checksums; it is read without being checked" in capsys.readouterr().err


def test_leftovers_that_are_surely_ours_go(workdir, capsys):
    inside = workdir / "checkpoints"
    for name in ("1", "2.incomplete", "2.incomplete.2", "5.incomplete", "1.unreadable"):
        (inside / name / "params").mkdir(parents=True)
    for name in ("samples", "evaluations/000010"):
        (workdir / name).mkdir(parents=True)
    ours = [".config.json", ".report.html", ".recipe.json", ".warnings.jsonl", ".evaluations.jsonl"]
    ours += ["samples/.000010.png", "samples/.prompts.json", "evaluations/.base.npz", "evaluations/000010/.0000.png"]
    for name in (*ours, "samples/.mine"):
        (workdir / f"{name}.partial").write_text("")
    checkpoint.Checkpoints(workdir, keep=2, resumable=2).close()
    assert sorted(path.name for path in inside.iterdir()) == ["1.unreadable", "2", "3", "5.incomplete"]
    assert [path.name for path in (workdir / "samples").iterdir()] == [".mine.partial"]
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 3 + len(ours)
    assert all(line.startswith("warning: ") and line.endswith("is removed") for line in told)
    assert not any((workdir / f"{name}.partial").exists() for name in ours)


def test_the_same_in_a_bucket(capsys):
    with bucket.here() as server:
        checkpoints = checkpoint.Checkpoints("gs://bucket/run", keep=3, resumable=3)
        for step in (1, 2, 3):
            checkpoints.save(step, make_state(step), {})
        checkpoints.close()
        names = [name for name in server.objects if name.startswith("run/checkpoints/3/")]
        data = max((name for name in names if "/params/d/" in name), key=lambda name: len(server.objects[name][0]))
        content = bytearray(server.objects[data][0])
        content[len(content) // 2] ^= 1
        server.objects[data] = bytes(content), 0
        del server.objects["run/checkpoints/2/params/_METADATA"]
        assert restore("gs://bucket/run")[0] == 1
        told = capsys.readouterr().err
        assert f"gs://bucket/{data} is not what was saved" in told and "checkpoints/2 is not complete" in told
        moved = {name.replace("/3/", "/3.unreadable/", 1) for name in names}
        assert moved <= server.objects.keys() and not server.objects.keys() & set(names)


# --- the configuration ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", ["", "{", "[]", "3", '"text"', None])
def test_a_configuration_that_cannot_be_read_is_in_the_checkpoints(workdir, capsys, content):
    file = workdir / "config.json"
    file.unlink() if content is None else file.write_text(content)
    wanted = config.default()
    record.check(workdir, wanted, {"model.path": "m"})
    assert "the configuration in the checkpoint of update 3 is used in its place" in capsys.readouterr().err
    wanted.seed = 5
    with pytest.raises(UserError, match="another config: seed is 0 there, 5 here"):
        record.check(workdir, wanted, {})
    assert record.lora(workdir) is None
    (workdir / "checkpoints" / "3" / "run" / "metadata").write_text("{")
    with pytest.raises(UserError, match="another config: seed is 0 there, 5 here"):
        record.check(workdir, wanted, {})
    assert "of update 2 is used" in capsys.readouterr().err
    (workdir / "checkpoints" / "2" / "run" / "metadata").write_text("{")
    with pytest.raises(UserError, match=r"config.json .*no checkpoint beside it holds the configuration; bring back"):
        record.check(workdir, wanted, {})


def test_fingerprints_that_cannot_be_read(workdir, capsys):
    (workdir / "models.json").write_text("[")
    record.check(workdir, config.default(), {"model.path": "another"})
    assert "models.json cannot be read as JSON" in capsys.readouterr().err


# --- converted weights ------------------------------------------------------------------------------------------------


def test_one_flipped_bit_of_converted_weights_is_noticed(models, tmp_path):
    path = pathlib.Path(shutil.copytree(models / "pipeline" / "transformer", tmp_path / "transformer"))
    folder.load(path)
    flip(path / folder.WEIGHTS)
    with pytest.raises(UserError, match=r"weights.safetensors is damaged: .*; bring back a copy of it, or convert"):
        folder.load(path)
    (path / integrity.BESIDE).unlink()  # of an earlier version
    folder.load(path)


def test_chunks_are_checked_each(tmp_path, monkeypatch):
    monkeypatch.setattr(integrity, "CHUNK", 100)
    monkeypatch.setattr(integrity, "BLOCK", 30)
    file = tmp_path / "file"
    content = np.random.default_rng(0).bytes(1234)
    file.write_bytes(content)
    integrity.seal_file(file)
    assert len(json.loads((tmp_path / integrity.BESIDE).read_text())["files"]["file"]["crc32c"]) == 13
    integrity.check_file(file)
    for place in range(0, 1234, 41):
        file.write_bytes(content)
        flip(file, place)
        os.utime(file, ns=(place + 1, place + 1))  # a moment of its own, however fast this loop is
        with pytest.raises(UserError, match=f"differs between bytes {place // 100 * 100} and"):
            integrity.check_file(file)
    # Each of three processes checks a share of the chunks: one of them sees it.
    seen = []
    for process in range(3):
        monkeypatch.setattr(integrity.distributed, "place", lambda process=process: (process, 3))
        seen.append(
            integrity._damage(storage.path(tmp_path), integrity._unpacked(storage.path(tmp_path / "checksums.json")))
        )
    assert sum(map(bool, seen)) == 1


def test_a_checkpoint_is_read_once_for_its_checksums(workdir, monkeypatch):
    """`evaluate` opens it to see whether it is whole, and again to draw with it."""
    read = []
    monkeypatch.setattr(
        integrity, "_crc", lambda file, start, real=integrity._crc: read.append(file) or real(file, start)
    )
    stored_weights.load_params(workdir)
    assert read and len(set(read)) == len(read)
    stored_weights.load_params(workdir)
    assert len(set(read)) == len(read)
    flip(data_file(workdir / "checkpoints" / "3" / "params"))
    with pytest.raises(UserError, match="is damaged"):
        stored_weights.load_params(workdir)


# --- a run ------------------------------------------------------------------------------------------------------------


def test_a_run_whose_newest_checkpoint_rots_ends_as_if_nothing_had_been(models, compiled, tmp_path, capsys):
    recipe = dict(checkpoint__every=1, checkpoint__resumable=3, compilation_cache=compiled)
    train.train(tiny.config(models, steps=3, **recipe), tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "3")
    flip(data_file(tmp_path / "run" / "checkpoints" / "2" / "opt_state"))
    (tmp_path / "run" / "config.json").write_text("")
    train.train(tiny.config(models, steps=3, **recipe), tmp_path / "run")
    assert "the run goes on from update 1" in capsys.readouterr().err
    assert_same(arrays(tmp_path / "whole", 3), arrays(tmp_path / "run", 3))
    assert numbers(tmp_path / "whole") == numbers(tmp_path / "run")
    assert json.loads((tmp_path / "run" / "config.json").read_text())["steps"] == 3
    assert leftovers.UNREADABLE in "".join(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())


def test_what_a_killed_conversion_left_goes_with_the_next_one(tmp_path, capsys):
    child = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    host = socket.gethostname()
    gone, elsewhere = f".new.{host}-{int(child.stdout)}.abc.partial", ".new.elsewhere-1.abc.partial"
    alive, other = f".new.{host}-{os.getppid()}.abc.partial", f".other.{host}-{int(child.stdout)}.abc.partial"
    for name in (gone, elsewhere, alive, other):
        (tmp_path / name / "vae").mkdir(parents=True)
    with new_folder(tmp_path / "new") as out:
        (out / "file").write_text("")
    assert {path.name for path in tmp_path.iterdir()} == {"new", elsewhere, alive, other}
    assert f"{gone}, which a process that was killed has left, is removed" in capsys.readouterr().err
