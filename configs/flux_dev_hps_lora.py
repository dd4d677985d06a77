r"""SRPO on FLUX.1-dev with HPS-v2.1, as LoRA: factors of rank 32 are trained beside the frozen transformer.

    python -m srpo_jax.main --config=configs/flux_dev_hps_lora.py --workdir=runs/hps-lora \
        --config.model.path=models/flux-dev --config.reward.models.hps.path=models/hps \
        --config.data.prompts=prompts.txt --config.sample.prompts=held_out.txt
    python -m srpo_jax.convert export --source models/flux-dev --checkpoint runs/hps-lora --target lora \
        --format lora-diffusers

Hardware: one 80 GB GPU. One sample at a time passes through the transformer; the batch of 32 passes in 32 parts. The
transformer takes 24 GB in bfloat16, the factors with their two moments 1.6 GB, the rest of the update 6 GB; the text
encoders take 10 GB more, which goes if the prompts were encoded before (--config.data.encode=stored).

One 24 GB GPU: --config.lora.quantize=int8 keeps the transformer in 12 GB (nf4: 6.4 GB), and the prompts have to be
encoded before. On several GPUs, --config.optim.accumulation=4 gives 8 of them a sample each.

What to expect: the released recipe moves every weight by at most 19 * 5e-6. The rate here is larger because B starts
at 0; it is a usual one for LoRA and was not tuned on this model. Watch the grids in WORKDIR/samples. docs/lora.md has
the formats of export and what quantising costs.
"""

from ml_collections import ConfigDict

from srpo_jax.config import default


def get_config() -> ConfigDict:
    """The recipe of flux_dev_hps.py (which is that of ``default``) with LoRA. Paths are given on the command line."""
    c = default()
    c.lora.rank = 32
    c.lora.alpha = 32.0

    c.optim.learning_rate = 1e-4
    c.optim.accumulation = 32

    c.checkpoint.every = 5
    c.checkpoint.keep = 4
    c.sample.every = 5
    c.sample.steps = 50
    c.sample.guidance = 3.5
    return c
