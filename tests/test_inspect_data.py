"""The description of a data set: what it says is what is there."""

import re
import shutil
import types

import pytest
from helpers import tiny

from srpo_jax import encode, inspect_data, sharding
from srpo_jax.data import stored
from srpo_jax.errors import UserError
from srpo_jax.weights import folder

TEXTS = [*tiny.PROMPTS, "red apple red apple red apple red apple"]


@pytest.fixture(scope="module")
def data(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "set"
    mesh = sharding.make_mesh(types.SimpleNamespace(data=1, fsdp=-1, tensor=1))
    options = dict(text_length=4, dtype="float32", shard_size=3, source="p.txt: 8 prompts")
    encode.encode_prompts(model, TEXTS, path, mesh=mesh, **options)
    return path


def test_a_complete_data_set(data, capsys):
    inspect_data.main([str(data), "--show", "3"])
    out = capsys.readouterr().out
    assert f"{data}: 8 examples, complete\n3 shards, " in out and "from p.txt: 8 prompts\n" in out
    assert re.search(r"text +float32 \[4, 32\], 512 B\n +pooled +float32 \[16\], 64 B\n", out)
    assert len(re.findall(r"  (?:tokenizer|tokenizer_2|text_encoder|text_encoder_2) +\w{16}  the same\n", out)) == 4
    lengths = sorted(map(len, TEXTS))
    assert re.search(rf"characters +{lengths[0]} +{(lengths[3] + lengths[4]) / 2:.0f} +\d+ +{lengths[-1]}\n", out)
    assert re.search(r"T5 tokens .* 1 are longer than 4: cut\n", out)
    assert "0 prompts are repeated" in out and re.search(r"8 records in random order are read at \d+/s", out)
    shown = re.findall(r"^ +(\d+)  (.*)$", out.partition("some prompts\n")[2], re.MULTILINE)
    assert len(shown) == 3 and all(TEXTS[int(place)] == prompt for place, prompt in shown)


def test_other_encoders_and_missing_shards(data, model, tmp_path, capsys):
    stored.shard_file(data, stored.read_manifest(data), 1).unlink()
    other = shutil.copytree(model, tmp_path / "model")
    _, config = folder.read_config(other / "text_encoder")
    tiny.save_random(other / "text_encoder", "clip_text", config, 77)
    inspect_data.main([str(data), "--model", str(other)])
    out = capsys.readouterr().out
    assert "8 examples, NOT COMPLETE: 1 of 3 shards are missing\n2 shards, " in out and "records" not in out
    assert re.findall(r"(\w+) +\w{16}  OTHER: \w{16}", out) == ["text_encoder"]


def test_what_is_no_data_set(tmp_path):
    with pytest.raises(UserError, match="encoding.json does not exist"):
        inspect_data.main([str(tmp_path)])
