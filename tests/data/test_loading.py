"""The stream of examples: order, position, shares of processes; and stored data that does not fit the configuration."""

import dataclasses
import json

import ml_dtypes
import numpy as np
import pytest
import tensorflow_datasets as tfds

from srpo_jax.data import loading, stored
from srpo_jax.errors import UserError
from srpo_jax.weights.files import Spec

ARRAYS = {"text": Spec((4, 3), np.dtype(ml_dtypes.bfloat16)), "pooled": Spec((2,), np.dtype(ml_dtypes.bfloat16))}


def take(stream, count):
    return [next(stream) for _ in range(count)]


def prompts(stream, count):
    return [examples.prompts for examples in take(stream, count)]


def source(count):
    return loading.Prompts([str(i) for i in range(count)])


def write(path, texts, arrays=ARRAYS, shard_size=3):
    """A data set whose arrays are made from the place of an example; returns its arrays in full."""
    manifest = stored.Manifest(len(texts), shard_size, arrays, {}, stored.digest(texts), "model", "texts")
    stored.begin(path, stored.plan(path, manifest), texts)
    full = {
        name: np.random.default_rng(0).normal(size=(len(texts), *spec.shape)).astype(spec.dtype)
        for name, spec in arrays.items()
    }
    with stored.Writer(path, manifest, stored.missing_shards(path, manifest)) as writer:
        for place, text in enumerate(texts):
            writer.write(text, {name: array[place] for name, array in full.items()})
    stored.finish(path, manifest)
    return full


# --- the stream -------------------------------------------------------------------------------------------------------


def test_every_prompt_once_a_round_in_changing_order():
    seen = sum(prompts(loading.batches(source(10), 4, seed=0), 5), [])
    texts = [str(i) for i in range(10)]
    assert sorted(seen[:10]) == sorted(seen[10:]) == sorted(texts)
    assert len({tuple(seen[:10]), tuple(seen[10:]), tuple(texts)}) == 3


def test_seed_decides_the_order():
    first, again, other = (prompts(loading.batches(source(10), 4, seed=seed), 3) for seed in (0, 0, 1))
    assert first == again != other


def test_fewer_prompts_than_a_batch():
    assert prompts(loading.batches(source(1), 3, seed=0), 2) == [["0"] * 3] * 2


@pytest.fixture(scope="module")
def encoded(tmp_path_factory):
    """(source of seven stored examples, their arrays)."""
    path, texts = tmp_path_factory.mktemp("data") / "set", [str(i) for i in range(7)]
    full = write(path, texts)
    return loading.Encoded(stored.DataSet(path), range(7), texts), full


@pytest.fixture(params=["in memory", "stored"])
def seven(request, encoded):
    return encoded[0] if request.param == "stored" else source(7)


def test_position_survives_json(seven):
    """Also with batches read ahead: the position is of what was taken."""
    stream = loading.batches(seven, 3, seed=0)
    take(stream, 4)
    position = json.loads(json.dumps(stream.get_state()))
    expected = prompts(stream, 6)
    other = loading.batches(seven, 3, seed=0)
    take(other, 1)
    other.set_state(position)
    assert prompts(other, 6) == expected


def test_processes_share_a_batch(seven):
    whole = prompts(loading.batches(seven, 4, seed=0), 5)
    first, second = (prompts(loading.batches(seven, 4, 0, rows), 5) for rows in ([0, 2], [1, 3]))
    assert [[a, c, b, d] for (a, b), (c, d) in zip(first, second, strict=True)] == whole


def test_stored_arrays_come_back_bit_for_bit_with_their_prompts(encoded):
    data, full = encoded
    for examples in take(loading.batches(data, 3, seed=0), 5):
        places = [int(prompt) for prompt in examples.prompts]
        for name, array in examples.arrays.items():
            assert array.dtype == ARRAYS[name].dtype and array.tobytes() == full[name][places].tobytes()
    assert prompts(loading.batches(data, 3, seed=5), 5) == prompts(loading.batches(source(7), 3, seed=5), 5)


def test_a_part_of_a_data_set(encoded):
    data = loading.Encoded(encoded[0]._data, [1, 4, 6], ["1", "4", "6"])
    assert sorted(prompts(loading.batches(data, 3, seed=0), 1)[0]) == ["1", "4", "6"]
    assert data.digest != encoded[0].digest == source(7).digest


