"""An update's arithmetic: against what XLA counts in a whole unrolled program, and the recipe's known figures."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.counting import CLIP, FLUX, IMAGE, TEXT, VAE, array, counted, network, run_flux

from srpo_jax import architectures, optim, program, sharding
from srpo_jax.architectures import Architecture
from srpo_jax.config import default
from srpo_jax.costs import flops, work
from srpo_jax.families import flux_costs
from srpo_jax.families.flux import FLUX as FAMILY
from srpo_jax.models import block_cache
from srpo_jax.models.compute import bind


def test_rollout_with_kept_blocks(monkeypatch):
    """Of 7 steps, 3 run everything; a step between them is the blocks that always run."""
    config = default()
    config.data.text_length, config.rollout.steps = TEXT, 7
    config.data.height, config.data.width = 16, 16 * IMAGE
    whole, sizes = flux_costs.transformer(FLUX, IMAGE, TEXT).total, Architecture(FAMILY, FLUX, VAE, {}, {})
    assert work.rollout(config, sizes).model == pytest.approx(7 * whole)
    config.rollout.cache, config.rollout.cache_ends = 3, (0, 1)
    monkeypatch.setattr("jax.lax.cond", lambda renew, run, keep, *operands: keep(*operands))
    graphdef, params = network("flux", FLUX)
    _, inputs = run_flux(graphdef)
    ids = np.zeros((IMAGE, 3), np.float32), np.zeros((TEXT, 3), np.float32)

    def run(params, change, *inputs):
        network, (latents, text, *vectors) = bind(graphdef, params), inputs
        values = latents, text, network.modulations(*vectors), *map(jnp.asarray, ids)
        return block_cache.velocity(network, values, change, False, (0, 1))[0]

    kept = counted(run, params, array(1, IMAGE + TEXT, FLUX.width), *inputs)
    assert work.rollout(config, sizes).model == pytest.approx(3 * whole + 4 * kept, rel=0.01)
    assert kept < 0.45 * whole


def test_a_whole_update(monkeypatch):
    """Of one rollout step and one term: a loop that runs once is counted right."""
    monkeypatch.setattr(optim, "LARGEST", 2**40)
    config = default()
    config.method, config.rollout.steps = "direct_align", 1
    config.data.batch_size, config.data.height, config.data.width, config.data.text_length = 1, 96, 192, 24
    config.model.scan_unroll = 100
    config.remat.transformer = config.remat.autoencoder = config.remat.reward = "full"
    few = Architecture(FAMILY, FLUX, VAE, {}, {"hps": CLIP})
    built = program.build(config, sharding.make_mesh(config.mesh), few)
    parts = work.update(config, few)
    assert tuple(parts) == work.PARTS
    found = built.lower().cost_analysis()["flops"]
    assert sum(part.hardware for part in parts.values()) == pytest.approx(found, rel=0.01)

    def optimize(grads, state):
        key, norm = jax.random.key(0), optax.tree.norm(grads)
        return built.optimizer.apply(state.params, grads, state.opt_state, key, norm)

    assert parts["optimizer"].model == pytest.approx(counted(optimize, built.state.params, built.state), rel=0.01)


def test_the_recipe():
    """25 steps of rollout and two gradients of the transformer are 31 forward passes, 1155 TFLOP."""
    config = default()
    architecture = architectures.published(config, "flux-dev")
    parts = work.sample(config, architecture)
    assert parts["rollout"].model + parts["transformer"].model == pytest.approx(1155e12, rel=1e-3)
    assert parts["transformer"].model == pytest.approx(6 / 25 * parts["rollout"].model, rel=1e-3)
    assert parts["transformer"].hardware == pytest.approx(8 / 25 * parts["rollout"].model, rel=1e-3)
    config.data.images = "stored"
    offline = work.sample(config, architecture)
    assert offline["rollout"] == flops.Work(0.0, 0.0)
    assert {name: offline[name] for name in parts if name != "rollout"} == {
        k: parts[k] for k in parts if k != "rollout"
    }
    config.data.images = "rollout"
    config.align.branches = ("denoise",)
    half = work.sample(config, architecture)
    for part in ("transformer", "autoencoder", "reward"):
        assert parts[part] == half[part] * 2
    config.model.attention = "cudnn"
    fused = work.sample(config, architecture)["transformer"]
    assert fused.model == half["transformer"].model
    assert fused.hardware > half["transformer"].hardware
