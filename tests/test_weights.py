"""The machinery under the converter: transforms, the strict engine, safetensors files, others' files, our folders."""

import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from srpo_jax.errors import UserError
from srpo_jax.models import compute
from srpo_jax.models.clip import ClipText, ClipTextConfig
from srpo_jax.weights import engine, files, folder, sources, transforms
from srpo_jax.weights.files import SafetensorsFile, SafetensorsWriter, Spec, new_folder
from srpo_jax.weights.rules import Rule, Table

BF16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = [np.dtype(np.float32), BF16]


def random(shape, dtype=np.float32, seed=0):
    """Arrays of arbitrary bits, NaNs included: conversion moves bits."""
    bits = np.random.default_rng(seed).integers(0, 256, (*shape, np.dtype(dtype).itemsize), np.uint8)
    return bits.view(dtype)[..., 0]


def same(a, b):
    """Equal shape, dtype and bits."""
    a, b = np.asarray(a), np.asarray(b)
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


# --- transforms ---

CASES = {
    "identity": (transforms.identity, [(5,), (2, 3)], [(5,), (2, 3)]),
    "linear": (transforms.linear, [(4, 6)], [(6, 4)]),
    "conv": (transforms.conv, [(4, 3, 5, 7)], [(5, 7, 3, 4)]),
    "pointwise": (transforms.pointwise, [(4, 3, 1, 1)], [(3, 4)]),
    "swap then linear": (transforms.swap_halves >> transforms.linear, [(6, 5)], [(5, 6)]),
    "linear_to": (transforms.linear_to(3, 2, 4), [(24, 5)], [(5, 3, 2, 4)]),
    "reshape": (transforms.reshape((6,), (3, 2)), [(6,)], [(3, 2)]),
    "split": (transforms.split(2, 4), [(6, 5)], [(2, 5), (4, 5)]),
    "join": (transforms.join(2, 4), [(2, 5), (4, 5)], [(6, 5)]),
    "qkv_kernel": (transforms.qkv_kernel(2, 4), [(8, 5)] * 3, [(5, 3, 2, 4)]),
    "qkv_bias": (transforms.qkv_bias(2, 4), [(8,)] * 3, [(3, 2, 4)]),
    "fused_qkv_bias": (transforms.fused_qkv_bias(2, 4), [(24,)], [(3, 2, 4)]),
    "fused rows of two parameters": (
        transforms.split(24, 7) >> transforms.each(transforms.linear_to(3, 2, 4), transforms.linear),
        [(31, 5)],
        [(5, 3, 2, 4), (5, 7)],
    ),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_transform_is_invertible_to_the_bit(name, dtype):
    transform, given, expected = CASES[name]
    arrays = [random(shape, dtype, seed) for seed, shape in enumerate(given)]
    results = transform.forward(arrays)
    assert [r.shape for r in results] == expected
    assert sum(r.size for r in results) == sum(a.size for a in arrays)
    back = transform.inverse(results)
    assert len(back) == len(arrays) and all(same(a, b) for a, b in zip(arrays, back, strict=True))
    inverted = transform.inverted()
    assert all(same(a, b) for a, b in zip(inverted.forward(results), arrays, strict=True))


def test_transforms_put_numbers_where_torch_means_them():
    q, k, v = (random((8, 5), seed=s) for s in range(3))
    (kernel,) = transforms.qkv_kernel(2, 4).forward([q, k, v])
    # out feature h * 4 + d of k is kernel[:, 1, h, d]
    assert same(kernel[:, 1, 1, 2], k[6])
    (fused,) = transforms.fused_qkv_kernel(2, 4).forward([np.concatenate([q, k, v])])
    assert same(fused, kernel)
    rows = np.arange(6, dtype=np.float32)
    assert transforms.swap_halves.forward([rows])[0].tolist() == [3, 4, 5, 0, 1, 2]
    image = random((2, 3, 4, 5))
    assert same(transforms.conv.forward([image])[0][3, 4, 2, 1], image[1, 2, 3, 4])


def test_split_refuses_other_row_counts():
    with pytest.raises(ValueError, match="7 rows"):
        transforms.split(2, 4).forward([np.zeros((7, 2))])


# --- rules and engine ---

TOY = Table(
    (
        Rule("embedding", "emb.weight", transforms.identity),
        Rule(
            ("blocks.q", "blocks.mlp"),
            "layers.{i}.fused.weight",
            transforms.split(4, 6) >> transforms.each(transforms.linear, transforms.linear),
            layers=3,
        ),
        Rule("blocks.kv", ("layers.{i}.k", "layers.{i}.v"), transforms.join(4, 4), layers=3),
    ),
    ignored=frozenset({"emb.position_ids"}),
    aliases={"tied.weight": "emb.weight"},
)
SHAPES = {"embedding": (7, 5), "blocks.q": (3, 5, 4), "blocks.mlp": (3, 5, 6), "blocks.kv": (3, 8)}
LIKE = {
    "embedding": np.zeros((7, 5)),
    "blocks": {"q": np.zeros((3, 5, 4)), "mlp": np.zeros((3, 5, 6)), "kv": np.zeros((3, 8))},
}


def toy_tensors(dtype=np.float32):
    shapes = {"emb.weight": (7, 5)}
    for i in range(3):
        shapes |= {f"layers.{i}.fused.weight": (10, 5), f"layers.{i}.k": (4,), f"layers.{i}.v": (4,)}
    return {name: random(shape, dtype, seed) for seed, (name, shape) in enumerate(shapes.items())}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_engine_round_trip(dtype):
    tensors = toy_tensors(dtype)
    params = engine.to_params(TOY, tensors, LIKE)
    assert {path: a.shape for path, a in engine.flatten(params).items()} == SHAPES
    assert same(params["blocks"]["mlp"][2], tensors["layers.2.fused.weight"][4:].T)
    back = engine.from_params(TOY, params)
    assert back.keys() == tensors.keys() and all(same(back[name], tensors[name]) for name in tensors)


def test_source_shapes_are_those_of_the_tensors():
    assert engine.source_shapes(TOY, SHAPES) == {name: a.shape for name, a in toy_tensors().items()}


def faults(tensors):
    with pytest.raises(UserError) as caught:
        engine.to_params(TOY, tensors, LIKE, "toy")
    message = str(caught.value)
    assert "\n" not in message and "toy network" in message
    return message


def test_missing_unused_and_mismatching_tensors_are_listed_in_one_message():
    tensors = toy_tensors()
    del tensors["layers.1.k"], tensors["layers.2.v"]
    tensors["surprise"] = np.zeros(3, np.float32)
    tensors["layers.0.fused.weight"] = np.zeros((10, 6), np.float32)
    message = faults(tensors)
    assert "2 missing: layers.1.k, layers.2.v" in message
    assert "1 not used: surprise" in message
    assert "1 wrong shape: layers.0.fused.weight [10, 6] instead of [10, 5]" in message


def test_right_size_of_wrong_shape_is_refused():
    tensors = toy_tensors()
    tensors["emb.weight"] = tensors["emb.weight"].T.copy()
    assert "emb.weight [5, 7] instead of [7, 5]" in faults(tensors)


def test_integers_are_refused():
    tensors = toy_tensors()
    tensors["emb.weight"] = np.zeros((7, 5), np.int8)
    assert "1 not of floating point: emb.weight (int8)" in faults(tensors)


def test_long_lists_are_cut():
    assert "and 94 more" in faults(toy_tensors() | {f"extra{i}": np.zeros(1) for i in range(100)})


def test_only_extra_tensors_that_the_table_names_are_skipped():
    expected = engine.to_params(TOY, toy_tensors(), LIKE)
    given = engine.to_params(TOY, toy_tensors() | {"emb.position_ids": np.arange(3)}, LIKE)
    assert all(same(a, b) for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(given), strict=True))
    assert "1 not used: layers.0.position_ids" in faults(toy_tensors() | {"layers.0.position_ids": np.arange(3)})


