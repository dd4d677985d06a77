"""The roofline against hand-computed cases."""

import jax
import jax.numpy as jnp
import pytest

from srpo_jax.costs import flops, hlo, roofline, topologies
from srpo_jax.costs.traffic import Traffic

GROUP = (tuple(range(8)),)


def clock(name, places):
    """``seconds(kind, bytes, groups)`` of a collective between devices that lie at ``places``."""
    target = topologies.parse(name)
    return lambda kind, size, groups: roofline.duration(hlo.Collective(kind, "x", size, groups, 1), target, places)


CUBE = [(0, i, j, k) for k in range(2) for j in range(2) for i in range(2)]


def test_collectives_in_a_slice():
    seconds = clock("v5p:2x2x2", CUBE)
    assert seconds("all-gather", 3e9, GROUP) == pytest.approx(7 * 3e9 / 300e9)
    assert seconds("all-reduce", 8e9, GROUP) == pytest.approx(2 * 7e9 / 300e9)
    assert seconds("reduce-scatter", 8e9, GROUP) == seconds("all-to-all", 8e9, GROUP) == pytest.approx(7e9 / 300e9)
    assert seconds("collective-broadcast", 3e9, GROUP) == pytest.approx(3e9 / 300e9)
    assert seconds("all-gather", 1e9, ((0, 1), (2, 3), (4, 5), (6, 7))) == pytest.approx(1e9 / 100e9)
    assert seconds("all-gather", 1e9, ((0,), (1,))) == 0  # nobody to gather from
    ring = tuple((i, (i + 1) % 8) for i in range(8))
    assert seconds("collective-permute", 1e9, ring) == pytest.approx(1e9 / 200e9)
    assert seconds("collective-permute", 1e9, ((0, 1), (1, 0))) == pytest.approx(1e9 / 100e9)


def test_collectives_between_slices():
    """Two slices of two by two v5e: 50 GB/s a link, two links a chip, and 3.125 GB/s to the other slice."""
    seconds = clock("v5e:2x2*2", [(s, i, j) for s in range(2) for j in range(2) for i in range(2)])
    pairs = tuple((i, i + 4) for i in range(4))
    # One chip of each slice: everything goes by the network, none by the links.
    assert seconds("all-reduce", 1e9, pairs) == seconds("all-gather", 1e9, pairs) == pytest.approx(1 / 3.125)
    assert seconds("reduce-scatter", 1e9, pairs) == seconds("all-to-all", 1e9, pairs) == pytest.approx(0.5 / 3.125)
    assert seconds("collective-permute", 1e9, pairs) == pytest.approx(1 / 3.125)
    assert seconds("collective-permute", 1e9, ((0, 1), (1, 0), (4, 5), (5, 4))) == pytest.approx(1 / 50)
    # All eight: a chip fetches a quarter of what its slice lacks, the links pass it on.
    assert seconds("all-gather", 1e9, GROUP) == pytest.approx(1 / 3.125)
    assert seconds("all-reduce", 1e9, GROUP) == pytest.approx(0.25 / 3.125)
    assert seconds("reduce-scatter", 1e9, GROUP) == pytest.approx(0.125 / 3.125)
    assert seconds("all-to-all", 1e9, GROUP) == pytest.approx(0.5 / 3.125)
    # Within each slice, as if there were one.
    assert seconds("all-gather", 1e9, ((0, 1, 2, 3), (4, 5, 6, 7))) == pytest.approx(3 / 100)


def test_what_leaves_a_slice_is_told_apart():
    places = [(s, i, j) for s in range(2) for j in range(2) for i in range(2)]
    within = hlo.Collective("all-reduce", "a", 10**9, ((0, 1, 2, 3), (4, 5, 6, 7)), 2)
    between = hlo.Collective("all-reduce", "b", 10**9, tuple((i, i + 4) for i in range(4)), 3)
    target = topologies.parse("v5e:2x2*2")
    found = roofline.estimate({}, Traffic(0, 0), 0, [within, between], target, places).interconnect
    seconds = {"all-reduce": 2 * 1.5 / 100, "all-reduce between slices": 3 / 3.125}
    assert found == {name: pytest.approx(value) for name, value in seconds.items()}
    hosts = [divmod(i, 4) for i in range(8)]
    assert roofline.kind(between, topologies.parse("h100:2x4"), hosts) == "all-reduce between hosts"


def test_collectives_between_hosts():
    seconds = clock("h100:2x8", [divmod(i, 8) for i in range(16)])
    everybody = (tuple(range(16)),)
    # What the other host has comes in through eight adapters, 50 GB/s each; NVLink is nine times as fast.
    assert seconds("all-gather", 1e9, everybody) == pytest.approx(max(14 / 450, 1 / 50))
    assert seconds("all-reduce", 8e9, everybody) == pytest.approx(max(14 / 450, 1 / 50))
    assert seconds("all-reduce", 8e9, tuple((i, i + 8) for i in range(8))) == pytest.approx(8 / 50)


def test_estimate():
    target, peak = topologies.parse("v5p:2x2x2"), 8 * 459e12
    work = {"rollout": flops.Work(1, peak), "reward": flops.Work(1, peak / 2), "optimizer": flops.Work(9, 9)}
    found = [
        hlo.Collective("all-gather", "a", 30e9, GROUP, 20),
        hlo.Collective("all-gather", "b", 10e9, GROUP, 3),
        hlo.Collective("all-reduce", "c", 8e9, GROUP, 1),
    ]
    moved = Traffic(products=2765e9 * 2, between=2765e9 / 4)
    got = roofline.estimate(work, moved._replace(products=0), 0, found, target, CUBE)
    assert got.compute == {"rollout": pytest.approx(1.0), "reward": pytest.approx(0.5)}
    assert got.memory == {"between": pytest.approx(0.25)}
    assert got.interconnect == {"all-gather": pytest.approx(7 * 630e9 / 300e9), "all-reduce": pytest.approx(14 / 300)}
    assert got.bound == "interconnect" and got.best == got.expected == pytest.approx(14.7 + 14 / 300)
    alone = roofline.estimate(work, moved._replace(products=0), 0, [], target, CUBE)
    assert alone.bound == "compute" and alone.best == pytest.approx(1.75)
    assert alone.expected == pytest.approx(1.5 / 0.6 + 0.25)
    # Products that read and write for 2 s take 2 s at their peak of 1.5, and 2.5 at 60 % of it.
    slow = roofline.estimate(work, moved, 0, [], target, CUBE)
    assert slow.bound == "memory" and slow.best == pytest.approx(2.25) and slow.expected == alone.expected
    away = roofline.estimate(work, moved, 64e9, [], target, CUBE)
    assert away.memory["host"] == pytest.approx(2.0) and "host" not in alone.memory


def test_bytes_of_shards():
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    params = {"kernel": jax.ShapeDtypeStruct((100, 50), jnp.float32, sharding=where)}
    assert roofline.shard_bytes(params) == 20000
    away = {"kernel": jax.ShapeDtypeStruct((100, 50), jnp.bfloat16, sharding=where.with_memory_kind("pinned_host"))}
    assert roofline.shard_bytes([params, away]) == 20000 and roofline.shard_bytes([params, away], host=True) == 10000
