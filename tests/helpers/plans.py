"""A tiny recipe to plan and to measure, without files, and what planning it might have found."""

import pathlib

import jax

from helpers import tiny
from srpo_jax import config as config_lib
from srpo_jax import program, sharding
from srpo_jax.architectures import Architecture
from srpo_jax.costs import plan, topologies
from srpo_jax.families.flux import FLUX
from srpo_jax.models import clip
from srpo_jax.models.t5 import T5Config

TOWERS = clip.ClipConfig(
    clip.ClipTextConfig(50, 32, 32, 1, 4, 16, "gelu", 49), clip.ClipVisionConfig(32, 32, 1, 4, 32, 16, "gelu"), 16
)
TEXT = {
    "text_encoder": clip.ClipTextConfig(50, 16, 32, 2, 2, 8, "quick_gelu", 49),
    "text_encoder_2": T5Config(60, 32, 8, 48, 2, 4),
}
ARCHITECTURE = Architecture(FLUX, tiny.FLUX, tiny.VAE, TEXT, {"clip": TOWERS})


def candidate(path: pathlib.Path, **changes) -> plan.Candidate:
    """A tiny update on this machine's CPU, which stands in for an H100."""
    config = tiny.config(
        path, model__dtype="bfloat16", model__attention="xla", data__batch_size=4, optim__accumulation=2, **changes
    )
    built = program.build(config, sharding.make_mesh(config.mesh, jax.devices()[:1]), ARCHITECTURE)
    return plan.Candidate(config, ARCHITECTURE, topologies.parse("h100:1"), built, {})


def report(candidate: plan.Candidate) -> dict:
    """What ``plan.check`` might say of it: round figures, and that it fits."""
    return {
        "topology": "h100:1", "device": "H100 SXM", "devices": 1, "mesh": {"data": 1, "fsdp": 1, "tensor": 1},
        "config": config_lib.flatten(candidate.config), "blocks": [1, 2], "compiled": True, "fits": True, "advice": [],
        "memory": {
            "arguments": {"weights": 2**30, "optimizer": 2**31, "ema": 0, "base": 0, "frozen": 2**28, "batch": 2**20},
            "temporaries": 3 * 2**30, "code": 2**26, "planned": 7 * 2**30, "text_encoders": 2**29, "host": 0,
            "needed": 7.5 * 2**30, "headroom": 67 * 2**30, "capacity": 74.5 * 2**30,
        },
        "host_memory": {"state": 3 * 2**30, "offloaded": 0, "copied": 3 * 2**30, "written": 2**31, "pinned": 3 * 2**30},
        "model_flops": {"rollout": 6e12}, "hardware_flops": {"rollout": 8e12}, "loops_of_unknown_length": [],
        "collectives": {"all-gather": {"instructions": 2, "runs": 40, "bytes": 5e9}},
        "seconds": {
            "compute": {"rollout": 1.0}, "products": 0.5, "memory": {"between": 0.25},
            "interconnect": {"all-gather": 0.5}, "best": 1.25, "expected": 2.0, "bound": "compute",
        },
    }  # fmt: skip
