"""SRPO on the embedded world: a 64x64 FLUX that draws emoji in three styles is moved to "3D".

    make demo           # everything, with a report; leaves the converted models and the prompts in demo/
    python -m srpo_jax.main --config=configs/emoji.py --workdir=runs/emoji       # this run alone, after that

Hardware: two CPU cores; a minute. What to expect: on held-out concepts, bare names, an independent judge's
share of "3D" rises from 13 % to about 77 %, and it finds the right concept in 97 % of the pictures (98 % before).
"""

from ml_collections import ConfigDict

from srpo_jax import config


def get_config() -> ConfigDict:
    """The recipe."""
    c = config.default()
    c.steps = 16
    c.compilation_cache = ""  # a demonstration leaves nothing behind

    c.model.path = "demo/models/pipeline"
    c.model.dtype = "float32"
    c.model.attention = "xla"  # heads are 32 wide: kernels are made for 64 and more

    c.data.prompts = "demo/prompts/train.txt"
    c.data.batch_size = 32
    c.data.text_length = 16
    c.data.height = c.data.width = 64

    c.rollout.steps = 10
    c.rollout.guidance = 2.5
    c.rollout.noise = "per_sample"  # a batch of one shared noise would be one layout and often one style
    c.align.guidance = 2.5

    c.reward.models.hps.weight, c.reward.models.clip.weight = 0.0, 1.0
    c.reward.models.clip.path = "demo/models/reward"
    c.reward.positive = ("3D",)
    c.reward.negative = ("Flat", "Mono")

    c.optim.learning_rate = 3e-5
    c.optim.clip_norm = 1.0

    c.checkpoint.every = 4
    c.checkpoint.keep = 100
    c.sample.every = 8
    c.sample.prompts = "demo/prompts/holdout.txt"
    c.sample.count = 16
    c.sample.steps = 12
    c.sample.guidance = 2.5
    return c
