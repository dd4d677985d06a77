r"""SRPO on FLUX.1-dev with HPS-v2.1 as the reward and real pictures in the place of rollouts: the offline mode.

    python -m srpo_jax.encode --model=models/flux-dev --images=photos --height=720 --width=720 --out=data/photos
    python -m srpo_jax.inspect_data data/photos --sheet=photos.png
    python -m srpo_jax.main --config=configs/flux_dev_hps_offline.py --workdir=runs/hps_offline \
        --config.model.path=models/flux-dev --config.reward.models.hps.path=models/hps \
        --config.data.path=data/photos --config.sample.prompts=held_out.txt

`photos` is a folder of pictures with captions (docs/data.md), of 720x720 pixels or more; the paper's authors say that
fewer than 1,500 are enough. It differs from flux_dev_hps.py in where the images that are improved come from, and in
nothing else: known noise is added to real ones, so there is no rollout.

Hardware: the memory of flux_dev_hps.py, which see, without the text encoders: they are loaded to encode
sample.prompts and leave before training (config.sample.every=0 does without). An update is 10.4 PFLOP and not 40.2, of
them 9.5 the transformer's two gradients with their recomputation.

What to expect: not run at this size. On the small world of srpo_jax/emoji it moves the model as far in as many updates
as rollouts do, with pictures in the wanted style or in all (docs/data.md has the table). Control words change the look,
not what is in the pictures; the metrics are those of flux_dev_hps.py.
"""

from ml_collections import ConfigDict

from srpo_jax.config import default


def get_config() -> ConfigDict:
    """The recipe. Paths are given on the command line."""
    c = default()
    c.method = "srpo"
    c.steps = 19

    c.data.encode = "stored"
    c.data.images = "stored"
    c.data.batch_size = 32
    c.data.text_length = 512
    c.data.height = c.data.width = 720

    c.rollout.shift = 3.0
    c.rollout.noise = "per_sample"  # drawn anew for each picture

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
