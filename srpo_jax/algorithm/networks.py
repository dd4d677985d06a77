"""The networks as an update calls them: what a transformer is given, its velocity, and what latents decode to."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from srpo_jax.algorithm import flow
from srpo_jax.algorithm.preference import Scorer
from srpo_jax.algorithm.settings import Settings
from srpo_jax.families.base import Family
from srpo_jax.models.compute import Params, bind, cast_weights, join


def _where_it_lies(path: str, leaf: jax.Array) -> jax.Array:
    """Leaves a parameter where it is."""
    del path
    return leaf


@dataclasses.dataclass(frozen=True)
class Networks:
    """The graph definitions that an update runs; parameters come as arguments.

    Attributes:
      family: how the transformer and the autoencoder are called.
      transformer, autoencoder: their graph definitions.
      rewards: the mixture, by name.
      gather: called as ``gather(path, leaf)`` on each of the transformer's parameters before rollouts; returns it,
        perhaps put onto every device.
    """

    family: Family
    transformer: nnx.GraphDef
    autoencoder: nnx.GraphDef
    rewards: Mapping[str, Scorer]
    gather: Callable[[str, jax.Array], jax.Array] = _where_it_lies

    def tokens(self, settings: Settings) -> tuple[int, int]:
        """(N, C): the shape of a picture's packed latents."""
        return self.family.token_shape(settings.height, settings.width)


class Frozen(NamedTuple):
    """Parameters that training reads and never changes; ``base`` is the rest of the transformer's, beside low-rank
    factors that are trained (LoRA), or None."""

    autoencoder: Params
    rewards: dict[str, Params]
    base: Params | None = None


def conditioning(settings: Settings, sigma: jax.Array, guidance: float, batch: int) -> tuple[jax.Array, jax.Array]:
    """The times that the transformer is given at noise levels ``sigma``, of their shape, and its guidance [batch]."""
    time = flow.truncate_time(sigma) if settings.truncate_time else jnp.asarray(sigma, jnp.float32)
    scale = jnp.full((batch,), guidance, jnp.float32)
    if settings.round_time:
        # The released script's autocast rounds what enters the sinusoids: 822 becomes 820, 3500 becomes 3504.
        time, scale = (
            (value.astype(jnp.bfloat16) * jnp.bfloat16(1000)).astype(jnp.float32) / 1000 for value in (time, scale)
        )
    return time, scale


def velocity(
    networks: Networks,
    settings: Settings,
    params: Params,
    condition: Any,
    x: jax.Array,
    sigma: jax.Array,
    guidance: float,
) -> jax.Array:
    """The transformer's velocity, float32, at latents ``x`` [B, N, C] and noise level ``sigma`` (scalar or [B])."""
    family, transformer = networks.family, bind(networks.transformer, params)
    levels = jnp.broadcast_to(jnp.asarray(sigma), (len(x),))
    prepared = family.prepare(transformer, condition, *conditioning(settings, levels, guidance, len(x)))
    v = family.velocity(transformer, x, condition, prepared, settings.height, settings.width)
    return v.astype(jnp.float32)


def in_compute_dtype(networks: Networks, params: Params, base: Params | None = None) -> Params:
    """The transformer's parameters as its layers use them: cast once, where they are about to be used many times.

    With ``base`` (``Frozen``), which has its dtype already, ``params`` are the rest.
    """
    return cast_weights(params, bind(networks.transformer, join(params, base)).compute.dtype)


def decode(networks: Networks, settings: Settings, params: Params, tokens: jax.Array) -> jax.Array:
    """Packed latents [B, N, C] to the decoder's raw output [B, H, W, 3], about -1 .. 1 and not clipped."""
    autoencoder = bind(networks.autoencoder, params)
    return networks.family.decode(autoencoder, tokens, settings.height, settings.width)


def to_unit_range(decoded: jax.Array) -> jax.Array:
    """The decoder's output to an image in [0, 1]; no gradient where it is clipped."""
    return jnp.clip(decoded / 2 + 0.5, 0.0, 1.0)
