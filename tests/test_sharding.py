"""The mesh, the table of rules, and the update on several devices."""

import dataclasses
import functools
import json
import os
import pathlib
import re
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tiny
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from srpo_jax import checkpoint, conditions, optim, program, sharding
from srpo_jax.algorithm import step
from srpo_jax.config import default
from srpo_jax.costs import hlo
from srpo_jax.data.loading import Examples
from srpo_jax.errors import UserError
from srpo_jax.models import lora
from srpo_jax.models.autoencoder import AutoencoderConfig
from srpo_jax.models.clip import VIT_H_14, ClipTextConfig
from srpo_jax.models.compute import Compute, join
from srpo_jax.models.flux import FluxConfig
from srpo_jax.models.t5 import T5Config
from srpo_jax.weights import engine, folder, formats

FLUX_DEV = FluxConfig(
    in_channels=64, out_channels=64, num_layers=19, num_single_layers=38, attention_head_dim=128,
    num_attention_heads=24, joint_attention_dim=4096, pooled_projection_dim=768, guidance_embeds=True,
    axes_dims_rope=(16, 56, 56),
)  # fmt: skip
FULL_SIZE = {
    "flux": FLUX_DEV,
    "autoencoder": AutoencoderConfig(),
    "clip": VIT_H_14,
    "clip_text": ClipTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12),
    "t5": T5Config.from_dict(formats.T5_XXL),
}


@functools.cache
def parameters(network):
    return folder.abstract(network, FULL_SIZE[network])[1]


def quantised_with_factors():
    """FLUX.1-dev's parameters under LoRA on every layer."""
    return lora.abstract(FLUX_DEV, Compute(), lora.Lora(16, 16.0, (".*",), "nf4"))[1]


class Sizes:
    def __init__(self, data, fsdp, tensor):
        self.data, self.fsdp, self.tensor = data, fsdp, tensor


# --- the table --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", FULL_SIZE)
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 8, 1), (1, 16, 4), (1, 64, 1), (1, 256, 1)])
def test_every_parameter_of_full_size_has_its_place(network, shape):
    """A v5e pod's 256 devices divide everything; what stays whole on every device is small."""
    mesh = AbstractMesh(shape, sharding.AXES)
    params = parameters(network)
    places = engine.flatten(sharding.of_tree(mesh, network, params))
    whole = sum(leaf.size for name, leaf in engine.flatten(params).items() if places[name].spec == P())
    total = sum(leaf.size for leaf in jax.tree.leaves(params))
    if network != "autoencoder":
        assert whole < 0.005 * total


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 8, 1), (1, 16, 4), (1, 64, 1)])
def test_every_factor_and_code_of_full_size_has_its_place(shape):
    """What stays whole on every device beside 4-bit weights: the scales, and factors along the rank."""
    mesh = AbstractMesh(shape, sharding.AXES)
    params = quantised_with_factors()
    places = engine.flatten(sharding.of_tree(mesh, "flux", params))
    for name, leaf in engine.flatten(params).items():
        if name.endswith((".codes", ".lora_a", ".lora_b")) and mesh.shape["tensor"] > 1:
            assert places[name].shard_shape(leaf.shape) != leaf.shape, name


def test_every_rule_is_used():
    """By the first rule that matches, as always: a rule that an earlier one hides would be a mistake."""
    names = [f"{network}.{path}" for network in FULL_SIZE for path in engine.flatten(parameters(network))]
    names += [f"flux.{path}" for path in engine.flatten(quantised_with_factors())]
    patterns = [pattern for pattern, _ in sharding.RULES]
    used = {next(pattern for pattern in patterns if sharding.matches(pattern, name)) for name in names}
    assert used == set(patterns)


def test_a_parameter_without_a_rule():
    with pytest.raises(ValueError, match="flux.new.kernel"):
        sharding.spec("flux.new.kernel")


def test_an_indivisible_dimension_names_the_parameter():
    place = sharding.of(AbstractMesh((1, 7, 5), sharding.AXES), "flux")
    message = r"config\.mesh\.fsdp=7 does not divide the dimension 3072 of flux\.double_blocks\.img_mod\.kernel"
    with pytest.raises(UserError, match=message):
        place("double_blocks.img_mod.kernel", (19, 3072, 18432))
    with pytest.raises(UserError, match=r"config\.mesh\.tensor=5 does not divide the dimension 24"):
        place("double_blocks.img_attn.qkv.bias", (19, 3, 24, 128))


