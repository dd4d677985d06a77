"""Random keys from seeds of up to 64 bits."""

import jax
import jax.numpy as jnp


def key(seed: int) -> jax.Array:
    """The key of a seed from 0 to ``values.SEED``; no two are alike, and below 2^32 it is ``jax.random.key(seed)``.

    That function drops what is above 32 bits.
    """
    high, low = divmod(int(seed), 1 << 32)
    return jax.random.wrap_key_data(jnp.array([high, low], jnp.uint32), impl="threefry2x32")
