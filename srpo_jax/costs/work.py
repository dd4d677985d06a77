"""The arithmetic of one update, part by part: what each part of it runs of the networks, and how often.

Two figures a part (``flops.Work``), from a config and sizes alone.
"""

from ml_collections import ConfigDict

from srpo_jax.algorithm import methods
from srpo_jax.algorithm.methods import Cost
from srpo_jax.algorithm.preference import VARIANTS
from srpo_jax.algorithm.settings import Settings
from srpo_jax.architectures import Architecture, used_rewards
from srpo_jax.costs import flops
from srpo_jax.costs.flops import Forward, Work
from srpo_jax.families.base import Family
from srpo_jax.models.lora import Lora
from srpo_jax.rewards import REWARDS
from srpo_jax.weights import folder

# The parts of an update, in the order in which they run.
PARTS = ("captions", "rollout", "transformer", "autoencoder", "reward", "optimizer")

# AdamW behind the clip, of one parameter: norm 2, clip 1, two moments 3 + 4, the second from its root 1, their
# corrections 2, epsilon and quotient 2, decay 2, rate 1, difference 1, three numbers kept where an update is not finite
# 3; roots are not counted. It is memory that limits this part, not arithmetic.
ADAMW = 22


def counts(config: ConfigDict, family: Family) -> Cost:
    """How often a sample passes through each network in one update."""
    return methods.cost(Settings.from_config(config, family))


def tokens(config: ConfigDict, family: Family) -> tuple[int, int]:
    """(image tokens, text tokens) of a sample in the transformer."""
    return family.token_shape(config.data.height, config.data.width)[0], config.data.text_length


def rollout_steps(config: ConfigDict, family: Family) -> tuple[float, float]:
    """Steps of a sample's rollout in one update, of all blocks and of few (``rollout.cache``): where a rollout serves
    several updates, its share; none where real pictures take its place."""
    taken = counts(config, family).rollout
    whole = taken * -(-config.rollout.steps // config.rollout.cache) / config.rollout.steps
    return whole, taken - whole


def rollout_passes(config: ConfigDict, architecture: Architecture) -> tuple[tuple[object, float], ...]:
    """(config of a transformer, passes through it) of a sample's rollout in an update: of all blocks, and of few."""
    family, sizes = architecture.family, architecture.transformer
    whole, few = rollout_steps(config, family)
    passes = ((sizes, whole),)
    return (*passes, (family.with_blocks(sizes, tuple(config.rollout.cache_ends)), few)) if few else passes


def rollout(config: ConfigDict, architecture: Architecture) -> Work:
    """One sample's rollout in an update.

    A step is a whole forward pass, or one with few blocks where the others' change is kept. What blocks draw from the
    time is made for all steps and blocks at once.
    """
    family, sizes = architecture.family, architecture.transformer
    lora, size, total = Lora.from_config(config.lora), tokens(config, family), Work(0.0, 0.0)
    for passed, count in rollout_passes(config, architecture):
        low = family.preparation(sizes) - family.preparation(passed)
        if lora is not None:
            # Of the factors, as many as of the blocks: all kinds of block have about the same.
            share = sum(family.blocks(passed)) / sum(family.blocks(sizes))
            low += share * family.factors(sizes, lora, *size).products
        total += (family.forward(passed, *size).inference() + Work(low, low)) * count
    return total


def sample(config: ConfigDict, architecture: Architecture) -> dict[str, Work]:
    """The work that one sample of a batch takes in one update, by part, without the optimiser's.

    captions     what the rewards make of captions alone, each of every variant of the prompt
    rollout      the transformer without gradient, once a step; where a rollout serves several updates, its share; none
                 where real pictures take its place
    transformer  forward and backward, once a term or a pass
    autoencoder  the decoder, forward and backward, once a picture that is scored
    reward       what the rewards make of pictures, and of pictures and captions together, forward and backward, once a
                 picture; for the metrics, once more without gradient under the plain caption
    """
    data, family = config.data, architecture.family
    size, lora = tokens(config, family), Lora.from_config(config.lora)
    settings = Settings.from_config(config, family)
    count, followed = methods.cost(settings), methods.follows(settings)
    # Before a plan, "auto" keeps nothing.
    remat = {part: "full" if option == "auto" else option for part, option in config.remat.items()}
    options = dict(remat=remat["transformer"], attention=config.model.attention)
    if lora is None:
        trained = family.forward(architecture.transformer, *size).gradient(trained=True, **options)
    else:
        trained = family.adapted(architecture.transformer, lora, *size, **options)
    vae = flops.decoder(architecture.autoencoder, data.height, data.width)
    # The frozen networks attend in plain XLA whatever the backend.
    frozen = dict(trained=False, attention="xla")
    captions = reward = Work(0.0, 0.0)
    for name, used in used_rewards(config).items():
        scorer = REWARDS[used.kind](architecture.rewards[name], None)
        captions += _inference(scorer.prepare_cost()) * len(VARIANTS)
        if (cost := scorer.look_cost()) is not None:
            reward += cost.gradient(remat=remat["reward"], **frozen)
        if (cost := scorer.score_cost()) is not None:
            reward += cost.gradient(remat=remat["reward"], **frozen) * len(followed) + cost.inference()
    return {
        "captions": captions,
        "rollout": rollout(config, architecture),
        "transformer": trained * count.passes,
        "autoencoder": vae.gradient(remat=remat["autoencoder"], **frozen) * count.pictures,
        "reward": reward * count.pictures,
    }


def _inference(cost: Forward | None) -> Work:
    return Work(0.0, 0.0) if cost is None else cost.inference()


def update(config: ConfigDict, architecture: Architecture) -> dict[str, Work]:
    """The work of one whole update over all devices, by part (``PARTS``): samples times the batch, and the optimiser.

    Text encoders are not in it: they run beside the update, see ``text_encoders``.
    """
    parts = {name: work * config.data.batch_size for name, work in sample(config, architecture).items()}
    lora = Lora.from_config(config.lora)
    family, sizes = architecture.family, architecture.transformer
    trained = folder.parameters(family.network, sizes) if lora is None else family.factors(sizes, lora, 0, 0).parameters
    once = float(ADAMW * trained)
    return parts | {"optimizer": Work(once, once)}
