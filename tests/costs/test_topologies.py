"""Names of devices that are not there, their description for a compiler, and the links between them."""

import re
import types

import pytest

from srpo_jax import errors
from srpo_jax.costs import topologies


def torus(target):
    """Stand-ins for the devices of TPU slices, in order."""
    x, y, z = (*target.shape, 1)[:3]
    coords = [(i, j, k) for k in range(z) for j in range(y) for i in range(x)]
    if target.slices == 1:
        return [types.SimpleNamespace(coords=at) for at in coords]  # as libtpu has them, without slice_index
    return [types.SimpleNamespace(coords=at, slice_index=s) for s in range(target.slices) for at in coords]


@pytest.mark.parametrize(
    "name, shape, slices, count",
    [
        ("v5e:4x4", (4, 4), 1, 16),
        ("v5e:4x4*2", (4, 4), 2, 32),
        ("V5P:2x2x2*4", (2, 2, 2), 4, 32),
        ("tpu7x:2x2x1", (2, 2, 1), 1, 8),
        ("h100:16", (2, 8), 1, 16),
    ],
)
def test_names(name, shape, slices, count):
    target = topologies.parse(name)
    assert (target.shape, target.slices, target.count) == (shape, slices, count)


@pytest.mark.parametrize(
    "name, message",
    [
        ("v9:2x2", "known are TPU slices"),
        ("v5e:2x2x2", "a v5e slice has 2 axes, as v5e:2x2"),
        ("v5p:2x0x2", "a v5p slice has 3 axes"),
        ("v5e:4x4*0", "0 slices hold no chip"),
        ("v5e:4x4*", "known are TPU slices"),
        ("v5e*2", "known are TPU slices"),
        ("h100:12", "give a number of GPUs up to 8"),
        ("h100:8*2", "or hosts x GPUs, as h100:4x8"),
    ],
)
def test_names_that_are_refused(name, message):
    with pytest.raises(errors.UserError, match=message):
        topologies.parse(name)


def test_options_of_the_tpu_compiler():
    options = {name: topologies._tpu_options(topologies.parse(name)) for name in ("v5e:4x4", "v5e:4x4*2", "v4:2x2x1*3")}
    assert options == {
        "v5e:4x4": {}, "v5e:4x4*2": {"num_slices": 2},
        "v4:2x2x1*3": {"num_slices": 3, "chip_config_name": "megacore"},
    }  # fmt: skip
    assert topologies._tpu_options(topologies.parse("v5e:1x1*2"))["chips_per_host_bounds"] == (1, 1, 1)


@pytest.mark.parametrize("name", list(topologies.GPUS))
def test_target_config(name):
    """Every GPU has figures, and its text names them in fields of the proto."""
    target = topologies.parse(f"{name}:1")
    text = topologies.target_config(topologies.GPUS[name])
    fields = dict(re.findall(r"(\w+): (\S+)", text))
    assert int(fields["device_memory_size"]) == target.chip.memory
    assert int(fields["memory_bandwidth"]) == target.chip.bandwidth
    # Units x 2 FLOPs x clock is the data sheet's float32 peak: 19.5, 51, 67, 75, 82.6 TFLOP/s.
    peak = 2 * int(fields["core_count"]) * int(fields["fpus_per_core"]) * float(fields["clock_rate_ghz"]) / 1e3
    sheet = {"a100": 19.5, "a100-40gb": 19.5, "h100-pcie": 51.2, "b200": 75, "rtx4090": 82.6}
    assert peak == pytest.approx(sheet.get(name, 66.9), rel=0.01)


@pytest.mark.parametrize("topology, remedy", [("v5e:2x2", ".[preflight-tpu]"), ("h100:8", ".[preflight-cuda]")])
def test_a_missing_compiler(monkeypatch, topology, remedy):
    monkeypatch.setattr(topologies.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(errors.UserError) as caught:
        topologies.devices(topologies.parse(topology))
    assert f"pip install -e '{remedy}'" in str(caught.value)


@pytest.mark.parametrize(
    "name, places, links",
    [
        ("v5p:2x2x2", "all", 3),  # too short to be closed
        ("v5p:2x2x2", [(0, 0, 0, 0), (0, 1, 0, 0)], 1),
        ("v5p:4x4x4", "all", 6),
        ("v5p:4x4x4", [(0, 0, j, 0) for j in range(4)], 2),
        ("v5p:4x4x4", [(0, 0, j, 0) for j in range(2)], 1),
        ("v5p:4x4x2", "all", 3),  # no cube
        ("v4:2x2x1", [(0, 0, 0, 0)], 0),
        ("v5e:8x8", "all", 2),
        ("v6e:16x16", "all", 4),
        ("v6e:8x16", "all", 3),
    ],
)
def test_links_of_a_tpu(name, places, links):
    target = topologies.parse(name)
    if places == "all":
        places = [topologies.place(target, device) for device in torus(target)]
        assert len(set(places)) == target.count and {len(place) for place in places} == {1 + len(target.shape)}
    assert topologies.bandwidth(target, places) == links * target.chip.link


def test_two_devices_on_a_chip():
    """They are near each other; to others, each has half of the chip's links."""
    target = topologies.parse("tpu7x:2x1x1")
    devices = [types.SimpleNamespace(coords=[x, 0, 0], core_on_chip=core) for x in range(2) for core in range(2)]
    places = [topologies.place(target, device) for device in devices]
    assert places == [(0, 0, 0, 0, 0), (0, 0, 0, 0, 1), (0, 1, 0, 0, 0), (0, 1, 0, 0, 1)]
    assert topologies.bandwidth(target, places[:2]) == 300e9 and topologies.bandwidth(target, places[:1]) == 0
    assert topologies.bandwidth(target, places) == topologies.bandwidth(target, places[::2]) == 50e9
    assert target.memory == 94.75 * 2**30 and target.network == 6.25e9


def test_devices_of_several_hosts_and_slices():
    target = topologies.parse("h100:2x8")
    devices = [types.SimpleNamespace(id=i) for i in range(16)]
    assert [topologies.place(target, device) for device in devices][7:9] == [(0, 7), (1, 0)]
    assert topologies.bandwidth(target, [(0, 0), (0, 5)]) == 450e9  # NVLink
    assert target.network == 50e9
    target = topologies.parse("v5e:2x2*2")
    places = [topologies.place(target, device) for device in torus(target)]
    assert places[3:5] == [(0, 1, 1), (1, 0, 0)] and len(set(places)) == 8
    # A 256th of 6.4 and of 25.6 Tbit/s.
    assert target.network == 3.125e9 and topologies.parse("v6e:2x2*2").network == 12.5e9


@pytest.mark.parametrize(
    "name, hosts, memory",
    [
        ("v5p:2x2x2", 2, 448),
        ("tpu7x:2x2x2", 2, 960),
        ("v5e:4x4*2", 8, 192),
        ("v6e:1x1", 1, 180),
        ("h100:4x8", 4, None),
        ("h200:1", 1, None),
    ],
)
def test_hosts_of_a_target(name, hosts, memory):
    target = topologies.parse(name)
    assert target.hosts == hosts
    assert target.host_memory == (None if memory is None else memory * 2**30)
