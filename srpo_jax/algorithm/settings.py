"""The numbers of a method and its recipe, as an update uses them: a configuration without paths and devices."""

import dataclasses
from typing import Any, NamedTuple

from srpo_jax.algorithm import direct_align
from srpo_jax.algorithm.direct_align import Grid
from srpo_jax.families.base import Family


class DRTune(NamedTuple):
    """See ``config.drtune``."""

    late_steps: int
    passes: int


class LeapAlign(NamedTuple):
    """See ``config.leapalign``."""

    alpha: float
    tau: float


class Sparse(NamedTuple):
    """See ``config.flowbp_sparse``."""

    passes: int
    rescale: float


class Bridge(NamedTuple):
    """See ``config.flowbp_bridge``."""

    passes: int
    rescale: float
    alpha: float


class Lagrange(NamedTuple):
    """See ``config.flowbp_lagrange``."""

    order: int
    alpha: float
    tau: float
    rescale: float
    second: float
    anchor: float
    concentration: tuple[float, float, float]


@dataclasses.dataclass(frozen=True)
class Settings:
    """The numbers of a method and its recipe; see ``config.default`` for their meaning."""

    method: str
    height: int
    width: int
    offline: bool
    rollout_steps: int
    solver: str
    rollout_dtype: str
    rollout_unroll: bool
    rollout_guidance: float
    shift: float
    shared_noise: bool
    shared_steps: bool
    reuse: int
    cache: int
    cache_ends: tuple[int, int]
    grid: Grid
    branches: tuple[str, ...]
    guidance: float
    weights: tuple[float, float]
    late_steps: int
    renoisings: int
    draft_steps: int
    drtune: DRTune
    leapalign: LeapAlign
    sparse: Sparse
    bridge: Bridge
    lagrange: Lagrange
    form: str
    target: str
    discount: float
    margin: float
    accumulation: int
    merge_terms: bool
    ema_decay: float
    round_time: bool
    truncate_time: bool

    @classmethod
    def from_config(cls, config: Any, family: Family) -> "Settings":
        """Reads a training configuration that ``config.validate`` has accepted, for a model of this family."""
        align, height, width = config.align, config.data.height, config.data.width
        shift = config.rollout.shift or family.shift(height, width)
        grid = direct_align.training_grid(
            train_timestep=tuple(align.train_timestep),
            length=align.length,
            schedule_steps=align.schedule_steps,
            shift=shift,
            groundtruth_ratio=align.groundtruth_ratio,
            discount_positive=tuple(align.discount_positive),
            discount_negative=tuple(align.discount_negative),
        )
        return cls(
            method=config.method,
            height=height,
            width=width,
            offline=config.data.images == "stored",
            rollout_steps=config.rollout.steps,
            solver=config.rollout.solver,
            rollout_dtype=config.rollout.dtype,
            rollout_unroll=config.rollout.unroll,
            rollout_guidance=config.rollout.guidance,
            shift=shift,
            shared_noise=config.rollout.noise == "shared",
            shared_steps=config.rollout.draws == "shared",
            reuse=config.rollout.reuse,
            cache=config.rollout.cache,
            cache_ends=tuple(config.rollout.cache_ends),
            grid=grid,
            branches=tuple(align.branches),
            guidance=align.guidance,
            weights=tuple(align.weights),
            late_steps=config.refl.late_steps,
            renoisings=config.draft_lv.renoisings,
            draft_steps=config.draft_k.last_steps or config.rollout.steps,
            drtune=DRTune(**config.drtune),
            leapalign=LeapAlign(**config.leapalign),
            sparse=Sparse(**config.flowbp_sparse),
            bridge=Bridge(**config.flowbp_bridge),
            lagrange=Lagrange(**config.flowbp_lagrange)._replace(
                concentration=tuple(config.flowbp_lagrange.concentration)
            ),
            form=config.reward.form,
            target=config.reward.target,
            discount=config.reward.discount,
            margin=config.reward.margin,
            accumulation=config.optim.accumulation,
            merge_terms=config.optim.merge_terms,
            ema_decay=config.optim.ema_decay,
            round_time=config.model.round_time,
            truncate_time=config.model.truncate_time,
        )
