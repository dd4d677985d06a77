"""How far a model's velocities have gone from its base's, at states that the base itself passes through.

The states are those of a short Euler trajectory of the base on fixed prompts and noise. They and the base's velocities
there are kept, so that the base need not be: it may be trained, or give way to the next model.
"""

import os
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from srpo_jax import sampling, sharding
from srpo_jax.algorithm.rollout import of_step
from srpo_jax.evaluation import signals
from srpo_jax.families.base import Condition, Family
from srpo_jax.models.compute import Params, bind

STEPS = 4  # of the trajectory


class Trace(NamedTuple):
    """Where a base passes and how fast: states and velocities, float32 [B, STEPS, N, C] each."""

    states: np.ndarray
    velocities: np.ndarray


class Drift:
    """Velocities on fixed prompts and noise, compiled once.

    Args:
      mesh: where the parameters lie.
      family: of the model.
      transformer: graph definition.
      pipeline: folder, whose scheduler file gives the noise levels.
      look: sides and guidance; its steps are not used.
      chunk: of a ``sampling.Painter``: conditions and noise.
    """

    def __init__(
        self,
        mesh: Mesh,
        family: Family,
        transformer: nnx.GraphDef,
        pipeline: str | os.PathLike,
        look: sampling.Look,
        chunk: sampling.Chunk,
    ):
        self._mesh, self._chunk = mesh, chunk
        sigmas = family.schedule(pipeline, STEPS, look.height, look.width)
        indices, lengths = np.arange(STEPS), np.diff(sigmas).astype(np.float32)

        def velocity_of(params: Params, condition: Condition, count: int) -> Callable[..., jax.Array]:
            network, scale = bind(transformer, params), jnp.full((count,), look.guidance, jnp.float32)
            steps = family.prepare_steps(network, condition, jnp.asarray(sigmas[:-1]), scale)

            def velocity(x: jax.Array, index: jax.Array) -> jax.Array:
                prepared = of_step(steps, index)
                return family.velocity(network, x, condition, prepared, look.height, look.width).astype(jnp.float32)

            return velocity

        def trace(params: Params, condition: Condition, noise: jax.Array) -> tuple[jax.Array, jax.Array]:
            velocity = velocity_of(params, condition, len(noise))

            def step(x: jax.Array, at: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
                found = velocity(x, at[0])
                return x + at[1] * found, (x, found)

            states, found = jax.lax.scan(step, noise, (indices, lengths))[1]
            return states.swapaxes(0, 1), found.swapaxes(0, 1)

        def drift(params: Params, condition: Condition, states: jax.Array, base: jax.Array) -> jax.Array:
            velocity = velocity_of(params, condition, len(states))
            found = jax.lax.map(lambda at: velocity(*at), (states.swapaxes(0, 1), indices)).swapaxes(0, 1)
            return signals.drift(found[: chunk.count], base[: chunk.count])

        everywhere = sharding.replicated(mesh)
        self._trace = jax.jit(trace, out_shardings=everywhere)
        self._drift = jax.jit(drift, out_shardings=everywhere)

    def trace(self, params: Params) -> Trace:
        """Of a base, on the host of every process."""
        return Trace(*jax.device_get(self._trace(params, self._chunk.condition, self._chunk.noise)))

    def __call__(self, params: Params, base: Trace) -> float:
        """``signals.drift`` of a model against the base that ``base`` is of."""
        size = len(base.states)
        rows = sharding.local_rows(self._mesh, size)
        states, velocities = (sharding.place(self._mesh, size, array[rows]) for array in base)
        return float(jax.device_get(self._drift(params, self._chunk.condition, states, velocities)))
