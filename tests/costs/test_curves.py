"""The drawing of preflight's reports: what is compared with what."""

import copy

from srpo_jax.costs import curves
from srpo_jax.costs.hardware import GIB

BASE = {
    "topology": "v5p:2x2x2", "device": "TPU v5p", "devices": 8, "mesh": {"data": 1, "fsdp": 8, "tensor": 1},
    "config": {"data.batch_size": 32, "optim.accumulation": 4, "data.height": 720, "data.width": 720},
    "architecture": {"num_layers": 19, "num_single_layers": 38}, "compiled": True,
    "seconds": {"best": 13.0, "expected": 18.0},
    "memory": {"needed": 34 * GIB, "arguments": {"weights": 5 * GIB, "optimizer": 11 * GIB}},
}  # fmt: skip


def change(seconds, **values):
    """A report that differs from ``BASE``; keys of its parts are written with their names before two underscores."""
    found = copy.deepcopy(BASE)
    found["seconds"] = {"best": seconds / 2, "expected": seconds}
    for key, value in values.items():
        group, _, name = key.partition("__")
        if name:
            found[group][name.replace("__", ".")] = value
        else:
            found[group] = value
    return found


REPORTS = [
    BASE,
    change(40.0, config__data__height=1024, config__data__width=1024),
    change(16.0, config__optim__accumulation=2),
    change(9.0, devices=16, mesh={"data": 1, "fsdp": 16, "tensor": 1}, config__optim__accumulation=2),
    change(99.0, device="H100 SXM"),
    change(99.0, config__optim__accumulation=2, architecture__num_layers=4),
    change(99.0, compiled=False, config__data__height=1440, config__data__width=1440),
]


def test_a_row_varies_one_thing():
    base = curves.point(BASE)
    assert base == curves.Point("TPU v5p", 1, 720, 57, 8)
    rows = {
        name: [(x, item["seconds"]["expected"]) for x, item in curves.select(REPORTS, base, name)]
        for name in curves.PANELS
    }
    assert rows == {
        "samples": [(1, 18.0), (2, 16.0)],
        "side": [(720, 18.0), (1024, 40.0)],
        "blocks": [(57, 18.0)],
        "devices": [(8, 18.0), (16, 9.0)],
    }
    pairs = curves.charts(REPORTS, base)
    assert [seconds.x_label for seconds, _ in pairs] == [curves.PANELS[name] for name in ("samples", "side", "devices")]
    seconds, memory = pairs[1]
    assert seconds.series["at best"] == [(720, 13.0), (1024, 20.0)] and seconds.limits == (0.0, 40.0)
    assert memory.series == {"needed": [(720, 34.0), (1024, 34.0)], "arguments": [(720, 16.0), (1024, 16.0)]}