def test_tied_tensors():
    tensors = toy_tensors()
    expected = engine.to_params(TOY, tensors, LIKE)
    both = tensors | {"tied.weight": tensors["emb.weight"].copy()}
    alone = {name: a for name, a in both.items() if name != "emb.weight"}
    for given in (both, alone):
        assert same(engine.to_params(TOY, given, LIKE)["embedding"], expected["embedding"])
    both["tied.weight"] = random((7, 5), seed=99)
    assert "1 tied but different: tied.weight and emb.weight" in faults(both)


def test_mixed_dtypes_are_kept_without_loss():
    tensors = toy_tensors() | {"layers.1.k": random((4,), BF16)}
    params = engine.to_params(TOY, tensors, LIKE)
    assert params["blocks"]["kv"].dtype == np.float32
    assert same(params["blocks"]["kv"][1, :4], tensors["layers.1.k"].astype(np.float32))


def test_stacks_are_made_once_when_layers_are_written():
    params = engine.to_params(TOY, toy_tensors(), LIKE)
    made = []

    class Stored:
        """An array that is elsewhere until numpy asks for it, as in a checkpoint."""

        def __init__(self, array):
            self.array, self.shape, self.dtype = array, array.shape, array.dtype

        def __array__(self, dtype=None, copy=None):
            made.append(self)
            return self.array

    found = engine.from_params(TOY, jax.tree.map(Stored, params))
    assert all(same(found[name], array) for name, array in toy_tensors().items())
    assert len(made) == len(set(made)) == len(SHAPES)


