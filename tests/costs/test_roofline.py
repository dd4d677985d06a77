"""The roofline against hand-computed cases."""

import jax
import jax.numpy as jnp
import optax
import pytest

from srpo_jax import architectures, config
from srpo_jax.architectures import Architecture
from srpo_jax.costs import flops, hlo, roofline, topologies
from srpo_jax.families.flux import DEV, FLUX

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
    c, target = config.default(), topologies.parse("v5e:2x2*2")
    c.model.attention = "splash"
    found = roofline.estimate(c, DEV.transformer, {}, 0, 0, [within, between], target, places).interconnect
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
    c, target = config.default(), topologies.parse("v5p:2x2x2")
    c.model.attention = "splash"
    peak = 8 * 459e12
    work = {"rollout": flops.Work(1, peak), "reward": flops.Work(1, peak / 2), "optimizer": flops.Work(9, 9)}
    found = [
        hlo.Collective("all-gather", "a", 30e9, GROUP, 20),
        hlo.Collective("all-gather", "b", 10e9, GROUP, 3),
        hlo.Collective("all-reduce", "c", 8e9, GROUP, 1),
    ]
    sizes = Architecture(FLUX, *DEV, {})
    got = roofline.estimate(c, sizes, work, 2765e9 / 4, 0, found, target, CUBE)
    assert got.compute == {"rollout": pytest.approx(1.0), "reward": pytest.approx(0.5)}
    assert got.memory == {"optimizer": pytest.approx(0.25)}
    assert got.interconnect == {"all-gather": pytest.approx(7 * 630e9 / 300e9), "all-reduce": pytest.approx(14 / 300)}
    assert got.bound == "interconnect" and got.best == got.expected == pytest.approx(14.7 + 14 / 300)
    alone = roofline.estimate(c, sizes, work, 2765e9 / 4, 0, [], target, CUBE)
    assert alone.bound == "compute" and alone.best == pytest.approx(1.75)
    assert alone.expected == pytest.approx(1.5 / 0.6 + 0.25)
    c.model.attention = "xla"
    plain = roofline.estimate(c, sizes, work, 0, 64e9, [], target, CUBE)
    assert plain.memory["host"] == pytest.approx(2.0) and "host" not in alone.memory
    # 32 samples, 57 blocks of 24 heads, 2537 tokens; 25 steps of 12 bytes an entry and two gradients of 38.
    entries = 32 * 57 * 24 * 2537**2 * (25 * 12 + 2 * 38)
    assert plain.memory["attention"] == pytest.approx(entries / 8 / 2765e9)


def test_attention_matrices():
    """57 blocks of 24 heads on 2025 + 512 tokens: 25 rollouts of 12 bytes an entry, two gradients of 38."""
    c = config.default()
    c.data.batch_size = 3
    entries, published = 57 * 24 * 2537**2, architectures.published(c, "flux-dev")
    assert roofline.attention_traffic(c, published) == 3 * entries * (25 * 12 + 2 * (24 + 14))
    c.remat.transformer = "none"
    assert roofline.attention_traffic(c, published) == 3 * entries * (25 * 12 + 2 * (12 + 14))


def test_attention_matrices_of_other_rollouts():
    """Real pictures have none; 9 of 25 steps that run all of 57 blocks leave 16 of 1 + 1; a second update halves it."""
    matrix, gradient = 24 * 2537**2, 57 * (24 + 14)
    for keys, blocks in (
        ({"data.images": "stored"}, 0),
        ({"rollout.cache": 3}, 9 * 57 + 16 * 2),
        ({"rollout.cache": 3, "rollout.cache_ends": (2, 5)}, 9 * 57 + 16 * 7),
        ({"rollout.cache": 3, "rollout.reuse": 2}, (9 * 57 + 16 * 2) / 2),
    ):
        changed = config.default()
        changed.data.batch_size, changed.method = 1, "direct_align"
        changed.update_from_flattened_dict(keys)
        found = roofline.attention_traffic(changed, architectures.published(changed, "flux-dev"))
        assert found == matrix * (12 * blocks + gradient), keys


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


@pytest.mark.parametrize("weights, moments, each", [("bfloat16", "bfloat16", 20), ("bfloat16", "float32", 28)])
def test_gradients_are_float32_beside_smaller_weights(weights, moments, each):
    """Two readings of 4 bytes, and a reading and a writing of weights and both moments."""
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    params = {"kernel": jax.ShapeDtypeStruct((100, 50), weights, sharding=where)}
    state = [jax.ShapeDtypeStruct((100, 50), moments, sharding=where)] * 2
    assert roofline.optimizer_traffic(params, state) == each * 5000
