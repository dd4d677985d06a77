"""The arithmetic of one update, part by part: what each part of it runs of the networks, and how often.

Two figures a part (``flops.Work``), from a config and sizes alone.
"""

import dataclasses

from ml_collections import ConfigDict

from srpo_jax.algorithm import flow
from srpo_jax.algorithm.settings import LATENT_FACTOR
from srpo_jax.architectures import TextArchitecture
from srpo_jax.costs import flops
from srpo_jax.costs.flops import Work
from srpo_jax.models.flux import FluxConfig
from srpo_jax.models.lora import Lora
from srpo_jax.program import CAPTIONS, Architecture, used_rewards

# The parts of an update, in the order in which they run.
PARTS = ("captions", "rollout", "transformer", "autoencoder", "reward", "optimizer")

# AdamW behind the clip, of one parameter: norm 2, clip 1, two moments 3 + 4, the second from its root 1, their
# corrections 2, epsilon and quotient 2, decay 2, rate 1, difference 1; roots are not counted. It is memory that limits
# this part, not arithmetic.
ADAMW = 19


def terms(config: ConfigDict) -> int:
    """How many gradient-carrying steps a sample takes in one update."""
    return {
        "srpo": len(config.align.branches),
        "direct_align": 1,
        "refl": 1,
        "draft_lv": config.draft_lv.renoisings,
    }[config.method]


def tokens(config: ConfigDict) -> tuple[int, int]:
    """(image tokens, text tokens) of a sample in the transformer."""
    side = LATENT_FACTOR * flow.PATCH
    return (config.data.height // side) * (config.data.width // side), config.data.text_length


def rollout_steps(config: ConfigDict) -> tuple[float, float]:
    """Steps of a sample's rollout in one update, of all blocks and of few (``rollout.cache``): where a rollout serves
    several updates, its share; none where real pictures take its place."""
    if config.data.rollout == "offline":
        return 0.0, 0.0
    whole = -(-config.rollout.steps // config.rollout.cache)
    return whole / config.rollout.reuse, (config.rollout.steps - whole) / config.rollout.reuse


def rollout_blocks(config: ConfigDict, sizes: FluxConfig) -> float:
    """How many of the transformer's blocks a sample passes in an update's rollout."""
    whole, few = rollout_steps(config)
    return whole * (sizes.num_layers + sizes.num_single_layers) + few * sum(config.rollout.cache_ends)


def rollout(config: ConfigDict, sizes: FluxConfig) -> Work:
    """One sample's rollout in an update.

    A step is a whole forward pass, or one with few blocks where the others' change is kept. Modulations are made of all
    steps and blocks at once.
    """
    first, last = config.rollout.cache_ends
    lora = Lora.from_config(config.lora)

    def step(blocks: FluxConfig, share: float) -> Work:
        low = 0.0 if lora is None else share * flops.factors(sizes, lora, *tokens(config)).products
        low += flops.modulations(sizes) - flops.modulations(blocks)
        return flops.transformer(blocks, *tokens(config)).inference() + Work(low, low)

    whole, few = rollout_steps(config)
    # Of the factors, as many as of the blocks: both kinds of block have about the same.
    share = (first + last) / (sizes.num_layers + sizes.num_single_layers)
    ends = dataclasses.replace(sizes, num_layers=first, num_single_layers=last)
    return step(sizes, 1.0) * whole + step(ends, share) * few


def sample(config: ConfigDict, architecture: Architecture) -> dict[str, Work]:
    """The work that one sample of a batch takes in one update, by part, without the optimiser's.

    captions     the rewards' text towers, each on every caption variant of the prompt
    rollout      the transformer without gradient, once a step; where a rollout serves several updates, its share; none
                 where real pictures take its place
    transformer  forward and backward, once a term
    autoencoder  the decoder, forward and backward, once a term
    reward       the rewards' vision towers, forward and backward, once a term
    """
    data, remat = config.data, config.remat
    flux = flops.transformer(architecture.transformer, *tokens(config))
    vae = flops.decoder(architecture.autoencoder, data.height, data.width)
    count, nothing = terms(config), Work(0.0, 0.0)
    lora = Lora.from_config(config.lora)
    options = dict(remat=remat.transformer, attention=config.model.attention)
    if lora is None:
        trained = flux.gradient(trained=True, **options)
    else:
        sizes = architecture.transformer, lora, *tokens(config)
        trained = flops.adapted(*sizes, **options)
    towers = [architecture.rewards[name] for name in used_rewards(config)]
    return {
        "captions": sum(
            (flops.text_tower(clip.text_config, clip.projection_dim).inference() * len(CAPTIONS) for clip in towers),
            nothing,
        ),
        "rollout": rollout(config, architecture.transformer),
        "transformer": trained * count,
        # The frozen networks attend in plain XLA whatever the backend.
        "autoencoder": vae.gradient(trained=False, remat=remat.autoencoder, attention="xla") * count,
        "reward": sum(
            (flops.image_tower(clip).gradient(trained=False, remat=remat.reward, attention="xla") for clip in towers),
            nothing,
        )
        * count,
    }


def update(config: ConfigDict, architecture: Architecture) -> dict[str, Work]:
    """The work of one whole update over all devices, by part (``PARTS``): samples times the batch, and the optimiser.

    Text encoders are not in it: they run beside the update, see ``text_encoders``.
    """
    parts = {name: work * config.data.batch_size for name, work in sample(config, architecture).items()}
    lora = Lora.from_config(config.lora)
    sizes = architecture.transformer
    once = float(ADAMW * (flops.parameters(sizes) if lora is None else flops.factors(sizes, lora, 0, 0).parameters))
    return parts | {"optimizer": Work(once, once)}


def text_encoders(text: TextArchitecture, tokens: int) -> Work:
    """CLIP and T5 on one prompt of so many T5 tokens."""
    return flops.text_tower(text.clip).inference() + flops.t5(text.t5, tokens).inference()
