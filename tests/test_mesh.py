"""The mesh: sizes that fit, several TPU slices, and attention heads that its axis "tensor" does not divide."""

import dataclasses
import functools
import json
import os
import pathlib
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
from helpers import tiny
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from srpo_jax import architectures, conditions, generate, program, sharding
from srpo_jax.algorithm import preference
from srpo_jax.data.loading import Examples
from srpo_jax.errors import UserError
from srpo_jax.models import clip
from srpo_jax.weights import folder

# --- sizes ------------------------------------------------------------------------------------------------------------


def sizes(data, fsdp, tensor):
    return types.SimpleNamespace(data=data, fsdp=fsdp, tensor=tensor)


@pytest.mark.parametrize(
    "shape, message",
    [
        ((0, -1, 1), "data=0, fsdp=-1, tensor=1: each must be at least 1, or -1 for the rest"),
        ((1, 0, 1), "fsdp=0, tensor=1: each must be at least 1"),
        ((1, 1, -2), "tensor=-2: each must be at least 1"),
        ((-1, -1, 1), "data=-1, fsdp=-1, tensor=1: only one of them can be -1"),
        ((-1, 1, -1), "only one of them can be -1"),
        ((2, -1, 1), "2 does not divide them"),
        ((1, 2, 1), "data=1, fsdp=2, tensor=1 needs 2 devices, here are 1; -1 takes the rest"),
    ],
)
def test_sizes_that_do_not_fit(shape, message):
    with pytest.raises(UserError, match=message):
        sharding.make_mesh(sizes(*shape), jax.devices()[:1])


def test_commands_with_flags_of_their_own_say_so_too(tmp_path):
    words = ["--model=none", "--prompt=a", f"--out={tmp_path}"]
    with pytest.raises(UserError, match="^--data=0: must be at least 1"):
        generate.main([*words, "--data=0"])
    with pytest.raises(UserError, match="^mesh: data=-1, .* only one"):
        generate.main([*words, "--data=-1"])


# --- slices -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Chip:
    """A TPU that is not there: what JAX and the mesh ask of one."""

    id: int
    slice_index: int
    coords: tuple[int, int, int]
    platform: str = "tpu"
    device_kind: str = "TPU v5 lite"
    core_on_chip: int = 0
    process_index: int = 0


def chips(slices, side=4):
    """Slices of ``side`` x ``side`` chips, mixed, as the processes of a job may name them."""
    coords = [(i, j, 0) for j in range(side) for i in range(side)]
    found = [Chip(100 * s + n, s, at) for n, at in enumerate(coords) for s in range(slices)]
    return found