def test_tables_with_faults_of_their_own_are_refused():
    with pytest.raises(ValueError, match="twice"):
        Table((Rule("a", "x", transforms.identity), Rule("b", "x", transforms.identity)))
    with pytest.raises(ValueError, match="disagree"):
        Rule("a", "x.{i}", transforms.identity)
    with pytest.raises(ValueError, match="disagree"):
        Rule("a", "x", transforms.identity, layers=2)
    with pytest.raises(ValueError, match="extra"):
        engine.source_shapes(TOY, SHAPES | {"extra": (2,)})
    with pytest.raises(ValueError, match="stack of 3 layers"):
        engine.source_shapes(TOY, SHAPES | {"blocks.kv": (4, 8)})


# --- safetensors files ---


def test_reads_what_the_safetensors_package_writes_and_the_reverse(tmp_path):
    arrays = {
        "b": random((3, 5), BF16), "f": random((2, 3, 4), np.float32), "half": random((3,), np.float16),
        "ids": np.arange(4), "scalar": np.full((), 2.5, np.float32), "empty": np.zeros((0, 3), np.float32),
    }
    safetensors.numpy.save_file(arrays, tmp_path / "theirs.safetensors", {"format": "pt"})
    theirs = SafetensorsFile(tmp_path / "theirs.safetensors")
    assert theirs.metadata == {"format": "pt"} and theirs.specs.keys() == arrays.keys()
    assert all(same(theirs.read(name), array) for name, array in arrays.items())

    specs = {name: Spec(array.shape, array.dtype) for name, array in arrays.items()}
    with SafetensorsWriter(tmp_path / "ours.safetensors", specs, {"format": "pt"}) as out:
        for name, array in arrays.items():
            out.write(name, array)
    ours = safetensors.numpy.load_file(tmp_path / "ours.safetensors")
    assert ours.keys() == arrays.keys() and all(same(ours[name], array) for name, array in arrays.items())


def test_writer_takes_slices_views_and_casts_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_CHUNK", 64)
    stack, plain = random((3, 20, 7)), np.linspace(-1, 1, 99, dtype=np.float32).reshape(33, 3)
    written = []
    specs = {"stack": Spec((3, 7, 20), np.dtype(np.float32)), "plain": Spec((33, 3), BF16)}
    with SafetensorsWriter(tmp_path / "w.safetensors", specs, progress=written.append) as out:
        out.write("plain", plain)
        for layer in (2, 0, 1):
            out.write("stack", stack[layer].T, layer)
    result = SafetensorsFile(tmp_path / "w.safetensors")
    assert same(result.read("stack"), np.swapaxes(stack, 1, 2)) and same(result.read("plain"), plain.astype(BF16))
    assert sum(written) == sum(spec.nbytes for spec in specs.values()) and len(written) > 10


