"""Encoding: the text encoders' numbers, going on after a kill, several devices and processes, and the command."""

import json
import shutil
import signal
import subprocess
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import children, encoders, tiny

from srpo_jax import encode, integrity, sharding
from srpo_jax.data import stored
from srpo_jax.errors import UserError
from srpo_jax.families.flux_text import FluxTextEncoders
from srpo_jax.models.compute import Compute
from srpo_jax.weights import fingerprint, folder

TEXTS = [*tiny.PROMPTS, *tiny.HELD_OUT]  # ten


def run(model, out, **changes):
    mesh = sharding.make_mesh(types.SimpleNamespace(data=1, fsdp=-1, tensor=1))
    options = dict(text_length=tiny.LENGTH, mesh=mesh, batch_size=4, shard_size=3, source="a test") | changes
    return encode.encode_prompts(model, TEXTS, out, **options)


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """The folder of ten prompts, encoded in one go."""
    out = tmp_path_factory.mktemp("data") / "whole"
    run(model, out)
    return out


def read(path):
    """(prompts, arrays [N, ...] by name) of a data set."""
    data = stored.DataSet(path)
    examples = data.read(range(len(data)))
    names = set(examples[0]) - {"prompt"}
    return [e["prompt"] for e in examples], {name: np.stack([e[name] for e in examples]) for name in names}


def shards(path):
    return {file.name: file.read_bytes() for file in path.glob("srpo-*")}


def test_features_are_those_of_the_text_encoders(model, whole):
    prompts, arrays = read(whole)
    given = FluxTextEncoders(model, Compute(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16))
    expected = encoders.features(given, TEXTS, tiny.LENGTH, batch=4)
    assert prompts == TEXTS and arrays.keys() == expected.keys()
    for name, array in expected.items():
        assert arrays[name].dtype == jnp.bfloat16 and arrays[name].tobytes() == np.asarray(array).tobytes()
    manifest = stored.read_manifest(whole)
    assert manifest.arrays["text"].shape == (tiny.LENGTH, 32) and manifest.arrays["pooled"].shape == (16,)
    assert manifest.encoders == encoders.fingerprints(model)


KILLED = """
import os, signal, sys
import test_encode
from srpo_jax.data import stored

write, count = stored.Writer.write, 0


def write_and_kill(self, prompt, arrays):
    global count
    write(self, prompt, arrays)
    count += 1
    if count == 5:
        os.kill(os.getpid(), signal.SIGKILL)  # in the middle of the second shard


stored.Writer.write = write_and_kill
test_encode.run(*sys.argv[1:])
"""


def test_a_killed_run_goes_on_where_it_stopped(model, whole, tmp_path, monkeypatch):
    words = [sys.executable, "-c", KILLED, model, tmp_path / "data"]
    child = subprocess.run([*map(str, words)], env=children.environment(), capture_output=True, text=True)
    assert child.returncode == -signal.SIGKILL, child.stderr
    left = sorted(file.name for file in (tmp_path / "data").iterdir())
    assert left == [
        ".srpo-train.array_record-00001-of-00004.partial", "encoding.json", "prompts.json",
        "srpo-train.array_record-00000-of-00004",
    ]  # fmt: skip
    with pytest.raises(UserError, match=r"not complete \(3 of 4 shards are missing\)"):
        stored.DataSet(tmp_path / "data")

    encoded = []
    write = stored.Writer.write
    monkeypatch.setattr(
        stored.Writer, "write", lambda self, prompt, arrays: (encoded.append(prompt), write(self, prompt, arrays))
    )
    run(model, tmp_path / "data")
    assert encoded == TEXTS[3:]
    assert read(tmp_path / "data")[0] == TEXTS and shards(tmp_path / "data").keys() == shards(whole).keys()
    for name, array in read(whole)[1].items():
        np.testing.assert_array_equal(read(tmp_path / "data")[1][name], array)

    # What is complete is left alone, and no encoder is loaded for it.
    monkeypatch.setattr("srpo_jax.conditions.PromptEncoder", lambda *args: pytest.fail("there is nothing to encode"))
    before = shards(tmp_path / "data")
    run(model, tmp_path / "data")
    assert shards(tmp_path / "data") == before


