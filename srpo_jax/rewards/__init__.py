"""The kinds of reward, by the name that ``config.reward.models.NAME.kind`` has."""

from srpo_jax.rewards.base import Reward
from srpo_jax.rewards.clip import ClipReward, HpsReward

REWARDS: dict[str, type[Reward]] = {"hps": HpsReward, "pickscore": ClipReward, "clip": ClipReward}
