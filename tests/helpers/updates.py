"""An update's smallest world: random networks, a recipe, a batch, and ways to run the gradient and the update."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from srpo_jax.algorithm import step
from srpo_jax.algorithm.batch import Batch
from srpo_jax.algorithm.methods import METHODS
from srpo_jax.algorithm.networks import Frozen, Networks
from srpo_jax.algorithm.rollout import rollout
from srpo_jax.algorithm.settings import Settings
from srpo_jax.config import default
from srpo_jax.families import flux as families_flux
from srpo_jax.models import autoencoder, clip, flux
from srpo_jax.models.compute import build
from srpo_jax.optim import Optimizer
from srpo_jax.rewards.clip import ClipReward

BATCH, TEXT = 4, 5
TOKENS = 6, 64  # of a picture of 32x48
FLUX = flux.FluxConfig(
    in_channels=64, out_channels=64, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
    joint_attention_dim=24, pooled_projection_dim=20, guidance_embeds=True, axes_dims_rope=(4, 6, 6),
)  # fmt: skip
VAE = autoencoder.AutoencoderConfig(block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4)
CLIP = clip.ClipConfig(
    clip.ClipTextConfig(50, 16, 32, 1, 2, 8, "gelu", 49),
    clip.ClipVisionConfig(16, 32, 1, 2, 32, 16, "gelu"),
    projection_dim=12,
)


def settings(**changes):
    """A small recipe: 32x48 images, 3 rollout steps."""
    config = default()
    config.data.height, config.data.width = 32, 48
    config.rollout.steps, config.rollout.noise = 3, "per_sample"
    config.refl.late_steps = 2
    return dataclasses.replace(Settings.from_config(config, families_flux.FLUX), **changes)


def make_networks(compute):
    flux_graph, params = build(lambda rngs: flux.Flux(FLUX, compute, rngs=rngs), seed=1)
    vae_graph, vae = build(lambda rngs: autoencoder.Autoencoder(VAE, compute, rngs=rngs), seed=2)
    clip_graph, clip_params = build(lambda rngs: clip.Clip(CLIP, compute, rngs=rngs), seed=3)
    networks = Networks(families_flux.FLUX, flux_graph, vae_graph, {"clip": ClipReward(CLIP, clip_graph)})
    return networks, params, Frozen(vae, {"clip": clip_params})


def make_batch():
    """Random features and captions of ``BATCH`` samples."""
    keys = iter(jax.random.split(jax.random.key(7), 5))
    ids = {name: jax.random.randint(next(keys), (BATCH, 8), 0, 50) for name in ("positive", "negative", "caption")}
    text = jax.random.normal(next(keys), (BATCH, TEXT, 24))
    condition = {"text": text, "pooled": jax.random.normal(next(keys), (BATCH, 20))}
    return Batch(condition, {"clip": ids})


def draw(networks, settings, seed=0):
    return step.draw(networks, settings, jax.random.key(seed), BATCH)


def images_of(networks, settings, params, frozen, batch, draws):
    """What is to be improved, given or rolled out."""
    return jax.jit(functools.partial(step.images_of, networks, settings))(params, frozen, batch, draws)


def make_terms(settings, images, draws):
    return METHODS[settings.method].terms(settings, images, draws.own)


def rolled_out_gradient(networks, settings):
    """``step.gradient`` from the rollout on, one program."""

    @jax.jit
    def run(params, frozen, batch, draws):
        images = step.images_of(networks, settings, params, frozen, batch, draws)
        return step.gradient(networks, settings, params, frozen, batch, images, draws.own)

    return run


def gradient(tiny, settings, batch, draws):
    networks, params, frozen = tiny
    return rolled_out_gradient(networks, settings)(params, frozen, batch, draws)


def distance(a, b):
    """Relative distance of two parameter trees."""
    difference = optax.tree.norm(jax.tree.map(lambda x, y: x - y, a, b))
    return float(difference / optax.tree.norm(b))


def sgd(rate):
    """Plain gradient descent, without a state."""

    def apply(params, grads, state, key, norm, good=True):
        return jax.tree.map(lambda p, g: jnp.where(good, p - rate * g, p), params, grads), state

    return Optimizer(lambda params: (), apply, lambda state, norm, largest: jnp.array(True))


def run_update(tiny, settings, batch, key=0):
    networks, params, frozen = tiny
    optimizer = sgd(1.0)
    state = step.TrainState(jnp.int32(0), params, optimizer.init(params), params if settings.ema_decay else None)
    return jax.jit(step.make_update(networks, settings, optimizer))(state, frozen, batch, jax.random.key(key))


def assert_same_rollouts(networks, params, batch, recipes, keep=None):
    """The same images, and the same states where ``keep`` names steps."""
    noise = draw(networks, recipes[0]).noise
    one, other = (
        jax.jit(functools.partial(rollout, networks, recipe))(params, batch, noise, keep) for recipe in recipes
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), one, other)