@pytest.mark.parametrize("failure", ["exception", "interrupt", "forgotten", "shape"])
def test_nothing_is_left_of_a_file_that_was_not_finished(tmp_path, failure):
    path = tmp_path / "w.safetensors"
    path.write_bytes(b"earlier")
    expected = {"exception": RuntimeError, "interrupt": KeyboardInterrupt}.get(failure, ValueError)
    specs = {"a": Spec((2, 3), np.dtype(np.float32)), "b": Spec((2,), np.dtype(np.float32))}
    with pytest.raises(expected), SafetensorsWriter(path, specs) as out:
        out.write("a", np.zeros((2, 3)) if failure != "shape" else np.zeros((3, 2)))
        if failure in ("exception", "interrupt"):
            raise expected
    assert os.listdir(tmp_path) == [path.name] and path.read_bytes() == b"earlier"


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt, UserError])
def test_nothing_is_left_of_a_folder_that_was_not_finished(tmp_path, failure):
    with pytest.raises(failure), new_folder(tmp_path / "sub" / "out") as out:
        (out / "file").write_text("half")
        raise failure
    assert os.listdir(tmp_path / "sub") == []
    with new_folder(tmp_path / "sub" / "out") as out:
        (out / "file").write_text("whole")
    assert os.listdir(tmp_path / "sub") == ["out"]
    with pytest.raises(UserError, match="exists already"), new_folder(tmp_path / "sub" / "out"):
        pass
    assert (tmp_path / "sub" / "out" / "file").read_text() == "whole"


def tiny_file(path):
    safetensors.numpy.save_file({"a": random((4, 5)), "b": random((6,))}, path)
    return path.read_bytes()


