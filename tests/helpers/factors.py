"""Random LoRA factors and files of them."""

import jax
import numpy as np
import safetensors.numpy

from srpo_jax.models import lora
from srpo_jax.models.flux import FluxConfig
from srpo_jax.weights import folder

EVERYTHING = (".*",)


def random_factors(config: FluxConfig, settings: lora.Lora, seed: int = 0):
    """Factors of which none is 0."""
    like = lora.split(lora.abstract(folder.constructor("flux", config), settings)[1])[0]
    generator = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: 0.2 * generator.normal(size=leaf.shape).astype(np.float32), like)


def write_file(path, tensors, **metadata):
    safetensors.numpy.save_file({name: np.ascontiguousarray(t) for name, t in tensors.items()}, path, metadata)
    return str(path)
