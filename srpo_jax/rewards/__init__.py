"""The kinds of reward, by the name that ``config.reward.models.NAME.kind`` has."""

from srpo_jax.rewards.aesthetic import Aesthetic, AestheticV25
from srpo_jax.rewards.base import Reward
from srpo_jax.rewards.clip import ClipReward, HpsReward
from srpo_jax.rewards.image_reward import ImageReward

REWARDS: dict[str, type[Reward]] = {
    "hps": HpsReward,
    "pickscore": ClipReward,
    "clip": ClipReward,
    "image_reward": ImageReward,
    "aesthetic": Aesthetic,
    "aesthetic_v25": AestheticV25,
}