@pytest.mark.parametrize(
    ("weights", "moments", "each"),
    [("float32", "float32", 12), ("bfloat16", "bfloat16", 6), ("bfloat16", "float8", 4 + 2 * 4 / 128)],
)
def test_the_optimizer_of_full_size(weights, moments, each):
    """Bytes of weights and moments a parameter; moments lie where their parameters lie, and so do their scales."""
    config = default().optim
    config.weights, config.moments = weights, moments
    mesh, params = AbstractMesh((1, 8, 2), sharding.AXES), parameters("flux")
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, weights), params)
    places = sharding.of_tree(mesh, "flux", params)
    optimizer = optim.make_optimizer(config)
    abstract = jax.eval_shape(optimizer.init, params)
    found = sharding.of_optimizer(mesh, optimizer, params, places)
    wanted = engine.flatten(places)
    for moment, where in ((abstract.mean, found.mean), (abstract.root, found.root)):
        assert engine.flatten(where.values) == wanted
        kinds = {leaf.dtype for leaf in jax.tree.leaves(moment.values)}
        assert kinds == {jnp.dtype(optim.FLOAT8 if moments == "float8" else moments)}
    bytes_of = [leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((params, abstract))]
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert sum(bytes_of) / count == pytest.approx(each, rel=1e-3)
    if moments == "float8":
        scales = engine.flatten(found.root.scale)
        whole = [name for name in scales if scales[name].spec != wanted[name].spec and wanted[name].spec != P()]
        assert whole == []


# --- the update on eight devices --------------------------------------------------------------------------------------

MESHES = {"one": (1, 1, 1), "fsdp": (1, 8, 1), "all": (2, 2, 2)}


