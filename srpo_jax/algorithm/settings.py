"""The numbers of a method and its recipe, as an update uses them: a configuration without paths and devices."""

import dataclasses
from typing import Any

from srpo_jax.algorithm import direct_align
from srpo_jax.algorithm.direct_align import Grid


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
    reuse: int
    cache: int
    cache_ends: tuple[int, int]
    grid: Grid
    branches: tuple[str, ...]
    guidance: float
    weights: tuple[float, float]
    late_steps: int
    renoisings: int
    form: str
    margin: float
    accumulation: int
    merge_terms: bool
    ema_decay: float
    round_time: bool

    @classmethod
    def from_config(cls, config: Any) -> "Settings":
        """Reads a training configuration that ``config.validate`` has accepted."""
        align = config.align
        grid = direct_align.training_grid(
            train_timestep=tuple(align.train_timestep),
            length=align.length,
            schedule_steps=align.schedule_steps,
            shift=config.rollout.shift,
            groundtruth_ratio=align.groundtruth_ratio,
            discount_positive=tuple(align.discount_positive),
            discount_negative=tuple(align.discount_negative),
        )
        return cls(
            method=config.method,
            height=config.data.height,
            width=config.data.width,
            offline=config.data.images == "stored",
            rollout_steps=config.rollout.steps,
            solver=config.rollout.solver,
            rollout_dtype=config.rollout.dtype,
            rollout_unroll=config.rollout.unroll,
            rollout_guidance=config.rollout.guidance,
            shift=config.rollout.shift,
            shared_noise=config.rollout.noise == "shared",
            reuse=config.rollout.reuse,
            cache=config.rollout.cache,
            cache_ends=tuple(config.rollout.cache_ends),
            grid=grid,
            branches=tuple(align.branches),
            guidance=align.guidance,
            weights=tuple(align.weights),
            late_steps=config.refl.late_steps,
            renoisings=config.draft_lv.renoisings,
            form=config.reward.form,
            margin=config.reward.margin,
            accumulation=config.optim.accumulation,
            merge_terms=config.optim.merge_terms,
            ema_decay=config.optim.ema_decay,
            round_time=config.model.round_time,
        )