@pytest.mark.parametrize(
    "count, asked, shape",
    [
        (1, (1, -1, 1), (1, 16, 1)),
        (2, (2, -1, 1), (2, 16, 1)),
        (2, (-1, 16, 1), (2, 16, 1)),
        (2, (4, 2, 4), (4, 2, 4)),
        (4, (4, 8, 2), (4, 8, 2)),
    ],
)
def test_a_mesh_goes_from_slice_to_slice_along_data(count, asked, shape):
    mesh = sharding.make_mesh(sizes(*asked), chips(count))
    assert tuple(mesh.shape[axis] for axis in sharding.AXES) == shape
    assert len({device.id for device in mesh.devices.flat}) == 16 * count
    index = np.vectorize(lambda device: device.slice_index)(mesh.devices)
    # One slice along fsdp and tensor; slices follow each other along data.
    assert all(len(np.unique(row)) == 1 for row in index)
    assert [row.flat[0] for row in index] == sorted(list(range(count)) * (shape[0] // count))


def test_a_single_slice_without_a_number():
    """As libtpu 0.0.42 describes one."""
    found = [Unnumbered(**{k: v for k, v in vars(chip).items() if k != "slice_index"}) for chip in chips(1)]
    mesh = sharding.make_mesh(sizes(1, -1, 2), found)
    assert mesh.shape == {"data": 1, "fsdp": 8, "tensor": 2}


@dataclasses.dataclass(frozen=True)
class Unnumbered:
    """As ``Chip``, without ``slice_index``."""

    id: int
    coords: tuple[int, int, int]
    platform: str
    device_kind: str
    core_on_chip: int
    process_index: int


@pytest.mark.parametrize("asked", [(1, -1, 1), (3, -1, 1), (1, 36, 2)])
def test_other_axes_do_not_leave_a_slice(asked):
    with pytest.raises(UserError, match="the devices are 2 slices, .* set data to 2 or a multiple"):
        sharding.make_mesh(sizes(*asked), chips(2, side=6))


def test_gpus_of_several_hosts_are_no_slices():
    """JAX gives them slice_index by host; weights may be split over all of them, host after host."""
    gpus = [Chip(n, n // 8, (0, 0, 0), "gpu", "NVIDIA H200") for n in range(16)]
    mesh = sharding.make_mesh(sizes(1, -1, 2), gpus[::-1])
    assert [device.id for device in mesh.devices.flat] == list(range(16))


# --- heads ------------------------------------------------------------------------------------------------------------


def test_what_tensor_does_not_divide_stays_whole():
    """CLIP-L's 12 heads beside FLUX's 24; of the transformer, and of other layers, what does not fit is refused."""
    mesh = AbstractMesh((1, 2, 8), sharding.AXES)
    place = sharding.of(mesh, "clip_text")
    # 768 columns are 96 for each of eight, 770 none.
    assert place("text.blocks.attn.q.kernel", (12, 768, 768)).spec == P(None, "fsdp", "tensor")
    assert place("text.blocks.attn.q.kernel", (12, 770, 770)).spec == P(None, "fsdp", None)
    assert place("text.blocks.attn.v.bias", (12, 770)).spec == P(None, None)
    assert place("text.blocks.attn.proj.kernel", (12, 770, 770)).spec == P(None, None, "fsdp")
    with pytest.raises(UserError, match="mesh.fsdp=2 does not divide the dimension 769"):
        place("text.blocks.attn.q.kernel", (12, 769, 768))
    with pytest.raises(UserError, match="mesh.tensor=8 does not divide the dimension 3076"):
        place("text.blocks.mlp.in_layer.kernel", (12, 768, 3076))
    with pytest.raises(UserError, match="mesh.tensor=8 does not divide the dimension 12 of flux"):
        sharding.of(mesh, "flux")("single_blocks.qkv.kernel", (38, 1536, 3, 12, 128))


def encode_with_odd_heads(models):
    """Child: what text encoders and a reward make of a batch, and a reward's gradient, on one device and on eight along
    whose axis "tensor" two and three heads lie."""
    report = []
    for data, fsdp, tensor in ((1, 1, 1), (1, 2, 4)):
        config = tiny.config(
            pathlib.Path(models), data__batch_size=4, mesh__data=data, mesh__fsdp=fsdp, mesh__tensor=tensor
        )
        mesh = sharding.make_mesh(config.mesh, jax.devices()[: data * fsdp * tensor])
        architecture = architectures.read(config)
        built = program.build(config, mesh, architecture)
        encode = conditions.prompt_encoder(config, built, architecture)
        prompts = [tiny.PROMPTS[i] for i in sharding.local_rows(mesh, 4)]
        batch = conditions.Conditioner(config, built, encode).batch(Examples(prompts, {}), 1)
        frozen, names = program.load_frozen(config, built), built.networks.rewards
        prepared = jax.jit(functools.partial(preference.prepare, names))(frozen.rewards, batch.reward_tokens)
        pictures = np.random.default_rng(0).uniform(size=(4, 32, 48, 3)).astype(np.float32)

        def total(images, frozen=frozen, prepared=prepared, names=names):
            seen = preference.look(names, frozen.rewards, images)
            return preference.mixture(names, frozen.rewards, seen, prepared, preference.plain(4)).sum()

        slope = jax.jit(jax.grad(total))(jax.device_put(pictures, sharding.of_batch(mesh)))
        found = *batch.condition.values(), prepared["clip"]["positive"], slope
        report.append([np.ravel(np.asarray(values)).tolist() for values in found])
    print(json.dumps(report))


def test_heads_that_tensor_does_not_divide(tmp_path):
    """FLUX has 4 heads, its CLIP 2, the reward 3, whose width of 30 the axis does not divide either."""
    models = tiny.write_all(tmp_path)
    text = dataclasses.replace(
        folder.read_config(models / "clip", "clip")[1].text_config, hidden_size=30, num_attention_heads=3
    )
    vision = clip.ClipVisionConfig(30, 32, 1, 3, 32, 16, "gelu")
    tiny.save_random(models / "clip", "clip", clip.ClipConfig(text, vision, projection_dim=16), 5)
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    tests = pathlib.Path(__file__).parent
    child = subprocess.run(
        [sys.executable, "-c", "import sys, test_mesh; test_mesh.encode_with_odd_heads(sys.argv[1])", str(models)],
        env=os.environ | {"PYTHONPATH": f"{tests}:{tests.parent}", "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stderr
    one, eight = json.loads(child.stdout.splitlines()[-1])
    for alone, split in zip(one, eight, strict=True):
        assert np.std(alone) > 0
        np.testing.assert_allclose(split, alone, rtol=1e-4, atol=1e-5 * np.max(np.abs(alone)))
