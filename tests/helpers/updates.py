"""An update's smallest world: random networks, a recipe, a batch, and ways to run the gradient and the update."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from srpo_jax.algorithm import rewards, step
from srpo_jax.algorithm.settings import Settings
from srpo_jax.config import default
from srpo_jax.models import autoencoder, clip, flux
from srpo_jax.models.compute import build
from srpo_jax.optim import Optimizer

BATCH, TEXT = 4, 5
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
    return dataclasses.replace(Settings.from_config(config), **changes)


def make_networks(compute):
    flux_graph, params = build(lambda rngs: flux.Flux(FLUX, compute, rngs=rngs), seed=1)
    vae_graph, vae = build(lambda rngs: autoencoder.Autoencoder(VAE, compute, rngs=rngs), seed=2)
    clip_graph, clip_params = build(lambda rngs: clip.Clip(CLIP, compute, rngs=rngs), seed=3)
    networks = step.Networks(flux_graph, True, vae_graph, {"clip": rewards.Reward(clip_graph, 32, "clip", 1.0)})
    return networks, params, step.Frozen(vae, {"clip": clip_params})


def make_batch():
    """Random features and captions of ``BATCH`` samples."""
    keys = iter(jax.random.split(jax.random.key(7), 5))
    ids = {name: jax.random.randint(next(keys), (BATCH, 8), 0, 50) for name in ("positive", "negative", "caption")}
    text = jax.random.normal(next(keys), (BATCH, TEXT, 24))
    return step.Batch(text, jax.random.normal(next(keys), (BATCH, 20)), {"clip": ids})


def roll_out(networks, settings, params, frozen, batch, draws):
    """The batch with its latents, given or rolled out."""
    return jax.jit(functools.partial(step.with_latents, networks, settings))(params, frozen, batch, draws)


def rolled_out_gradient(networks, settings):
    """``step.gradient`` from the rollout on, one program."""

    @jax.jit
    def run(params, frozen, batch, draws):
        batch = step.with_latents(networks, settings, params, frozen, batch, draws)
        return step.gradient(networks, settings, params, frozen, batch, draws)

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

    def apply(params, grads, state, key, norm):
        return jax.tree.map(lambda p, g: p - rate * g, params, grads), state

    return Optimizer(lambda params: (), apply)


def run_update(tiny, settings, batch, key=0):
    networks, params, frozen = tiny
    optimizer = sgd(1.0)
    state = step.TrainState(jnp.int32(0), params, optimizer.init(params), params if settings.ema_decay else None)
    return jax.jit(step.make_update(networks, settings, optimizer))(state, frozen, batch, jax.random.key(key))


def assert_same_rollouts(networks, params, batch, recipes, stop=None):
    noise = step.draw(recipes[0], jax.random.key(0), BATCH).noise
    made = [
        jax.jit(functools.partial(step.rollout, networks, recipe))(params, batch, noise, stop) for recipe in recipes
    ]
    np.testing.assert_allclose(*made, atol=1e-5)