# --- the folder -------------------------------------------------------------------------------------------------------


def test_a_data_set_is_one_of_tensorflow_datasets(tmp_path):
    path, texts = tmp_path / "set", ["a", "ü", "c\nd", "e"]
    full = write(path, texts)
    builder = tfds.builder_from_directory(str(path))
    assert builder.info.splits["train"].num_examples == 4 and builder.info.splits["train"].shard_lengths == [3, 1]
    records = list(builder.as_data_source("train"))
    assert [record["prompt"].decode() for record in records] == texts == stored.read_prompts(path)
    assert np.stack([record["text"] for record in records]).tobytes() == full["text"].tobytes()
    assert stored.read_manifest(path).source == "texts"


def test_a_writer_that_fails_leaves_whole_shards_alone(tmp_path):
    texts = [str(i) for i in range(5)]
    manifest = stored.Manifest(5, 2, ARRAYS, {}, stored.digest(texts), "", "")
    stored.begin(tmp_path, manifest, texts)
    zeros = {name: np.zeros(spec.shape, spec.dtype) for name, spec in ARRAYS.items()}
    with pytest.raises(ValueError, match="Dtype float32"), stored.Writer(tmp_path, manifest, [0, 1, 2]) as writer:
        for text in texts[:3]:
            writer.write(text, zeros)
        writer.write(texts[3], zeros | {"pooled": np.zeros(2, np.float32)})
    assert stored.missing_shards(tmp_path, manifest) == [1, 2] and not list(tmp_path.glob(".*"))
    with pytest.raises(UserError, match=r"not complete \(2 of 3 shards are missing\)"):
        stored.DataSet(tmp_path)
    with pytest.raises(UserError, match="lacks 2 of 3 shards"):
        stored.finish(tmp_path, manifest)


def test_a_shard_that_is_lost_or_damaged(tmp_path):
    write(tmp_path / "set", ["a", "b", "c", "d"])
    manifest = stored.read_manifest(tmp_path / "set")
    shard = stored.shard_file(tmp_path / "set", manifest, 0)
    shard.write_bytes(stored.shard_file(tmp_path / "set", manifest, 1).read_bytes())
    with pytest.raises(UserError, match="00000-of-00002 is damaged; move it away"):
        stored.finish(tmp_path / "set", manifest)
    shard.unlink()
    with pytest.raises(UserError, match="00000-of-00002 is missing; copy or encode it again"):
        stored.DataSet(tmp_path / "set")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"digest": "x"}, "differs in the prompts;"),
        ({"arrays": {"text": Spec((5, 3), np.dtype(np.float32))}, "encoders": {"t": "1"}}, "arrays .*, the encoders;"),
    ],
)
def test_another_data_set_is_not_overwritten(tmp_path, change, words):
    write(tmp_path, ["a", "b", "c", "d"])
    there = stored.read_manifest(tmp_path)
    assert stored.plan(tmp_path, dataclasses.replace(there, shard_size=99, source="elsewhere")) == there
    with pytest.raises(UserError, match=words):
        stored.plan(tmp_path, dataclasses.replace(there, **change))


def test_folders_that_are_no_data_sets(tmp_path):
    with pytest.raises(UserError, match="none is not a folder; expected a data set made by"):
        stored.DataSet(tmp_path / "none")
    with pytest.raises(UserError, match="gs://bucket/data: ArrayRecord files lie in folders; mount the bucket"):
        stored.DataSet("gs://bucket/data")
    with pytest.raises(UserError, match="encoding.json does not exist"):
        stored.DataSet(tmp_path)
    wanted = stored.Manifest(1, 1, ARRAYS, {}, "", "", "")
    (tmp_path / "lost+found").mkdir()  # of a fresh disk
    assert stored.plan(tmp_path, wanted) == wanted
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(UserError, match="is not a data set of encoded prompts or pictures; choose another folder"):
        stored.plan(tmp_path, wanted)
    (tmp_path / "encoding.json").write_text('{"format": "srpo_jax.data/1", "count": 3}')
    with pytest.raises(UserError, match="encoding.json is damaged"):
        stored.DataSet(tmp_path)
