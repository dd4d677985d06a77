r"""DRaFT-K (arXiv 2309.17400) on FLUX.1-dev with HPS-v2.1, as LoRA.

    python -m srpo_jax.main --config=configs/flux_dev_draft_k.py --workdir=runs/draft-k \
        --config.model.path=models/flux-dev --config.reward.models.hps.path=models/hps \
        --config.data.prompts=prompts.txt --config.sample.prompts=held_out.txt

Backpropagation through the last K steps of the rollout, as it is; `--config.draft_k.last_steps=0` is all of them. No
recipe for FLUX.1-dev was released: K, the rank, the rate and the loss, which has no hinge, are UniRL's for SD3.5, the
rest is as in flux_dev_refl.py. It was not tuned on this model.

Hardware: one 80 GB GPU, as flux_dev_hps_lora.py; the batch of 32 passes in 32 parts.

What to expect: the method maximises the reward and has no guard against hacking it; watch the grids in WORKDIR/samples,
and stop early.
"""

from ml_collections import ConfigDict

from srpo_jax.config import default


def get_config() -> ConfigDict:
    """The recipe. Paths are given on the command line."""
    c = default()
    c.method = "draft_k"
    c.steps = 300
    c.draft_k.last_steps = 1

    c.model.truncate_time = False

    c.data.batch_size = 32
    c.data.text_length = 512
    c.data.height = c.data.width = 512

    c.rollout.steps = 25
    c.rollout.shift = 0.0  # by the pictures' size: 1.878
    c.rollout.noise = "per_sample"
    c.rollout.draws = "shared"
    c.rollout.guidance = 4.0
    c.align.guidance = 4.0  # one guidance for rollout and passes

    c.reward.models.hps.weight = 1.0
    c.reward.target = "caption"
    c.reward.margin = 10.0  # above any score: the loss is 10 - reward

    c.lora.rank = 32
    c.lora.alpha = 64.0
    c.optim.learning_rate = 1e-4
    c.optim.accumulation = 32
    c.optim.b1, c.optim.b2 = 0.9, 0.999
    c.optim.eps = 1e-8
    c.optim.weight_decay = 1e-4
    c.optim.clip_norm = 1.0

    c.checkpoint.every = 50
    c.checkpoint.keep = 3
    c.sample.every = 50
    c.sample.steps = 25
    c.sample.guidance = 4.0
    return c
