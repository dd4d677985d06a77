"""The range of every number in a configuration, in one table. Kinds and finiteness are those of ``config.default()``.

A list's range is that of each of its numbers. What one key asks of another stands in ``validation``.
"""

from typing import Any, NamedTuple

import numpy as np

from srpo_jax import values
from srpo_jax.config import reward_of
from srpo_jax.errors import UserError

TINY = float(np.finfo(np.float32).smallest_subnormal)
ANY = values.LARGEST
STEPS = 10_000  # of a sampler, at most
SIDE = 16_384  # pixels of a picture, at most
GUIDANCE = 1000.0


def _shown(number: float) -> str:
    return str(number) if isinstance(number, int) else f"{number:.12g}"


class Range(NamedTuple):
    """The ends belong to it, one value in it, ``without``, does not.

    ``words`` are what is told of a value outside; None tells the end that it is beyond.
    """

    least: float
    most: float
    words: str | None = None
    without: float | None = None

    def wrong(self, value: float) -> str:
        """What to say of a value; "" if it is within."""
        if self.least <= value <= self.most and value != self.without:
            return ""
        if self.words:
            return self.words
        if value > self.most:
            return f"must be at most {_shown(self.most)}"
        return f"must be at least {_shown(self.least)}" if self.least else "must not be negative"


def _from(least: float, most: float) -> Range:
    return Range(least, most, f"must be from {_shown(least)} to {_shown(most)}")


def _positive(most: float = ANY) -> Range:
    return Range(TINY, most, "must be greater than 0, in float32 too" if most == ANY else None)


_PORTION = Range(0, float(np.nextafter(1, 0)), "must be at least 0 and less than 1")
_SHARE = _from(0, 1)
_SEED = _from(0, values.SEED)
_PIECES = Range(1, 2**20)  # samples, devices or parts
_UPDATES = Range(1, 10**9)
_STEPS = Range(1, STEPS)
_GUIDANCE = Range(0, GUIDANCE)
_FACTOR = Range(-1e6, 1e6)
_AXIS = Range(-1, 2**20, "must be at least 1, or -1 for the rest of the devices", without=0)

RANGES = {
    "steps": _UPDATES,
    "seed": _SEED,
    "model.scan_unroll": Range(1, 1024),
    "lora.rank": Range(0, 2**16),
    "lora.alpha": _positive(),
    "data.filter.min_length": Range(0, 2**31),
    "data.filter.max_length": Range(0, 2**31),
    "data.batch_size": _PIECES,
    "data.text_length": Range(1, 2**16),
    "data.height": Range(1, SIDE),
    "data.width": Range(1, SIDE),
    "rollout.steps": _STEPS,
    "rollout.guidance": _GUIDANCE,
    "rollout.shift": Range(0, 1000),
    "rollout.reuse": Range(1, 10**6),
    "rollout.cache": _STEPS,
    "rollout.cache_ends": Range(
        0, 1024, "must be two whole numbers, of double blocks at the start and single blocks at the end"
    ),  # fmt: skip
    "align.guidance": _GUIDANCE,
    "align.schedule_steps": _STEPS,
    "align.train_timestep": _STEPS,
    "align.length": Range(10, 10**6),
    "align.groundtruth_ratio": _PORTION,
    "align.discount_positive": _FACTOR,
    "align.discount_negative": _FACTOR,
    "align.weights": _FACTOR,
    "refl.late_steps": _STEPS,
    "draft_lv.renoisings": Range(1, 1000),
    "draft_k.last_steps": Range(0, STEPS),
    "drtune.late_steps": _STEPS,
    "drtune.passes": _STEPS,
    "leapalign.alpha": _FACTOR,
    "leapalign.tau": _positive(),
    "flowbp_sparse.passes": _STEPS,
    "flowbp_sparse.rescale": _FACTOR,
    "flowbp_bridge.passes": _STEPS,
    "flowbp_bridge.rescale": _FACTOR,
    "flowbp_bridge.alpha": _FACTOR,
    "flowbp_lagrange.order": Range(1, 64),
    "flowbp_lagrange.alpha": _FACTOR,
    "flowbp_lagrange.tau": _positive(),
    "flowbp_lagrange.rescale": _FACTOR,
    "flowbp_lagrange.second": _FACTOR,
    "flowbp_lagrange.anchor": _SHARE,
    "flowbp_lagrange.concentration": Range(TINY, 1e6, "must be three numbers greater than 0"),
    "reward.discount": _FACTOR,
    "reward.margin": _FACTOR,
    "optim.learning_rate": _positive(),
    "optim.warmup_steps": Range(0, 10**9),
    "optim.b1": _PORTION,
    "optim.b2": _PORTION,
    "optim.eps": _positive(),
    "optim.weight_decay": Range(0, ANY),
    "optim.clip_norm": _positive(),
    "optim.accumulation": _PIECES,
    "optim.patience": Range(1, 10**6),
    "optim.ema_decay": _PORTION,
    "checkpoint.every": _UPDATES,
    "checkpoint.keep": _UPDATES,
    "checkpoint.resumable": _UPDATES,
    "checkpoint.minutes": Range(0, 10**6),
    "sample.every": Range(0, 10**9),
    "sample.count": _PIECES,
    "sample.seed": _SEED,
    "sample.steps": _STEPS,
    "sample.guidance": _GUIDANCE,
    "evaluate.every": Range(0, 10**9),
    "evaluate.count": _PIECES,
    "evaluate.images": Range(1, 10**4),
    "evaluate.seed": _SEED,
    "evaluate.steps": _STEPS,
    "evaluate.guidance": _GUIDANCE,
    "evaluate.patience": Range(0, 10**6),
    "mesh.data": _AXIS,
    "mesh.fsdp": _AXIS,
    "mesh.tensor": _AXIS,
}
REWARD_WEIGHT = Range(0, 1e6)


def of(key: str) -> Range:
    """The range of a key whose value is a number, or a list of numbers."""
    return REWARD_WEIGHT if reward_of(key) else RANGES[key]


def check(flat: dict[str, Any]) -> None:
    """Raises UserError that names the key, its value and the range, for a number outside of it.

    ``flat`` are keys and values of the right kinds, as ``config.flatten`` has them.
    """
    for key, value in flat.items():
        numbers = value if isinstance(value, list) else [value]
        if not all(isinstance(number, int | float) and not isinstance(number, bool) for number in numbers):
            continue
        for number in numbers:
            if words := of(key).wrong(number):
                raise UserError(f"config.{key}={value!r}: {words}")
