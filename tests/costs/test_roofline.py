"""The roofline against hand-computed cases, and what topologies say of links."""

import types

import jax
import jax.numpy as jnp
import optax
import pytest

from srpo_jax import architectures, config
from srpo_jax.costs import flops, hlo, roofline, topologies

GROUP = (tuple(range(8)),)


def torus(target):
    """Stand-ins for a TPU slice's devices, in order."""
    x, y, z = target.shape
    return [types.SimpleNamespace(coords=(i, j, k)) for k in range(z) for j in range(y) for i in range(x)]


@pytest.mark.parametrize(
    "name, places, links",
    [
        ("v5p:2x2x2", "all", 3),  # too short to be closed
        ("v5p:2x2x2", [(0, 0, 0), (1, 0, 0)], 1),
        ("v5p:4x4x4", "all", 6),
        ("v5p:4x4x4", [(0, j, 0) for j in range(4)], 2),
        ("v5p:4x4x4", [(0, j, 0) for j in range(2)], 1),
        ("v5p:4x4x2", "all", 3),  # no cube
        ("v4:2x2x1", [(0, 0, 0)], 0),
        ("v5e:8x8", [(i, j) for i in range(8) for j in range(8)], 2),
        ("v6e:16x16", [(i, j) for i in range(16) for j in range(16)], 4),
        ("v6e:8x16", [(i, j) for i in range(8) for j in range(16)], 3),
    ],
)
def test_links_of_a_tpu(name, places, links):
    target = topologies.parse(name)
    if places == "all":
        places = [device.coords for device in torus(target)]
    assert topologies.bandwidth(target, places) == links * target.chip.link


def test_links_of_a_gpu():
    target = topologies.parse("h100:2x8")
    assert topologies.bandwidth(target, [(0, 0), (0, 5)]) == 450e9  # NVLink
    assert topologies.bandwidth(target, [(0, 0), (1, 0)]) == 50e9  # one adapter
    assert topologies.bandwidth(target, [(h, g) for h in range(2) for g in range(8)]) == 400e9  # eight of them
    devices = [types.SimpleNamespace(id=i) for i in range(16)]
    assert [topologies.place(target, device) for device in devices][7:9] == [(0, 7), (1, 0)]


def test_duration_of_collectives():
    target = topologies.parse("v5p:2x2x2")
    places = [device.coords for device in torus(target)]

    def seconds(kind, size, groups, runs=1):
        return roofline.duration(hlo.Collective(kind, "x", size, groups, runs), target, places)

    assert seconds("all-gather", 3e9, GROUP) == pytest.approx(7 * 3e9 / 300e9)
    assert seconds("all-reduce", 8e9, GROUP) == pytest.approx(2 * 7e9 / 300e9)
    assert seconds("all-gather", 1e9, ((0, 1), (2, 3), (4, 5), (6, 7))) == pytest.approx(1e9 / 100e9)
    assert seconds("all-gather", 1e9, ((0,), (1,))) == 0  # nobody to gather from
    ring = tuple((i, (i + 1) % 8) for i in range(8))
    assert seconds("collective-permute", 1e9, ring) == pytest.approx(1e9 / 200e9)
    assert seconds("collective-permute", 1e9, ((0, 1), (1, 0))) == pytest.approx(1e9 / 100e9)


def test_estimate():
    c, target = config.default(), topologies.parse("v5p:2x2x2")
    c.model.attention = "splash"
    peak = 8 * 459e12
    work = {"rollout": flops.Work(1, peak), "reward": flops.Work(1, peak / 2), "optimizer": flops.Work(9, 9)}
    found = [
        hlo.Collective("all-gather", "a", 30e9, GROUP, 20),
        hlo.Collective("all-gather", "b", 10e9, GROUP, 3),
        hlo.Collective("all-reduce", "c", 8e9, GROUP, 1),
    ]
    sizes = architectures.FLUX_DEV
    got = roofline.estimate(c, sizes, work, 2765e9 / 4, 0, found, target, torus(target))
    assert got.compute == {"rollout": pytest.approx(1.0), "reward": pytest.approx(0.5)}
    assert got.memory == {"optimizer": pytest.approx(0.25)}
    assert got.interconnect == {"all-gather": pytest.approx(7 * 630e9 / 300e9), "all-reduce": pytest.approx(14 / 300)}
    assert got.bound == "interconnect" and got.best == got.expected == pytest.approx(14.7 + 14 / 300)
    alone = roofline.estimate(c, sizes, work, 2765e9 / 4, 0, [], target, torus(target))
    assert alone.bound == "compute" and alone.best == pytest.approx(1.75)
    assert alone.expected == pytest.approx(1.5 / 0.6 + 0.25)
    c.model.attention = "xla"
    plain = roofline.estimate(c, sizes, work, 0, 64e9, [], target, torus(target))
    assert plain.memory["host"] == pytest.approx(2.0) and "host" not in alone.memory
    assert plain.memory["attention"] == pytest.approx(roofline.attention_traffic(c, sizes) / 8 / 2765e9)


def test_attention_matrices():
    """57 blocks of 24 heads on 2025 + 512 tokens: 25 rollouts of 12 bytes an entry, two gradients of 38."""
    c = config.default()
    c.data.batch_size = 3
    entries = 57 * 24 * 2537**2
    assert roofline.attention_traffic(c, architectures.FLUX_DEV) == 3 * entries * (25 * 12 + 2 * (24 + 14))
    c.remat.transformer = "none"
    assert roofline.attention_traffic(c, architectures.FLUX_DEV) == 3 * entries * (25 * 12 + 2 * (12 + 14))


def test_optimizer_moves_32_bytes_a_weight():
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    params = {"kernel": jax.ShapeDtypeStruct((100, 50), jnp.float32, sharding=where)}
    state = jax.eval_shape(optax.adamw(1e-3).init, params)
    state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), state)
    assert roofline.shard_bytes(params) == 20000
    counters = 2 * sum(leaf.dtype.itemsize for leaf in jax.tree.leaves(state) if not leaf.shape)
    assert roofline.optimizer_traffic(params, state) == 32 * 5000 + counters
    away = where.with_memory_kind("pinned_host")
    state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=away) if x.shape else x, state)
    assert roofline.shard_bytes(state) == counters / 2 and roofline.shard_bytes(state, host=True) == 40000
