r"""SRPO on FLUX.1-dev with PickScore as the reward: the released recipe, every constant of it.

    python -m srpo_jax.convert import --source=FLUX.1-dev --target=models/flux-dev
    python -m srpo_jax.convert import --source=PickScore_v1 --target=models/pickscore
    python -m srpo_jax.main --config=configs/flux_dev_pickscore.py --workdir=runs/pickscore \
        --config.model.path=models/flux-dev --config.reward.models.pickscore.path=models/pickscore \
        --config.data.prompts=prompts.txt --config.sample.prompts=held_out.txt

It differs from flux_dev_hps.py, which see for hardware and what to expect, in the reward, the guidance of the rollout,
a training grid that reaches lower noise, and steeper discounts.
"""

from ml_collections import ConfigDict

from srpo_jax.config import default


def get_config() -> ConfigDict:
    """The recipe. Paths are given on the command line."""
    c = default()
    c.method = "srpo"
    c.steps = 19

    c.data.batch_size = 32
    c.data.text_length = 512
    c.data.height = c.data.width = 720

    c.rollout.steps = 25
    c.rollout.guidance = 2.0
    c.rollout.shift = 3.0
    c.rollout.noise = "shared"

    c.align.branches = ("denoise", "inversion")
    c.align.guidance = 3.5
    c.align.schedule_steps = 50
    c.align.train_timestep = (5, 30)  # noise levels 0.9643 .. 0.6667
    c.align.length = 1000
    c.align.groundtruth_ratio = 0.9
    c.align.discount_positive = (0.1, 0.5)
    c.align.discount_negative = (0.6, 0.01)

    c.reward.models.hps.weight = 0.0
    c.reward.models.pickscore.weight = 1.0
    c.reward.form = "released"
    c.reward.margin = 0.7
    c.reward.positive = ("Natural-lighting", "Detail", "Detailed", "Real")
    c.reward.negative = ("Concept art", "Painting", "Anime", "Flat", "Oil")

    c.optim.learning_rate = 5e-6
    c.optim.warmup_steps = 0
    c.optim.b1, c.optim.b2 = 0.9, 0.999
    c.optim.eps = 1e-8
    c.optim.weight_decay = 1e-4
    c.optim.clip_norm = 0.1

    c.checkpoint.every = 10  # 143 GB each, of which 48 stay once a newer one is there
    c.checkpoint.keep = 3
    c.sample.every = 5
    c.sample.steps = 50
    c.sample.guidance = 3.5
    return c