def test_a_folder_of_other_features_is_not_touched(model, whole):
    before = shards(whole)
    with pytest.raises(UserError, match=r"whole holds a data set that differs in the arrays \(length, size, dtype\)"):
        run(model, whole, text_length=tiny.LENGTH - 1)
    with pytest.raises(UserError, match="differs in the arrays"):
        run(model, whole, dtype="float32")
    assert shards(whole) == before


# --- several devices and processes ------------------------------------------------------------------------------------


def on_devices(model, out):
    """Child: float32, so that only the order of sums differs from one device."""
    mesh = sharding.make_mesh(types.SimpleNamespace(data=2, fsdp=2, tensor=2))
    load, largest = folder.load, []

    def recording(*args):
        config, graphdef, params = load(*args)
        kernel = params["blocks"]["mlp"]["gate"]["kernel"] if "text_encoder_2" in str(args[0]) else None
        largest.extend([] if kernel is None else [max(s.data.size for s in kernel.addressable_shards) / kernel.size])
        return config, graphdef, params

    folder.load = recording
    run(model, out, mesh=mesh, dtype="float32")
    print(json.dumps(largest))


def test_eight_devices_give_the_numbers_of_one_and_share_t5(model, tmp_path):
    assert children.call(on_devices, model, tmp_path / "8") == [1 / 4]
    run(model, tmp_path / "1", dtype="float32")
    (prompts, found), (_, expected) = read(tmp_path / "8"), read(tmp_path / "1")
    assert prompts == TEXTS
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, atol=2e-6 * np.abs(array).max())


def test_two_processes_write_what_is_missing(model, whole, tmp_path):
    """Two of four shards were lost: each process writes one."""
    out, prompts = tmp_path / "two", tmp_path / "prompts.json"
    shutil.copytree(whole, out)
    for file in (
        "dataset_info.json",
        "srpo-train.array_record-00001-of-00004",
        "srpo-train.array_record-00002-of-00004",
    ):
        (out / file).unlink()
    prompts.write_text(json.dumps(TEXTS))
    words = ["--model", model, "--prompts", prompts, "--out", out, "--text-length", tiny.LENGTH, "--batch", 4]
    words += ["--coordinator", f"127.0.0.1:{children.free_port()}", "--process-count", 2, "--process-id"]
    command = [sys.executable, "-m", "srpo_jax.encode", *map(str, words)]
    output = children.together([[*command, process] for process in (0, 1)], timeout=300)
    assert [code for code, *_ in output] == [0, 0], output
    assert f"10 prompts in {out}" in output[0][1] and "10 prompts" not in output[1][1]
    assert "loading the encoders: " in output[0][2] and "encoders" not in output[1][2]  # one of them tells
    (found, arrays), (_, expected) = read(out), read(whole)
    assert found == TEXTS
    for name, array in expected.items():
        array = array.astype(np.float32)
        np.testing.assert_allclose(arrays[name].astype(np.float32), array, atol=0.02 * np.abs(array).max())


