r"""SRPO on FLUX.1-dev with HPS-v2.1 as the reward: the released recipe, every constant of it.

    python -m srpo_jax.convert import --source=FLUX.1-dev --target=models/flux-dev
    python -m srpo_jax.convert import --source=HPS_v2.1_compressed.pt --target=models/hps \
        --tokenizer=FLUX.1-dev/tokenizer
    python -m srpo_jax.main --config=configs/flux_dev_hps.py --workdir=runs/hps \
        --config.model.path=models/flux-dev --config.reward.models.hps.path=models/hps \
        --config.data.prompts=prompts.txt --config.sample.prompts=held_out.txt --config.optim.accumulation=4

Hardware: weight, two moments and gradient of 11.9 billion parameters take 16 bytes each in float32, 190 GB over all
devices of the mesh's fsdp axis; the frozen networks take 12 GB more in bfloat16, most of it T5. The devices along data
and fsdp together have to divide 32 / config.optim.accumulation. One sample a device at a time passes with
--config.optim.accumulation=4 on 8 TPU v5p, 8 H100 or 8 H200, and =2 on 16 TPU v6e or v4 (two do not fit v6e); 64 TPU
v5e take --config.mesh.tensor=2. docs/preflight.md has the figures. Checkpoints take 286 GB of disk at the most.

What to expect: 19 updates, 608 rollouts of 25 steps, are the whole of it. Control words change the look (light, detail,
texture), not the composition: compare the grids in WORKDIR/samples, drawn from the same noise. `denoise/reward` and
`inversion/reward` are the two branches' relative rewards, `*/caption_reward` the plain score of the prompt.
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
    c.rollout.guidance = 1.0
    c.rollout.shift = 3.0
    c.rollout.noise = "shared"

    c.align.branches = ("denoise", "inversion")
    c.align.guidance = 3.5
    c.align.schedule_steps = 50
    c.align.train_timestep = (5, 25)  # noise levels 0.9643 .. 0.75
    c.align.length = 1000
    c.align.groundtruth_ratio = 0.9
    c.align.discount_positive = (0.1, 0.25)
    c.align.discount_negative = (0.3, 0.01)

    c.reward.models.hps.weight = 1.0
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
