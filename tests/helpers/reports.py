"""What preflight's ``--json`` may hold: a plan, and others that differ from it in one thing or more."""

import copy

from srpo_jax.costs.hardware import GIB

BASE = {
    "topology": "v5p:2x2x2", "device": "TPU v5p", "devices": 8, "mesh": {"data": 1, "fsdp": 8, "tensor": 1},
    "config": {"data.batch_size": 32, "optim.accumulation": 4, "data.height": 720, "data.width": 720},
    "blocks": [19, 38], "compiled": True,
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
    change(99.0, config__optim__accumulation=2, blocks=[4, 38]),
    change(99.0, compiled=False, config__data__height=1440, config__data__width=1440),
]
