"""True classifier-free guidance, for families whose transformer embeds no guidance scale: two passes, one velocity."""

import jax
import jax.numpy as jnp


def classifier_free(
    conditional: jax.Array, unconditional: jax.Array, scale: jax.Array, rescale: bool = False
) -> jax.Array:
    """``u + scale * (c - u)`` (Ho, Salimans, arXiv 2207.12598), float32.

    Args:
      conditional, unconditional: velocities ``[B, N, C]`` under the prompt and under the empty or a negative one.
      scale: ``[B]``.
      rescale: give each token's velocity the norm of the conditional one, as Qwen-Image's pipeline does.
    """
    c, u = conditional.astype(jnp.float32), unconditional.astype(jnp.float32)
    guided = u + scale[:, None, None] * (c - u)
    if not rescale:
        return guided
    norms = [jnp.linalg.norm(v, axis=-1, keepdims=True) for v in (c, guided)]
    return guided * (norms[0] / jnp.maximum(norms[1], jnp.finfo(jnp.float32).tiny))