BROKEN = {
    "empty": (lambda data: b"", "empty file"),
    "cut in the data": (lambda data: data[:-10], r"cut short \(\d+ bytes instead of \d+\)"),
    "cut in the header": (lambda data: data[:40], "cut short inside its header"),
    "cut in the length": (lambda data: data[:5], "not a safetensors file"),
    "longer": (lambda data: data + b"xx", "longer than its header says"),
    "html": (lambda data: b"<!DOCTYPE html><html>please log in</html>", "web page"),
    "html with space": (lambda data: b"\n  <html><body>404</body></html>", "web page"),
    "lfs": (lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n", "git lfs pull"),
    "gguf": (lambda data: b"GGUF\x03\x00\x00\x00" + bytes(100), "GGUF"),
    "noise": (lambda data: bytes(range(256)) * 4, "not a safetensors file"),
    "other json": (lambda data: (9).to_bytes(8, "little") + b'{"a": 12}', "header has another layout"),
    "unknown dtype": (lambda data: data.replace(b'"F32"', b'"Q32"'), "dtype Q32"),
    "contradiction": (lambda data: data.replace(b"[4,5]", b"[4,9]"), "damaged.*contradicts its shape"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_and_foreign_files_are_named(tmp_path, case):
    damage, words = BROKEN[case]
    path = tmp_path / "weights.safetensors"
    path.write_bytes(damage(tiny_file(path)))
    with pytest.raises(UserError, match=words) as caught:
        sources.open_source(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_noise_under_torchs_suffix(tmp_path):
    (tmp_path / "weights.pt").write_bytes(bytes(range(256)) * 4)
    with pytest.raises(UserError, match=r"weights\.pt is neither a torch pickle nor a safetensors file"):
        sources.open_source(tmp_path / "weights.pt")


# --- others' files ---


def write_shards(place, tensors, stem="model"):
    names = list(tensors)
    parts = {f"{stem}-1.safetensors": names[::2], f"{stem}-2.safetensors": names[1::2]}
    for file, part in parts.items():
        safetensors.numpy.save_file({name: tensors[name] for name in part}, place / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (place / f"{stem}.safetensors.index.json").write_text(json.dumps(index))
    return index


def test_sharded_source(tmp_path):
    tensors = toy_tensors(BF16)
    write_shards(tmp_path, tensors)
    for path in (tmp_path, tmp_path / "model.safetensors.index.json"):
        source = sources.open_source(path)
        assert source.specs.keys() == tensors.keys()
        assert all(same(source.read(name), tensors[name]) for name in tensors)


def test_sharded_source_that_disagrees_with_its_index(tmp_path):
    index = write_shards(tmp_path, toy_tensors())
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": index["weight_map"] | {"ghost": "model-1.safetensors"}}))
    with pytest.raises(UserError, match="1 tensors are not in their files, as ghost"):
        sources.open_source(tmp_path)
    path.write_text(json.dumps({"weight_map": index["weight_map"] | {"ghost": "model-3.safetensors"}}))
    with pytest.raises(UserError, match="model-3.safetensors; download"):
        sources.open_source(tmp_path)
    path.write_text("{}")
    with pytest.raises(UserError, match="no weight_map"):
        sources.open_source(tmp_path)


@pytest.mark.parametrize("wrapped", ["plain", "state_dict", "module", "old zip-less format", "view"])
def test_torch_source(tmp_path, wrapped):
    torch = pytest.importorskip("torch")
    arrays = {"a": random((4, 5)), "scalar": np.full((), 3, np.float32)}
    content = {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
    bits = np.random.default_rng(0).integers(-9, 9, (3, 2)).astype(np.int16)
    arrays["bf"], content["bf"] = bits.view(BF16), torch.from_numpy(bits.copy()).view(torch.bfloat16)
    if wrapped == "view":
        arrays["a"], content["a"] = arrays["a"].T, content["a"].T
    if wrapped == "module":
        content = {f"module.{name}": tensor for name, tensor in content.items()}
    if wrapped == "state_dict":
        content = {"epoch": 3, "state_dict": content}
    torch.save(content, tmp_path / "w.pt", _use_new_zipfile_serialization="old" not in wrapped)
    source = sources.open_source(tmp_path / "w.pt")
    assert source.specs == {name: Spec(a.shape, a.dtype) for name, a in arrays.items()}
    assert all(same(source.read(name), array) for name, array in arrays.items())


class Trap:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


def test_torch_files_that_are_refused(tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "w.pt"
    torch.save({"a": torch.zeros(3), "b": Trap(tmp_path / "sprung")}, path)
    with pytest.raises(UserError, match="refused: it holds more than tensors"):
        sources.open_source(path)
    assert not (tmp_path / "sprung").exists()
    torch.save({"a": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(UserError, match="may be cut short") as caught:
        sources.open_source(path)
    assert "\n" not in str(caught.value)
    torch.save({"a": torch.zeros(3), "lr": 0.1}, path)
    with pytest.raises(UserError, match="lr are not tensors"):
        sources.open_source(path)
    torch.save([1, 2], path)
    with pytest.raises(UserError, match="but a list"):
        sources.open_source(path)


def test_torch_files_without_torch(tmp_path, monkeypatch):
    (tmp_path / "w.bin").write_bytes(b"PK\x03\x04" + bytes(20))
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match="needs torch"):
        sources.open_source(tmp_path / "w.bin")


def test_safetensors_come_before_pickles_and_absence_is_an_error(tmp_path):
    with pytest.raises(UserError, match="no weights under a usual name"):
        sources.open_source(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        sources.open_source(tmp_path / "nothing")
    (tmp_path / "pytorch_model.bin").write_bytes(b"never read")
    tiny_file(tmp_path / "model.safetensors")
    assert sources.open_source(tmp_path).specs.keys() == {"a", "b"}


# --- our folders ---

CONFIG = ClipTextConfig(
    vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
    max_position_embeddings=8, eos_token_id=63,
)


@pytest.fixture(scope="module")
def network():
    return compute.build(lambda rngs: ClipText(CONFIG, compute.Compute(), rngs=rngs))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_folder_round_trip(tmp_path, network, dtype):
    graphdef, params = network
    params = jax.tree.map(lambda a: a.astype(dtype), params)
    folder.save(tmp_path / "net", "clip_text", CONFIG, params)
    assert folder.read_config(tmp_path / "net") == ("clip_text", CONFIG)
    config, loaded_graphdef, loaded = folder.load(tmp_path / "net", "clip_text", compute.Compute(param_dtype=dtype))
    assert config == CONFIG
    assert jax.tree.structure(loaded) == jax.tree.structure(params)
    assert all(same(a, b) for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(params), strict=True))
    ids = jnp.arange(8)[None]
    expected = compute.bind(graphdef, params)(ids)
    assert np.array_equal(compute.bind(loaded_graphdef, loaded)(ids)[1], expected[1])


def test_folder_casts_to_the_asked_dtype(tmp_path, network):
    folder.save(tmp_path, "clip_text", CONFIG, network[1], dtype=jnp.bfloat16)
    assert {spec.dtype for spec in SafetensorsFile(tmp_path / folder.WEIGHTS).specs.values()} == {BF16}
    _, _, loaded = folder.load(tmp_path, compute=compute.Compute(param_dtype=jnp.float32))
    expected = jax.tree.map(lambda a: a.astype(jnp.bfloat16).astype(jnp.float32), network[1])
    assert all(same(a, b) for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(expected), strict=True))


def test_saving_again_replaces(tmp_path, network):
    folder.save(tmp_path, "clip_text", CONFIG, network[1])
    folder.save(tmp_path, "clip_text", CONFIG, jax.tree.map(lambda a: a + 1, network[1]))
    _, _, loaded = folder.load(tmp_path)
    assert same(loaded["text"]["norm_out"]["bias"], network[1]["text"]["norm_out"]["bias"] + 1)
    assert sorted(os.listdir(tmp_path)) == [folder.CONFIG, folder.WEIGHTS]


def test_parameters_of_another_network_are_not_saved(tmp_path, network):
    wrong = {"text": {**network[1]["text"], "position_embedding": jnp.zeros((9, 16))}}
    with pytest.raises(ValueError, match="text.position_embedding"):
        folder.save(tmp_path / "net", "clip_text", CONFIG, wrong)
    assert not (tmp_path / "net").exists()


def test_folders_that_do_not_load(tmp_path, network):
    with pytest.raises(UserError, match="not a folder"):
        folder.load(tmp_path / "nothing")
    with pytest.raises(UserError, match="config.json does not exist"):
        folder.load(tmp_path)
    path = tmp_path / "net"
    folder.save(path, "clip_text", CONFIG, network[1])
    with pytest.raises(UserError, match="holds a clip_text network; expected flux"):
        folder.load(path, "flux")
    good = json.loads((path / folder.CONFIG).read_text())
    for change, words in (
        ({"format": "srpo_jax/99"}, "not in the format srpo_jax/1"),
        ({"network": "gan"}, "network 'gan' is unknown"),
        ({"config": good["config"] | {"num_hidden_layers": 2}}, "does not fit its config.json"),
        ({"config": good["config"] | {"hidden_act": "relu"}}, "hidden_act='relu'"),
    ):
        (path / folder.CONFIG).write_text(json.dumps(good | change))
        with pytest.raises(UserError, match=words):
            folder.load(path)
    (path / folder.CONFIG).write_text("{")
    with pytest.raises(UserError, match="cannot be read as JSON"):
        folder.load(path)
    (path / folder.CONFIG).write_text(json.dumps(good))
    (path / folder.WEIGHTS).unlink()
    with pytest.raises(UserError, match="weights.safetensors does not exist"):
        folder.load(path)


SHARDED = """
import sys, jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from srpo_jax.weights import engine, folder
from srpo_jax.weights.files import SafetensorsFile

largest = []
read = SafetensorsFile.read

class Watched(np.ndarray):
    def __getitem__(self, index):
        part = super().__getitem__(index)
        largest.append((part.size, self.size))
        return part

SafetensorsFile.read = lambda self, name: read(self, name).view(Watched)
mesh = Mesh(np.array(jax.devices()), ("fsdp",))
split = lambda name, shape: NamedSharding(mesh, PartitionSpec(*[None] * (len(shape) - 1), "fsdp"))
params = engine.flatten(folder.load(sys.argv[1], sharding=split)[2])
source = SafetensorsFile(sys.argv[1] + "/weights.safetensors")
assert len(jax.devices()) == 4 and largest and all(part * 4 == whole for part, whole in largest)
for name, array in params.items():
    assert {s.data.shape[-1] for s in array.addressable_shards} == {array.shape[-1] // 4}, name
    assert np.array_equal(np.asarray(array), read(source, name)), name
print(len(params))
"""


def test_every_device_reads_its_slice_only(tmp_path, network):
    folder.save(tmp_path, "clip_text", CONFIG, network[1])
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", SHARDED, str(tmp_path)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert re.fullmatch(r"20\n", result.stdout)
