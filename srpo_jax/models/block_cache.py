"""A cache of FLUX's blocks between the steps of a sampler, for passes that need no gradient.

What the blocks in the middle change of the joint sequence moves slowly from step to step: where a pass does not run
them, it adds what they changed last. TeaCache (arXiv 2411.19108) and the first block cache of ParaAttention keep this
change for as long as an estimate says; here the caller says when.
"""

import jax
import jax.numpy as jnp

from srpo_jax.models.flux import Flux, Modulations


def no_change(network: Flux, batch: int, tokens: int) -> jax.Array:
    """What ``velocity`` is given first, for so many text and image tokens together: [B, T + N, D]."""
    zeros = jnp.zeros((batch, tokens, network.config.width), network.compute.dtype)
    return network.compute.constrain(zeros, "tokens")


def velocity(
    network: Flux,
    inputs: tuple[jax.Array, jax.Array, Modulations, jax.Array, jax.Array],
    change: jax.Array,
    renew: jax.Array,
    ends: tuple[int, int],
) -> tuple[jax.Array, jax.Array]:
    """The velocity with the blocks in the middle replaced, where ``renew`` is false, by what they changed before.

    Args:
      network: the transformer.
      inputs: what ``Flux.modulated`` is called with.
      change: [B, T + N, D] in the compute dtype, of the joint sequence from before the middle to behind it.
      renew: a boolean scalar: whether the middle runs.
      ends: how many double blocks at the start and single blocks at the end always run.

    Returns:
      The velocity, and the change that it was made with.
    """
    latents, text, modulations, *ids = inputs
    sizes, (first, last) = network.config, ends
    behind = sizes.num_single_layers - last
    img, txt, table = network.enter(latents, text, *ids)
    img, txt = network.double(img, txt, modulations, table, range(first))
    before = network.join(txt, img)

    def run(change: jax.Array) -> tuple[jax.Array, jax.Array]:
        del change
        streams = network.double(img, txt, modulations, table, range(first, sizes.num_layers))
        after = network.single(network.join(*streams[::-1]), modulations, table, range(behind))
        return after, after - before

    def keep(change: jax.Array) -> tuple[jax.Array, jax.Array]:
        return before + change, change

    x, change = jax.lax.cond(renew, run, keep, change)
    x = network.single(x, modulations, table, range(behind, sizes.num_single_layers))
    return network.leave(x[:, text.shape[1] :], modulations), change
