"""The analytic FLOPs against what XLA counts in unrolled programs, at true widths with few blocks; nothing runs."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from helpers.counting import CLIP, FLUX, IMAGE, TEXT, VAE, array, counted, network, run_flux

from srpo_jax.config import default
from srpo_jax.costs import flops
from srpo_jax.families import flux_costs
from srpo_jax.families.flux import DEV
from srpo_jax.models import lora
from srpo_jax.models.compute import Compute, bind, join
from srpo_jax.weights import folder


def test_transformer():
    graphdef, params = network("flux", FLUX)
    run, inputs = run_flux(graphdef)
    work = flux_costs.transformer(FLUX, IMAGE, TEXT)
    assert work.total == pytest.approx(counted(run, params, *inputs), rel=0.01)
    assert folder.parameters("flux", FLUX) == sum(leaf.size for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("remat", ["none", "dots", "full", "out", "out+attention", "out+attention+qkv+mlp"])
def test_transformer_gradient(remat):
    graphdef, params = network("flux", FLUX, remat=remat)
    run, inputs = run_flux(graphdef)
    found = counted(jax.grad(lambda params, *inputs: run(params, *inputs).sum()), params, *inputs)
    work = flux_costs.transformer(FLUX, IMAGE, TEXT).gradient(trained=True, remat=remat, attention="xla")
    assert work.hardware == pytest.approx(found, rel=0.01)
    assert (work.model == work.hardware) == (remat == "none")


@pytest.mark.parametrize("targets", [tuple(default().lora.targets), (".*",)], ids=["default", "all"])
@pytest.mark.parametrize("remat", ["none", "dots", "full", "out+attention"])
def test_transformer_gradient_of_factors(remat, targets):
    """The frozen kernels' gradients, two thirds of a backward pass's weights, are not in the program."""
    settings = lora.Lora(16, 16.0, targets)
    graphdef, params = lora.abstract(folder.constructor("flux", FLUX, Compute(scan_unroll=100, remat=remat)), settings)
    run, inputs = run_flux(graphdef)
    factors, base = lora.split(params)

    def gradient(factors, base, *inputs):
        return jax.grad(lambda factors: run(join(factors, base), *inputs).sum())(factors)

    found = counted(gradient, factors, base, *inputs)
    work = flux_costs.adapted(FLUX, settings, IMAGE, TEXT, remat=remat, attention="xla")
    assert work.hardware == pytest.approx(found, rel=0.01)
    assert (work.model == work.hardware) == (remat == "none")
    low = flux_costs.factors(FLUX, settings, IMAGE, TEXT)
    assert low.parameters == sum(leaf.size for leaf in jax.tree.leaves(factors))
    forward = counted(lambda factors, base, *inputs: run(join(factors, base), *inputs), factors, base, *inputs)
    assert flux_costs.transformer(FLUX, IMAGE, TEXT).total + low.products == pytest.approx(forward, rel=0.01)


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
    config = dataclasses.replace(DEV.text["text_encoder_2"], num_layers=1)
    graphdef, params = network("t5", config)
    found = counted(lambda params, ids: bind(graphdef, params)(ids), params, ids)
    assert flops.t5(config, 77).total == pytest.approx(found, rel=0.01)
