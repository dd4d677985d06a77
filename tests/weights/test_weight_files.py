"""Files of weights: safetensors, read and written, and what others keep theirs in."""

import json
import os
import pathlib
import socket
import sys

import numpy as np
import pytest
import safetensors.numpy
from helpers.bits import BF16, random, same

from srpo_jax.errors import UserError
from srpo_jax.weights import files, sources
from srpo_jax.weights.files import SafetensorsFile, SafetensorsWriter, Spec, new_folder

# --- safetensors files ---


def test_reads_what_the_safetensors_package_writes_and_the_reverse(tmp_path):
    arrays = {
        "b": random((3, 5), BF16),
        "f": random((2, 3, 4), np.float32),
        "half": random((3,), np.float16),
        "ids": np.arange(4),
        "scalar": np.full((), 2.5, np.float32),
        "empty": np.zeros((0, 3), np.float32),
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


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        ("exception", "^$"),
        ("interrupt", "^$"),
        ("forgotten", "not written completely: b"),
        ("shape", r"a: got \(3, 2\)"),
    ],
)
def test_nothing_is_left_of_a_file_that_was_not_finished(tmp_path, failure, message):
    path = tmp_path / "w.safetensors"
    path.write_bytes(b"earlier")
    expected = {"exception": RuntimeError, "interrupt": KeyboardInterrupt}.get(failure, ValueError)
    specs = {"a": Spec((2, 3), np.dtype(np.float32)), "b": Spec((2,), np.dtype(np.float32))}
    with pytest.raises(expected, match=message), SafetensorsWriter(path, specs) as out:
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


@pytest.mark.parametrize("way", ["itself", "a link", "a fresh disk"])
def test_an_empty_folder_is_filled_from_within(tmp_path, way, capsys):
    """As a mount point has to be, which cannot be replaced, and whose disk is another one than its parent's."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    if way == "a fresh disk":
        (tmp_path / "disk" / "lost+found").mkdir()
    (tmp_path / "disk" / f".disk.{socket.gethostname()}-999999999.abc.partial").mkdir()  # a killed process's
    before = os.stat(tmp_path / "disk").st_ino
    target = tmp_path / ("link" if way == "a link" else "disk")
    with pytest.raises(RuntimeError), new_folder(target) as out:
        assert out.parent == tmp_path / "disk"
        (out / "vae").mkdir()
        raise RuntimeError
    with new_folder(target) as out:
        (out / "vae").mkdir()
        (out / "vae" / "file").write_text("whole")
    assert sorted(os.listdir(tmp_path / "disk")) == [*(["lost+found"] if way == "a fresh disk" else []), "vae"]
    assert os.stat(tmp_path / "disk").st_ino == before and (target / "vae" / "file").read_text() == "whole"
    assert "which a process that was killed has left" in capsys.readouterr().err
    with pytest.raises(UserError, match="exists already; choose another target$"), new_folder(target):
        pass


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


def some_tensors(dtype=np.float32):
    return {name: random(shape, dtype) for name, shape in {"a": (7, 5), "b.0": (4,), "b.1": (4,)}.items()}


def write_shards(place, tensors, stem="model"):
    names = list(tensors)
    parts = {f"{stem}-1.safetensors": names[::2], f"{stem}-2.safetensors": names[1::2]}
    for file, part in parts.items():
        safetensors.numpy.save_file({name: tensors[name] for name in part}, place / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (place / f"{stem}.safetensors.index.json").write_text(json.dumps(index))
    return index


def test_sharded_source(tmp_path):
    tensors = some_tensors(BF16)
    write_shards(tmp_path, tensors)
    for path in (tmp_path, tmp_path / "model.safetensors.index.json"):
        source = sources.open_source(path)
        assert source.specs.keys() == tensors.keys()
        assert all(same(source.read(name), tensors[name]) for name in tensors)


def test_sharded_source_that_disagrees_with_its_index(tmp_path):
    index = write_shards(tmp_path, some_tensors())
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
