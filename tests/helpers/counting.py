"""What XLA counts in unrolled programs, and networks at true widths with few blocks to be counted; nothing runs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from srpo_jax.families.flux import DEV
from srpo_jax.models import clip
from srpo_jax.models.compute import Compute, bind
from srpo_jax.weights import folder

FLUX = dataclasses.replace(DEV.transformer, num_layers=1, num_single_layers=2)
VAE = DEV.autoencoder
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