def test_processes_that_were_given_different_prompts(model, tmp_path, monkeypatch):
    monkeypatch.setattr(encode.multihost_utils, "process_allgather", lambda own: np.array([own, own + 1]))
    with pytest.raises(UserError, match="the processes of this job differ in what they encode or by what"):
        run(model, tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_processes_are_grouped_by_what_they_hold():
    class Device:
        def __init__(self, process):
            self.process_index = process

    class Split:
        def devices_indices_map(self, shape):
            return {Device(process): (slice(*rows),) for process, rows in held}

    original = sharding.of_batch
    sharding.of_batch = lambda mesh: Split()
    try:
        held = [(0, (0, 1)), (1, (1, 2)), (2, (0, 1)), (3, (1, 2))]
        assert sharding.row_groups(None, 2) == [([0, 2], [0]), ([1, 3], [1])]
        held = [(0, (0, 2)), (1, (1, 3)), (1, (0, 1)), (0, (2, 4))]
        with pytest.raises(UserError, match="some processes share a part of their samples"):
            sharding.row_groups(None, 4)
    finally:
        sharding.of_batch = original


# --- fingerprints -----------------------------------------------------------------------------------------------------


def test_fingerprints_tell_encoders_apart(model, tmp_path):
    shutil.copytree(model, tmp_path / "copy")
    expected = encoders.fingerprints(model)
    assert encoders.fingerprints(tmp_path / "copy") == expected and len(set(expected.values())) == 4
    weights = tmp_path / "copy" / "text_encoder_2" / "weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    integrity.break_seal(weights)
    (tmp_path / "copy" / "tokenizer" / "vocab.json").write_text("{}")
    found = encoders.fingerprints(tmp_path / "copy")
    assert {part for part in found if found[part] != expected[part]} == {"text_encoder_2", "tokenizer"}


def test_fingerprints_sample_large_tensors_to_their_ends():
    places = fingerprint._places(10_000_000_000)
    assert len(places) == 1024 and places[0] == 0 and places[-1] == 10_000_000_000 - 1024
    assert max(np.diff(places)) - min(np.diff(places)) <= 1
    assert fingerprint._places(3000) == [0, 1024, 2048]


def test_parameters_without_axes_have_fingerprints(models, tmp_path):
    """CLIP's temperature is a scalar; another one is another network."""
    _, config, source = folder.open_weights(models / "clip")
    assert source.specs["logit_scale"].shape == ()
    _, _, params = folder.load(models / "clip")
    found = []
    for name, change in (("same", 0.0), ("other", 0.25)):
        folder.save(tmp_path / name, "clip", config, params | {"logit_scale": params["logit_scale"] + change})
        found.append(fingerprint.of_network(tmp_path / name))
    assert found[0] == fingerprint.of_network(models / "clip") != found[1]


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_filters_and_tells(model, tmp_path, capsys):
    prompts = tmp_path / "prompts.csv"
    prompts.write_text("prompt,n\n" + "".join(f"{text},1\n" for text in [*TEXTS, "red apple", "x"]))
    words = ["--model", model, "--prompts", prompts, "--out", tmp_path / "data", "--text-length", tiny.LENGTH]
    words += ["--min-length", 2, "--exclude", "^old", "--unique", "--sample", 4, "--column", "prompt"]
    encode.main([*map(str, words)])
    out = capsys.readouterr().out
    counts = "1 shorter than 2, 1 with /^old/, 1 repeated, 5 not drawn; 4 stay"
    assert f"prompts.csv: 12 prompts; left out: {counts}" in out and f"4 prompts in {tmp_path / 'data'}" in out
    assert counts in stored.read_manifest(tmp_path / "data").source and len(stored.DataSet(tmp_path / "data")) == 4


def test_an_interrupted_command_says_what_goes_on(model, tmp_path, monkeypatch):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(encode, "encode_prompts", interrupted)
    (tmp_path / "p.txt").write_text("a\n")
    words = ["--model", str(model), "--prompts", str(tmp_path / "p.txt"), "--out", str(tmp_path / "data")]
    with pytest.raises(UserError, match="interrupted; the same command goes on in .*data"):
        encode.main(words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--batch", "0"], "--batch=0: must be at least 1"),
        (["--column", "caption"], "no column 'caption'; there are 'prompt'"),
        (["--model", "nothing"], "nothing/transformer is not a folder"),
        (["--min-length", "9"], "no prompt is left"),
        (["--fsdp", "3"], "needs 3 devices"),
        (["--coordinator", "host:1"], "--process-id, --process-count is missing"),
    ],
)
def test_bad_flags_leave_no_folder(model, tmp_path, words, message):
    (tmp_path / "p.csv").write_text("prompt\na b\n")
    usual = ["--model", str(model), "--prompts", str(tmp_path / "p.csv"), "--out", str(tmp_path / "data")]
    with pytest.raises(UserError, match=message):
        encode.main([*usual, *words])
    assert not (tmp_path / "data").exists()
