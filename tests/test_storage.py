"""Runs in a bucket: against a server of the storage's API on loopback, through the real clients."""

import io

import jax
import numpy as np
import pytest
from helpers import bucket, tiny
from helpers.pages import Checker
from helpers.runs import numbers, scalars
from helpers.states import abstract, make_state
from PIL import Image

from srpo_jax import (
    checkpoint,
    config,
    errands,
    generate,
    metrics,
    record,
    run_page,
    sampling,
    storage,
    stored_weights,
    train,
)
from srpo_jax.errors import UserError


@pytest.fixture(scope="module")
def server():
    """The file systems remember how to reach a bucket: one server for all tests."""
    with bucket.here() as server:
        yield server


# --- paths ------------------------------------------------------------------------------------------------------------


def test_paths_that_are_not_supported(monkeypatch):
    with pytest.raises(UserError, match="s3://b/run: only local folders and gs://BUCKET/PATH"):
        storage.path("s3://b/run")
    with pytest.raises(UserError, match="gs:// names no bucket"):
        storage.path("gs://")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="gs://b/run: this needs another package; run `pip install gcsfs`"):
        record.check("gs://b/run", config.default(), {})


def test_a_local_file_is_replaced_as_a_whole(tmp_path):
    file = storage.path(tmp_path / "new" / "file")
    for content in (b"one", b"two"):
        storage.write(file, content)
        assert file.read_bytes() == content
    assert [path.name for path in file.parent.iterdir()] == ["file"]


def test_a_bucket_that_refuses_is_named(server):
    with pytest.raises(UserError, match=r"gs://forbidden/run cannot be read \(.*gcloud auth application-default login"):
        record.check("gs://forbidden/run", config.default(), {})
    with pytest.raises(UserError, match=r"gs://missing/run/config.json cannot be written \(.*check the bucket's name"):
        record.write("gs://missing/run", config.default(), {})


# --- what a run writes ------------------------------------------------------------------------------------------------


def test_metrics_are_copied_before_a_checkpoint_and_from_time_to_time(server, tmp_path, monkeypatch):
    workdir = storage.path("gs://bucket/metrics")
    report = metrics.Metrics(workdir, 0, 9, errands.Errands(workdir))
    report.write(1, {"loss": 0.5})
    assert metrics.read(workdir) == []
    report.flush()
    assert metrics.read(workdir) == [{"step": 1, "loss": 0.5}]
    monkeypatch.setattr(metrics, "COPY_EVERY", 0)
    report.write(2, {"loss": 0.25})
    report._errands.wait()
    assert [record["step"] for record in metrics.read(workdir)] == [1, 2]
    # The process is killed here; the run goes on from a checkpoint of step 1.
    again = metrics.Metrics(workdir, 1, 9, errands.Errands(workdir))
    assert metrics.read(workdir) == [{"step": 1, "loss": 0.5}]
    again.write(2, {"loss": 0.125})
    again.close()
    assert metrics.read(workdir) == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.125}]
    for file in (workdir / "tensorboard").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    assert {("loss", 1): 0.5, ("loss", 2): 0.125}.items() <= scalars(tmp_path).items()


def test_checkpoints_in_a_bucket(server):
    workdir = "gs://bucket/checkpoints"
    checkpoints = checkpoint.Checkpoints(workdir, keep=2, resumable=2)
    for step in (1, 2, 3):
        checkpoints.save(step, make_state(step), {"data": {"next_index": step}})
    checkpoints.close()
    assert checkpoint.steps(workdir) == [2, 3]
    # What a save leaves that ended before its last file.
    last = "checkpoints/checkpoints/3/commit_success.txt"
    written = [name for name in server.objects if name.startswith("checkpoints/checkpoints/3/")]
    assert [name for name in written if "checksums" not in name][-1] == last
    del server.objects[last], server.objects["checkpoints/checkpoints/3/checksums-0-of-1.json"]
    assert checkpoint.steps(workdir) == [2]
    checkpoints = checkpoint.Checkpoints(workdir, keep=2, resumable=2)
    assert not [name for name in server.objects if name.startswith("checkpoints/checkpoints/3/")]
    state, run = checkpoints.restore(checkpoints.latest(), abstract(make_state(0)))
    checkpoints.close()
    assert run == {"step": 2, "data": {"next_index": 2}}
    jax.tree.map(np.testing.assert_array_equal, state, make_state(2))


def test_the_page_of_a_run_in_a_bucket(server):
    workdir = storage.path("gs://bucket/paged")
    record.write(workdir, config.default(), {})
    sheet = sampling.grid(np.zeros((3, 8, 8, 3), np.uint8))
    for step in (0, 10):
        sampling.save_image(sheet, workdir / "samples" / f"{step:06d}.png")
    (workdir / "samples" / "prompts.json").write_text('["a fox", "a cat", "a dog"]')
    page = run_page.Page(workdir, ["the bucket is slow"])
    page.write()
    server.objects["paged/report.html"] = b"of before"
    page.write(ended=True)
    found = Checker((workdir / "report.html").read_text())
    assert [card["data-prompt"] for card in found.cards] == ["a fox", "a cat", "a dog"] and len(found.images) == 6
    assert "samples/000010.png" in found.links and "the bucket is slow" in " ".join(found.text)
    assert len((workdir / "warnings.jsonl").read_text().splitlines()) == 1


def test_a_run_in_a_bucket_goes_on_with_the_numbers_of_a_local_one(server, models, compiled, tmp_path):
    changes = dict(checkpoint__every=1, compilation_cache=compiled)
    workdir, local = storage.path("gs://bucket/runs/a"), storage.path(tmp_path / "local")
    train.train(tiny.config(models, steps=1, **changes), workdir)
    train.train(tiny.config(models, steps=2, **changes), workdir)
    train.train(tiny.config(models, steps=2, **changes), local)
    assert numbers(workdir) == numbers(local) and len(numbers(local)) == 2
    assert (workdir / "config.json").read_text() == (local / "config.json").read_text()
    ours, others = (jax.tree.leaves(stored_weights.load_params(place, 2)) for place in (workdir, local))
    for mine, other in zip(ours, others, strict=True):
        assert np.asarray(mine).tobytes() == np.asarray(other).tobytes()

    changes["data__height"] = 64
    with pytest.raises(UserError, match="gs://bucket/runs/a holds a run of another config: data.height is 32 there"):
        train.train(tiny.config(models, steps=4, **changes), workdir)

    words = f"--model {models}/pipeline --prompt cat --height 32 --width 32 --steps 1 --text-length 8 --checkpoint"
    generate.main([*words.split(), str(workdir), "--out", str(workdir / "images")])
    with Image.open(io.BytesIO((workdir / "images" / "0000-cat.png").read_bytes())) as image:
        assert image.size == (32, 32)
