"""The update, rollouts, loading and checkpoints on eight virtual devices, against one."""

import dataclasses
import functools
import json
import os
import pathlib
import re
import threading
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from helpers import children, tiny

from srpo_jax import architectures, checkpoint, conditions, program, sharding, stored_weights
from srpo_jax.algorithm import step
from srpo_jax.algorithm.rollout import rollout
from srpo_jax.costs import hlo
from srpo_jax.data.loading import Examples
from srpo_jax.families.flux import DEV
from srpo_jax.models.compute import join
from srpo_jax.weights import engine, folder

MESHES = {"one": (1, 1, 1), "fsdp": (1, 8, 1), "all": (2, 2, 2)}


def update_on_every_mesh(models, out):
    """Child: one update on every mesh from the same weights and prompts; the states are saved."""
    report = {}
    for name, shape in MESHES.items():
        config = tiny.config(
            pathlib.Path(models), data__batch_size=16, optim__accumulation=2, optim__ema_decay=0.5,
            rollout__noise="shared", mesh__data=shape[0], mesh__fsdp=shape[1], mesh__tensor=shape[2],
        )  # fmt: skip
        mesh = sharding.make_mesh(config.mesh, jax.devices()[: int(np.prod(shape))])
        architecture = architectures.read(config)
        built = program.build(config, mesh, architecture)
        encode = conditions.prompt_encoder(config, built, architecture)
        prompts = [tiny.PROMPTS[i % 7] for i in sharding.local_rows(mesh, 16)]
        batch = conditions.Conditioner(config, built, encode).batch(Examples(prompts, {}), 1)
        state, frozen = program.initial_state(config, built), program.load_frozen(config, built)
        # Before the update, which takes the state's memory; its second step runs one block of each kind.
        recipe = dataclasses.replace(built.settings, cache=2, cache_ends=(1, 1))
        noise = jax.device_put(step.draw(built.networks, recipe, jax.random.key(0), 16).noise, sharding.of_batch(mesh))
        cached = jax.jit(functools.partial(rollout, built.networks, recipe))(state.params, batch, noise)[0]
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
        architecture = architectures.read(config)
        built = program.build(config, mesh, architecture)
        encode = conditions.prompt_encoder(config, built, architecture)
        conditioner = conditions.Conditioner(config, built, encode)
        prompts = [tiny.PROMPTS[i % 7] for i in sharding.local_rows(mesh, 8)]
        state, frozen = program.initial_state(config, built), program.load_frozen(config, built)
        path = pathlib.Path(models) / "pipeline" / "transformer"
        four_bits = program.load_transformer(path, "flux", built.computes.transformer, mesh, "nf4")
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
        built = program.build(config, mesh, architectures.read(config))
        checkpoints = checkpoint.Checkpoints(pathlib.Path(out) / name, keep=1)
        state, _ = checkpoints.restore(1, built.state)
        checkpoints.close()
        for kind, tree in (("params", state.params), ("ema", state.ema)):
            stored = stored_weights.load_params(pathlib.Path(out) / name, 1, ema=kind == "ema")
            for path, leaf in engine.flatten(stored).items():
                if np.asarray(leaf).tobytes() != np.asarray(engine.flatten(tree)[path]).tobytes():
                    different.append(f"{name} -> {other}: {kind} {path}")
    print(json.dumps(different))


@pytest.fixture(scope="module")
def updated(models, tmp_path_factory):
    """(metrics by mesh, folder with a workdir by mesh) after one update."""
    out = tmp_path_factory.mktemp("meshes")
    return children.call(update_on_every_mesh, models, out), out


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
    report = children.call(lora_on_every_mesh, models)
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
        built = program.build(config, mesh, architectures.read(config))
        rng = np.random.default_rng(0)
        batch = jax.tree.map(
            lambda leaf, rng=rng: jax.device_put(rng.normal(size=leaf.shape).astype(leaf.dtype), leaf.sharding),
            built.batch,
        )
        noise = rng.normal(size=(16, *built.networks.tokens(built.settings))).astype(np.float32)
        noise = jax.device_put(noise, sharding.of_batch(mesh))
        roll = jax.jit(functools.partial(rollout, built.networks, built.settings))
        params = join(program.initial_state(config, built).params, program.load_frozen(config, built).base)
        compiled = roll.lower(params, batch, noise).compile()
        found = hlo.collectives(compiled.as_text(), 8).found
        moved = sum(one.traffic * one.runs for one in found if one.kind == "all-gather")
        report.append({"gathered": moved, "latents": np.asarray(compiled(params, batch, noise)[0]).ravel().tolist()})
        report[-1]["bytes"] = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
        gathered = re.findall(r"= \w+\[([\d,]+)\]\S* all-gather(?:-start)?\(", compiled.as_text())
        report[-1]["shapes"] = sorted(
            {tuple(int(size) for size in sizes.split(",") if size != "1") for sizes in gathered}
        )
    print(json.dumps(report))


def test_weights_gathered_once_for_a_rollout(models):
    found = children.call(gather_for_rollouts, models)
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

    mesh = sharding.make_mesh(SimpleNamespace(data=1, fsdp=8, tensor=1))
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
    config = dataclasses.replace(DEV.transformer, num_layers=1, num_single_layers=blocks, num_attention_heads=12)
    rng = np.random.default_rng(0)
    params = folder.abstract("flux", config)[1]
    params = jax.tree.map(lambda leaf: np.broadcast_to(rng.normal(size=leaf.shape[-1]), leaf.shape), params)
    folder.save(tmp_path, "flux", config, params, np.float32)
    found = children.call(load_onto_eight, tmp_path)
    print(found)
    assert found["bytes"] == sum(leaf.size * 4 for leaf in jax.tree.leaves(params))
    assert found["part"] < 1.05 * found["bytes"] / 8
    assert found["growth"] < 1.05 * found["bytes"] + found["largest"]


def test_checkpoints_move_between_meshes(models, updated):
    assert children.call(move_between_meshes, models, updated[1]) == []
