"""The analytic FLOPs against what XLA counts in unrolled programs, at true widths with few blocks; nothing runs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from srpo_jax import architectures, optim, program, sharding
from srpo_jax.config import default
from srpo_jax.costs import flops
from srpo_jax.models import clip, lora
from srpo_jax.models.compute import Compute, bind, join
from srpo_jax.weights import folder

FLUX = dataclasses.replace(architectures.FLUX_DEV, num_layers=1, num_single_layers=2)
VAE = architectures.FLUX_VAE
CLIP = dataclasses.replace(
    clip.VIT_H_14,
    text_config=dataclasses.replace(clip.VIT_H_14.text_config, num_hidden_layers=2),
    vision_config=dataclasses.replace(clip.VIT_H_14.vision_config, num_hidden_layers=2),
)
IMAGE, TEXT = 144, 40  # tokens


def counted(function, *arguments):
    """XLA's count for the program as it is written; every scan in it must be unrolled."""
    lowered = jax.jit(function).lower(*arguments)
    assert "stablehlo.while" not in lowered.as_text()
    return lowered.cost_analysis()["flops"]


def network(name, config, **options):
    return folder.abstract(name, config, Compute(scan_unroll=100, **options))


def array(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def run_flux(graphdef):
    ids = np.zeros((IMAGE, 3), np.float32), np.zeros((TEXT, 3), np.float32)

    def run(params, latents, text, pooled, time, guidance):
        return bind(graphdef, params)(latents, text, pooled, time, guidance, *map(jnp.asarray, ids))

    return run, (array(1, IMAGE, 64), array(1, TEXT, 4096), array(1, 768), array(1), array(1))


def test_transformer():
    graphdef, params = network("flux", FLUX)
    run, inputs = run_flux(graphdef)
    work = flops.transformer(FLUX, IMAGE, TEXT)
    assert work.total == pytest.approx(counted(run, params, *inputs), rel=0.01)
    assert flops.parameters(FLUX) == sum(leaf.size for leaf in jax.tree.leaves(params))


def test_rollout_with_kept_blocks(monkeypatch):
    """Of 7 steps, 3 run everything; a step between them is the blocks that always run."""
    config = default()
    config.data.text_length, config.rollout.steps = TEXT, 7
    config.data.height, config.data.width = 16, 16 * IMAGE
    whole = flops.transformer(FLUX, IMAGE, TEXT).total
    assert flops.rollout(config, FLUX).model == pytest.approx(7 * whole)
    config.rollout.cache, config.rollout.cache_ends = 3, (0, 1)
    monkeypatch.setattr("jax.lax.cond", lambda renew, run, keep, *operands: keep(*operands))
    graphdef, params = network("flux", FLUX)
    _, inputs = run_flux(graphdef)
    ids = np.zeros((IMAGE, 3), np.float32), np.zeros((TEXT, 3), np.float32)

    def run(params, change, *inputs):
        network, (latents, text, *vectors) = bind(graphdef, params), inputs
        values = latents, text, network.modulations(*vectors), *map(jnp.asarray, ids)
        return network.through_cache(values, change, False, (0, 1))[0]

    kept = counted(run, params, array(1, IMAGE + TEXT, FLUX.width), *inputs)
    assert flops.rollout(config, FLUX).model == pytest.approx(3 * whole + 4 * kept, rel=0.01)
    assert kept < 0.45 * whole


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_transformer_gradient(remat):
    graphdef, params = network("flux", FLUX, remat=remat)
    run, inputs = run_flux(graphdef)
    found = counted(jax.grad(lambda params, *inputs: run(params, *inputs).sum()), params, *inputs)
    work = flops.transformer(FLUX, IMAGE, TEXT).gradient(trained=True, remat=remat, attention="xla")
    assert work.hardware == pytest.approx(found, rel=0.01)
    assert (work.model == work.hardware) == (remat == "none")


@pytest.mark.parametrize("targets", [tuple(default().lora.targets), (".*",)], ids=["default", "all"])
@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_transformer_gradient_of_factors(remat, targets):
    """The frozen kernels' gradients, two thirds of a backward pass's weights, are not in the program."""
    settings = lora.Lora(16, 16.0, targets)
    graphdef, params = lora.abstract(FLUX, Compute(scan_unroll=100, remat=remat), settings)
    run, inputs = run_flux(graphdef)
    factors, base = lora.split(params)

    def gradient(factors, base, *inputs):
        return jax.grad(lambda factors: run(join(factors, base), *inputs).sum())(factors)

    found = counted(gradient, factors, base, *inputs)
    work = flops.adapted(FLUX, settings, IMAGE, TEXT, remat=remat, attention="xla")
    assert work.hardware == pytest.approx(found, rel=0.01)
    assert (work.model == work.hardware) == (remat == "none")
    low = flops.factors(FLUX, settings, IMAGE, TEXT)
    assert low.parameters == sum(leaf.size for leaf in jax.tree.leaves(factors))
    forward = counted(lambda factors, base, *inputs: run(join(factors, base), *inputs), factors, base, *inputs)
    assert flops.transformer(FLUX, IMAGE, TEXT).total + low.products == pytest.approx(forward, rel=0.01)


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_decoder(remat):
    graphdef, params = network("autoencoder", VAE, remat=remat)

    def run(latents, params):
        return bind(graphdef, params).decode(latents).sum()

    work = flops.decoder(VAE, 128, 192)
    latents = array(1, 16, 24, 16)
    assert work.total == pytest.approx(counted(run, latents, params), rel=0.02)
    found = counted(jax.grad(run), latents, params)
    assert work.gradient(trained=False, remat=remat, attention="xla").hardware == pytest.approx(found, rel=0.02)


def test_encoder():
    graphdef, params = network("autoencoder", VAE)
    found = counted(lambda params, images: bind(graphdef, params).encode(images), params, array(1, 128, 192, 3))
    assert flops.encoder(VAE, 128, 192).total == pytest.approx(found, rel=0.02)


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_image_tower(remat):
    graphdef, params = network("clip", CLIP, remat=remat)

    def run(pixels, params):
        return bind(graphdef, params).encode_image(pixels).sum()

    work, pixels = flops.image_tower(CLIP), array(1, 224, 224, 3)
    assert work.total == pytest.approx(counted(run, pixels, params), rel=0.01)
    found = counted(jax.grad(run), pixels, params)
    # Norms and activations run again too, which are not counted.
    assert work.gradient(trained=False, remat=remat, attention="xla").hardware == pytest.approx(found, rel=0.015)


def test_text_encoders():
    ids = jax.ShapeDtypeStruct((1, 77), jnp.int32)
    graphdef, params = network("clip", CLIP)
    found = counted(lambda params, ids: bind(graphdef, params).encode_text(ids), params, ids)
    assert flops.text_tower(CLIP.text_config, CLIP.projection_dim).total == pytest.approx(found, rel=0.02)
    config = dataclasses.replace(architectures.T5_XXL, num_layers=1)
    graphdef, params = network("t5", config)
    found = counted(lambda params, ids: bind(graphdef, params)(ids), params, ids)
    assert flops.t5(config, 77).total == pytest.approx(found, rel=0.01)


def test_a_whole_update(monkeypatch):
    """Of one rollout step and one term: a loop that runs once is counted right."""
    monkeypatch.setattr(optim, "LARGEST", 2**40)
    config = default()
    config.method, config.rollout.steps = "direct_align", 1
    config.data.batch_size, config.data.height, config.data.width, config.data.text_length = 1, 96, 192, 24
    config.model.scan_unroll = 100
    few = program.Architecture(FLUX, VAE, {"hps": CLIP})
    built = program.build(config, sharding.make_mesh(config.mesh), few)
    work = flops.update(config, few)
    assert tuple(work) == flops.PARTS
    found = built.lower().cost_analysis()["flops"]
    assert sum(part.hardware for part in work.values()) == pytest.approx(found, rel=0.01)

    def optimize(grads, state):
        key, norm = jax.random.key(0), optax.tree.norm(grads)
        return built.optimizer.apply(state.params, grads, state.opt_state, key, norm)

    assert work["optimizer"].model == pytest.approx(counted(optimize, built.state.params, built.state), rel=0.01)


def test_the_recipe():
    """25 steps of rollout and two gradients of the transformer are 31 forward passes, 1155 TFLOP."""
    config = default()
    architecture, text = architectures.published(config, "flux-dev")
    work = flops.sample(config, architecture)
    assert work["rollout"].model + work["transformer"].model == pytest.approx(1155e12, rel=1e-3)
    assert work["transformer"].model == pytest.approx(6 / 25 * work["rollout"].model, rel=1e-3)
    assert work["transformer"].hardware == pytest.approx(8 / 25 * work["rollout"].model, rel=1e-3)
    assert flops.text_encoders(text, 512).model == pytest.approx(2 * 4.6e9 * 512, rel=0.1)
    config.data.rollout = "offline"
    offline = flops.sample(config, architecture)
    assert offline["rollout"] == flops.Work(0.0, 0.0)
    assert {name: offline[name] for name in work if name != "rollout"} == {k: work[k] for k in work if k != "rollout"}
    config.data.rollout = "online"
    config.align.branches = ("denoise",)
    half = flops.sample(config, architecture)
    for part in ("transformer", "autoencoder", "reward"):
        assert work[part] == half[part] * 2
    config.model.attention = "cudnn"
    fused = flops.sample(config, architecture)["transformer"]
    assert fused.model == half["transformer"].model
    assert fused.hardware > half["transformer"].hardware
