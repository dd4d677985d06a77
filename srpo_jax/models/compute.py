"""How a network is executed, apart from what it computes: dtypes, attention backend, rematerialisation, sharding
hooks.

Networks are Flax NNX modules. Outside of ``models/`` their parameters are nested dicts of arrays, so that optimisers,
checkpoints and the sharding table see nothing but paths and arrays; ``build``, ``abstract`` and ``bind`` cross that
border.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.ad_checkpoint
import jax.numpy as jnp
from flax import nnx

Params = dict[str, Any]
# What a block may keep for its backward pass, by name: first what spares most work for its bytes. "out" are products
# that a gate scales, "qkv" queries, keys and values before their norms, "mlp" what the activation reads.
KEPT = ("out", "attention", "qkv", "mlp")
LORA_FACTORS = ("lora_a", "lora_b")  # names of the low-rank factors beside a kernel, see lora


def _unconstrained(x: jax.Array, name: str) -> jax.Array:
    """Leaves an activation where the compiler puts it."""
    del name
    return x


@dataclasses.dataclass(frozen=True)
class Compute:
    """Execution options, the same for every network.

    Attributes:
      dtype: of matrix products, convolutions and the activations between them. Norms, softmax, rotary tables,
        sinusoidal embeddings and losses are float32 whatever this says.
      param_dtype: of the stored parameters, but for those of norms and scales of frozen networks, which are float32.
      attention: backend name, see ``attention.attention``.
      rotary: how rotary embeddings are computed, see ``rotary``.
      remat: which intermediate values of a repeated block are kept for the backward pass: "none" keeps all, "full"
        keeps only the block's input, "dots" keeps the results of matrix products, names of ``KEPT`` joined by "+" keep
        the block's input and those.
      scan_unroll: how many repeated blocks one iteration of the scan holds.
      mesh: the devices that activations are split over, for what XLA cannot split by itself; None for one device.
      constrain: called as ``constrain(x, name)`` on activations at block borders, with the names "tokens" [B, T, D],
        "heads" [B, T, H, Dh] and "image" [B, H, W, C], and on "vectors" [B, D] and "features" [B, D], which are to be
        split by D; returns x, perhaps with a sharding constraint.
    """

    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    attention: str = "xla"
    rotary: str = "pairs"
    remat: str = "none"
    scan_unroll: int = 1
    mesh: jax.sharding.Mesh | None = None
    constrain: Callable[[jax.Array, str], jax.Array] = _unconstrained

    def checkpoint(self, function: Callable) -> Callable:
        """Wraps a block's function by the ``remat`` option. Raises ValueError for an unknown one."""
        if self.remat == "none":
            return function
        policies = {"full": None, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}
        if names := kept(self.remat):
            policies[self.remat] = jax.checkpoint_policies.save_only_these_names(*names)
        if self.remat not in policies:
            known = f"none, {', '.join(policies)}, or names of {', '.join(KEPT)} joined by +"
            raise ValueError(f"remat={self.remat!r} is unknown; choose one of {known}")
        # Inside a scan the loop itself keeps the compiler from merging the recomputation with the forward pass.
        return jax.checkpoint(function, policy=policies[self.remat], prevent_cse=False)


def kept(remat: str) -> tuple[str, ...]:
    """The names of ``KEPT`` that a ``remat`` option joins; none of another option."""
    names = tuple(remat.split("+"))
    return names if set(names) <= set(KEPT) and len(set(names)) == len(names) else ()


def keep(x: jax.Array, name: str) -> jax.Array:
    """Names a value of a block, of ``KEPT``."""
    return jax.ad_checkpoint.checkpoint_name(x, name)


def build(constructor: Callable[[nnx.Rngs], nnx.Module], seed: int = 0) -> tuple[nnx.GraphDef, Params]:
    """Makes a network with random parameters: ``build(lambda rngs: Flux(config, compute, rngs=rngs))``."""
    graphdef, _ = abstract(constructor)
    # Compiled as one program: thousands of small dispatches take longer.
    params = jax.jit(lambda: nnx.to_pure_dict(nnx.split(constructor(nnx.Rngs(seed)))[1]))()
    return graphdef, params


def abstract(constructor: Callable[[nnx.Rngs], nnx.Module]) -> tuple[nnx.GraphDef, Params]:
    """As ``build``, with ``jax.ShapeDtypeStruct`` leaves: no memory is used, whatever the network's size."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: constructor(nnx.Rngs(0))))
    return graphdef, nnx.to_pure_dict(state)


def bind(graphdef: nnx.GraphDef, params: Params) -> Any:
    """The callable module of a graph definition and its parameters."""
    return nnx.merge(graphdef, params)


def cast_weights(params: Params, dtype: Any) -> Params:
    """float32 kernels, biases and low-rank factors in ``dtype``, as layers cast them wherever they use them.

    All else stays as it is.

    Worth its memory where weights are used many times: a layer that casts reads four bytes and writes two before it
    reads the two that it wants. A gradient taken at the result is of ``dtype`` too, as matrix products give it.
    """

    def cast(path: tuple, leaf: jax.Array) -> jax.Array:
        named = path[-1].key in ("kernel", "bias", *LORA_FACTORS)
        return leaf.astype(dtype) if named and leaf.dtype == jnp.float32 else leaf

    return jax.tree_util.tree_map_with_path(cast, params)


def join(first: Params, second: Params | None) -> Params:
    """One nesting of two that share no leaf, as what is trained of a network and what is frozen. None is nothing."""
    if second is None:
        return first
    joined = dict(first)
    for key, child in second.items():
        joined[key] = join(joined[key], child) if key in joined else child
    return joined


def path_name(path: tuple) -> str:
    """A parameter's dotted path, ``double_blocks.img_attn.qkv.kernel``, from a key path of ``jax.tree_util``."""
    return ".".join(str(entry.key) for entry in path)
