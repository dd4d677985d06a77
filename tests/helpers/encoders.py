"""What text encoders give by themselves, and their fingerprints, to compare data sets with."""

import jax

from srpo_jax.families.flux import FLUX
from srpo_jax.weights import fingerprint


def features(encoders, prompts, length, batch):
    """Arrays by name of all prompts, ``batch`` at a time; what fills the last batch is cut off."""
    apply, parts = jax.jit(encoders.apply), []
    filled = [*prompts, *[""] * (-len(prompts) % batch)]
    for start in range(0, len(filled), batch):
        parts.append(apply(encoders.params, *encoders.tokens(filled[start : start + batch], length)))
    return {name: jax.numpy.concatenate([part[name] for part in parts])[: len(prompts)] for name in parts[0]}


def fingerprints(pipeline):
    """Of a FLUX pipeline's text encoders and tokenizers."""
    return fingerprint.of_parts(pipeline, FLUX.text_folders, FLUX.tokenizers)
