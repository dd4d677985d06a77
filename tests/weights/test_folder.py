"""Our folders of a network: written, read, cast, refused, and read by devices slice by slice."""

import json
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.bits import BF16, same

from srpo_jax import integrity
from srpo_jax.errors import UserError
from srpo_jax.models import compute
from srpo_jax.models.clip import ClipText, ClipTextConfig
from srpo_jax.weights import folder
from srpo_jax.weights.files import SafetensorsFile

CONFIG = ClipTextConfig(
    vocab_size=64,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=3,
    num_attention_heads=2,
    max_position_embeddings=8,
    eos_token_id=63,
)


@pytest.fixture(scope="module")
def network():
    return compute.build(lambda rngs: ClipText(CONFIG, compute.Compute(), rngs=rngs))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_folder_round_trip(tmp_path, network, dtype):
    graphdef, params = network
    _, like = folder.abstract("clip_text", CONFIG, compute.Compute(param_dtype=dtype))
    assert {leaf.dtype for leaf in jax.tree.leaves(like)} == {np.dtype(dtype), np.dtype(np.float32)}  # of norms
    params = jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), params, like)
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
    assert sorted(os.listdir(tmp_path)) == [integrity.BESIDE, folder.CONFIG, folder.WEIGHTS]


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