def run(command, *words):
    """A function of this file in a process with eight virtual devices."""
    tests = pathlib.Path(__file__).parent
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    child = subprocess.run(
        [sys.executable, "-c", f"import sys, test_sharding; test_sharding.{command}(*sys.argv[1:])", *map(str, words)],
        env=os.environ | {"PYTHONPATH": f"{tests}:{tests.parent}", "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout.splitlines()[-1])


def update_on_every_mesh(models, out):
    """Child: one update on every mesh from the same weights and prompts; the states are saved."""
    report = {}
    for name, shape in MESHES.items():
        config = tiny.config(
            pathlib.Path(models), data__batch_size=16, optim__accumulation=2, optim__ema_decay=0.5,
            rollout__noise="shared", mesh__data=shape[0], mesh__fsdp=shape[1], mesh__tensor=shape[2],
        )  # fmt: skip
        mesh = sharding.make_mesh(config.mesh, jax.devices()[: int(np.prod(shape))])
        architecture = program.read_architecture(config)
        built = program.build(config, mesh, architecture)
        encode = conditions.text_encoders(config, built, architecture)
        prompts = [tiny.PROMPTS[i % 7] for i in sharding.local_rows(mesh, 16)]
        batch = conditions.Conditioner(config, built, architecture, encode).batch(Examples(prompts, {}), 1)
        state, frozen = program.initial_state(config, built), program.load_frozen(config, built)
        # Before the update, which takes the state's memory; its second step runs one block of each kind.
        recipe = dataclasses.replace(built.settings, cache=2, cache_ends=(1, 1))
        noise = jax.device_put(step.draw(recipe, jax.random.key(0), 16).noise, sharding.of_batch(mesh))
        cached = jax.jit(functools.partial(step.rollout, built.networks, recipe))(state.params, batch, noise)
        compiled = built.lower().compile()
        state, metrics = compiled(state, frozen, batch)
        report[name] = {key: float(value) for key, value in metrics.items()}
        report[name]["cached_rollout"] = float(np.vdot(cached, np.sin(np.arange(cached.size))))
        for leaf, like in zip(jax.tree.leaves(state), jax.tree.leaves(built.state), strict=True):
            assert leaf.sharding.is_equivalent_to(like.sharding, leaf.ndim)
        qkv = state.opt_state.mean.values["double_blocks"]["img_attn"]["qkv"]["kernel"]
        report[name]["largest_shard_of_qkv"] = max(s.data.size for s in qkv.addressable_shards) / qkv.size
        checkpoints = checkpoint.Checkpoints(pathlib.Path(out) / name, keep=1)
        checkpoints.save(1, state, {})
        checkpoints.close()
    print(json.dumps(report))


def lora_on_every_mesh(models):
    """Child: quantised weights, and two updates of factors beside them, on one device and on eight."""
    weights, states, losses = [], [], []
    for shape in (MESHES["one"], MESHES["all"]):
        config = tiny.config(
            pathlib.Path(models), data__batch_size=8, lora__rank=2, lora__quantize="int8", optim__eps=1.0,
            optim__learning_rate=10.0, mesh__data=shape[0], mesh__fsdp=shape[1], mesh__tensor=shape[2],
        )  # fmt: skip
        mesh = sharding.make_mesh(config.mesh, jax.devices()[: int(np.prod(shape))])
        architecture = program.read_architecture(config)
        built = program.build(config, mesh, architecture)
        encode = conditions.text_encoders(config, built, architecture)
        conditioner = conditions.Conditioner(config, built, architecture, encode)
        prompts = [tiny.PROMPTS[i % 7] for i in sharding.local_rows(mesh, 8)]
        state, frozen = program.initial_state(config, built), program.load_frozen(config, built)
        path = pathlib.Path(models) / "pipeline" / "transformer"
        four_bits = program.load_transformer(path, built.computes.transformer, mesh, "nf4")
        for leaf, like in zip(jax.tree.leaves(frozen.base), jax.tree.leaves(built.frozen.base), strict=True):
            assert leaf.sharding.is_equivalent_to(like.sharding, leaf.ndim) and leaf.dtype == like.dtype
        weights.append(jax.device_get((state.params, frozen.base, four_bits)))
        compiled = built.lower().compile()
        for number in (1, 2):
            state, metrics = compiled(state, frozen, conditioner.batch(Examples(prompts, {}), number))
            losses.append(float(metrics["loss"]))
        states.append(jax.device_get(state.params))
    same = jax.tree.map(lambda a, b: a.tobytes() == b.tobytes(), *weights)
    before, after = engine.flatten(weights[0][0]), [engine.flatten(state) for state in states]
    moved = {name: [np.asarray(state[name] - before[name]) for state in after] for name in before}
    distances = {n: float(np.linalg.norm(one - all_) / np.linalg.norm(one)) for n, (one, all_) in moved.items()}
    print(json.dumps({"same": all(jax.tree.leaves(same)), "distances": distances, "losses": losses}))


def move_between_meshes(models, out):
    """Child: every checkpoint restored onto another mesh is the same, bit for bit."""
    names, different = list(MESHES), []
    for name, other in zip(names, names[1:] + names[:1], strict=True):
        data, fsdp, tensor = MESHES[other]
        config = tiny.config(
            pathlib.Path(models), data__batch_size=16, optim__accumulation=2, optim__ema_decay=0.5,
            mesh__data=data, mesh__fsdp=fsdp, mesh__tensor=tensor,
        )  # fmt: skip
        mesh = sharding.make_mesh(config.mesh, jax.devices()[: data * fsdp * tensor])
        built = program.build(config, mesh, program.read_architecture(config))
        checkpoints = checkpoint.Checkpoints(pathlib.Path(out) / name, keep=1)
        state, _ = checkpoints.restore(1, built.state)
        checkpoints.close()
        for kind, tree in (("params", state.params), ("ema", state.ema)):
            stored = checkpoint.load_params(pathlib.Path(out) / name, 1, ema=kind == "ema")
            for path, leaf in engine.flatten(stored).items():
                if np.asarray(leaf).tobytes() != np.asarray(engine.flatten(tree)[path]).tobytes():
                    different.append(f"{name} -> {other}: {kind} {path}")
    print(json.dumps(different))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return tiny.write_all(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def updated(models, tmp_path_factory):
    """(metrics by mesh, folder with a workdir by mesh) after one update."""
    out = tmp_path_factory.mktemp("meshes")
    return run("update_on_every_mesh", models, out), out


@pytest.mark.parametrize("name", list(MESHES)[1:])
def test_every_mesh_gives_the_numbers_of_one_device(updated, name):
    report, out = updated
    numbers, expected = dict(report[name]), dict(report["one"])
    data, fsdp, tensor = MESHES[name]
    assert numbers.pop("largest_shard_of_qkv") == 1 / (fsdp * tensor) and expected.pop("largest_shard_of_qkv") == 1
    assert numbers == pytest.approx(expected, rel=2e-4, abs=1e-6)
    # Adam's first moment is a tenth of the clipped gradient: what there is to compare before signs are taken.
    moments = [moment(out / which) for which in (name, "one")]
    assert moments[0].keys() == moments[1].keys() and len(moments[0]) > 30
    for path, value in moments[1].items():
        distance = np.linalg.norm(moments[0][path] - value) / np.linalg.norm(value)
        assert distance < 1e-4, path
    everything = [np.concatenate([m[path].ravel() for path in sorted(m)]) for m in moments]
    assert np.linalg.norm(everything[0] - everything[1]) / np.linalg.norm(everything[1]) < 2e-5


def moment(workdir):
    """The first moments of the checkpoint of step 1, by path."""
    stored = tiny.read_arrays(workdir / "checkpoints" / "1" / "opt_state")
    return {path: leaf for path, leaf in stored.items() if "['mean']" in path}


def test_factors_beside_quantised_weights_on_eight_devices(models):
    """Both start bit for bit the same, and move alike."""
    report = run("lora_on_every_mesh", models)
    assert report["same"]
    assert report["losses"][:2] == pytest.approx(report["losses"][2:], rel=1e-5)
    assert len(report["distances"]) == 22
    assert max(report["distances"].values()) < 1e-3


def gather_for_rollouts(models):
    """Child: the latents of a rollout of 5 steps, in two parts, and the bytes that it gathers, without and with
    ``rollout.gather``; the same in 8 bits, and beside a quantised base."""
    report = []
    eight_bits, base = {"rollout__dtype": "int8"}, {"lora__rank": 4, "lora__quantize": "int8"}
    for gather, more in ((False, {}), (True, {}), (False, eight_bits), (True, eight_bits), (False, base), (True, base)):
        config = tiny.config(
            pathlib.Path(models), data__batch_size=16, rollout__steps=5, rollout__gather=gather, mesh__data=2,
            optim__accumulation=2, **more,
        )  # fmt: skip
        mesh = sharding.make_mesh(config.mesh)
        built = program.build(config, mesh, program.read_architecture(config))
        rng = np.random.default_rng(0)
        batch = jax.tree.map(
            lambda leaf, rng=rng: jax.device_put(rng.normal(size=leaf.shape).astype(leaf.dtype), leaf.sharding),
            built.batch,
        )
        noise = rng.normal(size=(16, built.settings.tokens, 64)).astype(np.float32)
        noise = jax.device_put(noise, sharding.of_batch(mesh))
        roll = jax.jit(functools.partial(step.rollout, built.networks, built.settings))
        params = join(program.initial_state(config, built).params, program.load_frozen(config, built).base)
        compiled = roll.lower(params, batch, noise).compile()
        found = hlo.collectives(compiled.as_text(), 8).found
        moved = sum(one.traffic * one.runs for one in found if one.kind == "all-gather")
        report.append({"gathered": moved, "latents": np.asarray(compiled(params, batch, noise)).ravel().tolist()})
        report[-1]["bytes"] = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
        gathered = re.findall(r"= \w+\[([\d,]+)\]\S* all-gather(?:-start)?\(", compiled.as_text())
        report[-1]["shapes"] = sorted(
            {tuple(int(size) for size in sizes.split(",") if size != "1") for sizes in gathered}
        )
    print(json.dumps(report))


def test_weights_gathered_once_for_a_rollout(models):
    found = run("gather_for_rollouts", models)
    each_step, once, eight_bits, eight_bits_once, base, base_once = found
    # Kernels of the blocks travel, those of modulations do not.
    width = tiny.FLUX.width
    assert [width, 4 * width] in each_step["shapes"]
    for report in found:
        assert not any(size in (3 * width, 6 * width) for shape in report["shapes"] for size in shape[1:]), report
    np.testing.assert_allclose(once["latents"], each_step["latents"], rtol=1e-3, atol=1e-4)
    # Three quarters of the weights come from the three other devices along "fsdp".
    assert once["gathered"] < 0.8 * once["bytes"] and each_step["gathered"] > 4 * once["gathered"]
    # Here and there a sum in another order rounds to the next of 255 numbers.
    first, second = (np.array(report["latents"]) for report in (eight_bits_once, eight_bits))
    assert np.linalg.norm(first - second) < 2e-3 * np.linalg.norm(second)
    # Kernels of blocks come in a byte, not four; the rest as it is.
    assert eight_bits_once["gathered"] < 0.6 * once["gathered"]
    np.testing.assert_allclose(base_once["latents"], base["latents"], rtol=1e-3, atol=1e-4)
    assert base_once["gathered"] < 0.8 * base_once["bytes"]


def load_onto_eight(path):
    """Child: what this process's own memory grows by at most while a transformer is loaded (pages of the file, which
    the system takes back when it likes, are not its own), and the largest device's part."""

    def own():
        status = pathlib.Path("/proc/self/status").read_text()
        return int(next(line.split()[1] for line in status.splitlines() if line.startswith("RssAnon"))) * 1024

    def watch():
        while not loaded.wait(0.002):
            seen.append(own())

    mesh = sharding.make_mesh(Sizes(1, 8, 1))
    jax.block_until_ready(jax.device_put(np.ones(8), sharding.of_batch(mesh)))
    before, seen, loaded = own(), [], threading.Event()
    watcher = threading.Thread(target=watch)
    watcher.start()
    _, _, params = folder.load(path, "flux", sharding=sharding.of(mesh, "flux"))
    leaves = jax.block_until_ready(jax.tree.leaves(params))
    loaded.set()
    watcher.join()
    parts = [sum(leaf.addressable_shards[device].data.nbytes for leaf in leaves) for device in range(8)]
    largest = max(leaf.nbytes for leaf in leaves)
    growth = max([*seen, own()]) - before
    print(json.dumps({"growth": growth, "bytes": sum(leaf.nbytes for leaf in leaves), "part": max(parts),
                      "largest": largest}))  # fmt: skip


@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="memory is measured as Linux reports it")
def test_loading_takes_the_memory_of_the_shards(tmp_path):
    """All eight devices are this process: their shards are one copy of the weights. Nobody holds another one.

    LOADING_BLOCKS=35 measures it with a billion parameters.
    """
    blocks = int(os.environ.get("LOADING_BLOCKS", 2))
    config = dataclasses.replace(FLUX_DEV, num_layers=1, num_single_layers=blocks, num_attention_heads=12)
    rng = np.random.default_rng(0)
    params = folder.abstract("flux", config)[1]
    params = jax.tree.map(lambda leaf: np.broadcast_to(rng.normal(size=leaf.shape[-1]), leaf.shape), params)
    folder.save(tmp_path, "flux", config, params, np.float32)
    found = run("load_onto_eight", tmp_path)
    print(found)
    assert found["bytes"] == sum(leaf.size * 4 for leaf in jax.tree.leaves(params))
    assert found["part"] < 1.05 * found["bytes"] / 8
    assert found["growth"] < 1.05 * found["bytes"] + found["largest"]


def test_checkpoints_move_between_meshes(models, updated):
    assert run("move_between_meshes", models, updated[1]) == []


def test_a_batch_that_the_mesh_does_not_divide(models):
    config = tiny.config(models, data__batch_size=6, optim__accumulation=2)
    with pytest.raises(UserError, match=r"= 3 must be a multiple of the 8 devices"):
        program.build(config, AbstractMesh((2, 4, 1), sharding.AXES), program.read_architecture(config))


def test_blocks_that_the_transformer_lacks(models):
    config = tiny.config(models, rollout__cache=2, rollout__cache_ends=(1, 3))
    with pytest.raises(UserError, match=r"cache_ends=\(1, 3\): this transformer has 1 double and 2 single blocks"):
        program.build(config, sharding.make_mesh(config.mesh), program.read_architecture(config))
