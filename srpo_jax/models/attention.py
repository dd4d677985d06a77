"""Dot-product attention behind one call; the backends differ in where they run and in the memory they take.

| backend | where | attention matrix in memory | dtypes |
|---|---|---|---|
| xla | everywhere | yes | any; softmax in float32 |
| cudnn | NVIDIA GPUs from Ampere on | no | bfloat16 |
| splash | TPUs (a Pallas kernel) | no | any |
"""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

CUDNN_MULTIPLE = 64
SPLASH_MULTIPLE = 128
# Blocks of splash: (tokens of a block, keys that are computed at a time). Keys and values are read again for every
# block of queries: 1,120 tokens do for each byte what a TPU v6e computes while it reads one. All of them compile with
# two samples on a chip of v4, v5e, v5p, v6e and tpu7x; with more keys, or 1536 tokens, kernels with a gradient run out
# of the 16 MB of vector memory that a program has on the first three, from the second sample on.
SPLASH_BLOCKS = ((1280, 256), (1152, 384), (1024, 512), (896, 896), (768, 768), (640, 640), (512, 512))
# The one mesh axis that divides heads; every other axis of a mesh divides the batch.
HEAD_AXIS = "tensor"
CUDNN_LEAST = 8.0  # compute capability: Ampere's


def choose(backend: str, device: Any, dtype: Any) -> str:
    """The backend that "auto" stands for on a kind of device; any other name stands for itself.

    Args:
      backend: "auto", or as ``attention`` takes it.
      device: one of those that run the network, here or described (``jax.experimental.topologies``).
      dtype: of queries, keys and values.

    Returns:
      On TPUs "splash"; on NVIDIA GPUs from Ampere on, in bfloat16, "cudnn"; else "xla".
    """
    if backend != "auto":
        return backend
    if device.platform == "tpu":
        return "splash"
    # AMD's GPUs have names here, as gfx942. Devices that are only described do not always say.
    capability = str(getattr(device, "compute_capability", None) or CUDNN_LEAST)
    new = re.fullmatch(r"\d+(\.\d+)?", capability) is not None and float(capability) >= CUDNN_LEAST
    if device.platform in ("gpu", "cuda") and new and jnp.dtype(dtype) == jnp.bfloat16:
        return "cudnn"
    return "xla"


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    backend: str,
    scale: float | None = None,
    bias: jax.Array | None = None,
    causal: bool = False,
    key_mask: jax.Array | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> jax.Array:
    """softmax(scale * q k^T + bias) v, per head.

    Args:
      query: [B, T, H, D].
      key, value: [B, S, H, D].
      backend: "xla", "cudnn" or "splash".
      scale: of the logits; None means 1 / sqrt(D).
      bias: added to the logits, broadcastable to [B, H, T, S]. Not supported by splash.
      causal: a query sees the keys of its own and of earlier positions only.
      key_mask: boolean [B, S]: the keys that are seen, as those of words and not of padding; of every sample at least
        one. None for all.
      mesh: the devices that the arrays are split over, batch and heads; only "splash" has to know, whose kernel XLA
        cannot split.

    Returns:
      [B, T, H, D], dtype of the query.

    Raises:
      ValueError: the backend is unknown or cannot do what is asked.
    """
    if scale is None:
        scale = query.shape[-1] ** -0.5
    if backend == "xla":
        return _plain(query, key, value, scale, bias, causal, key_mask)
    if backend == "cudnn":
        return _padded(query, key, value, scale, bias, causal, key_mask, implementation="cudnn")
    if backend == "splash":
        if bias is not None:
            raise ValueError("attention backend 'splash' takes no bias; use 'xla' for this network")
        return _splash(query, key, value, scale, causal, mesh, key_mask)
    raise ValueError(f"attention backend {backend!r} is unknown; choose one of xla, cudnn, splash")


# --- XLA ---


def _plain(query, key, value, scale, bias, causal, key_mask):
    """Attention with its matrix, in products whose leading axes are samples and heads: XLA's CPU compiler takes twice
    as long for those that ``jax.nn.dot_product_attention`` asks for (docs/performance.md)."""
    mask = None if key_mask is None else key_mask[:, None, None, :]
    if causal:
        seen = jnp.tril(jnp.ones((query.shape[1], key.shape[1]), bool))
        mask = seen if mask is None else mask & seen
    query, key, value = (x.swapaxes(1, 2) for x in (query, key, value))
    return _attend(query, key, value, bias, mask, scale).swapaxes(1, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(query, key, value, bias, mask, scale):
    """[B, H, T, D], [B, H, S, D] -> [B, H, T, D]; ``mask`` is broadcastable to [B, H, T, S], as the bias."""
    return _attend_forward(query, key, value, bias, mask, scale)[0]


def _attend_forward(query, key, value, bias, mask, scale):
    wide = jnp.promote_types(query.dtype, jnp.float32)
    logits = scale * jnp.einsum("bhtd,bhsd->bhts", query, key, preferred_element_type=wide)
    if bias is not None:
        logits = logits + bias
    if mask is not None:
        logits = jnp.where(mask, logits, 0.7 * jnp.finfo(logits.dtype).min)
    weights = jnp.exp(logits - _largest(logits)[..., None])
    weights = weights / weights.sum(-1, keepdims=True)
    out = jnp.einsum("bhts,bhsd->bhtd", weights.astype(value.dtype), value)
    return out, (query, key, value, bias, weights)


def _attend_backward(scale, kept, cotangent):
    query, key, value, bias, weights = kept
    of_value = jnp.einsum("bhts,bhtd->bhsd", weights.astype(value.dtype), cotangent)
    of_weights = jnp.einsum("bhtd,bhsd->bhts", cotangent, value).astype(weights.dtype)
    of_logits = weights * (of_weights - (weights * of_weights).sum(-1, keepdims=True))
    of_bias = None
    if bias is not None:  # summed over what shares it, as the sum's own gradient is
        (of_bias,) = jax.vjp(lambda bias: of_logits + bias, bias)[1](of_logits)
    of_product = (scale * of_logits).astype(query.dtype)
    of_query = jnp.einsum("bhts,bhsd->bhtd", of_product, key)
    of_key = jnp.einsum("bhts,bhtd->bhsd", of_product, query)
    return of_query, of_key, of_value, of_bias, None


_attend.defvjp(_attend_forward, _attend_backward)


def _largest(logits):
    """Of every row, [..., S] -> [...]. On a CPU a maximum that heeds NaN is computed number by number, which takes as
    long as the product; this one may pass over a NaN, whose exponential is one still."""

    def without_nan(logits):
        lowest = jnp.asarray(-jnp.inf, logits.dtype)
        return jax.lax.reduce(logits, lowest, lambda a, b: jnp.where(a > b, a, b), (logits.ndim - 1,))

    return jax.lax.platform_dependent(logits, cpu=without_nan, default=lambda logits: logits.max(-1))


# --- cuDNN ---


def _padded(query, key, value, scale, bias, causal, key_mask=None, *, implementation):
    """Attention with lengths padded to a multiple of 64: cuDNN's backward pass refuses odd ones (2537 at 720x720)."""
    batch, length = query.shape[:2]
    source = key.shape[1]
    pad_query, pad_key = -length % CUDNN_MULTIPLE, -source % CUDNN_MULTIPLE
    mask = None if key_mask is None else key_mask[:, None, None, :]
    if not (pad_query or pad_key):
        return jax.nn.dot_product_attention(
            query, key, value, bias, mask, scale=scale, is_causal=causal, implementation=implementation
        )
    query = _pad_length(query, pad_query)
    key, value = _pad_length(key, pad_key), _pad_length(value, pad_key)
    if bias is not None:
        bias = jnp.broadcast_to(bias, (*bias.shape[:2], length, source))
        bias = jnp.pad(bias, ((0, 0), (0, 0), (0, pad_query), (0, pad_key)))
    if mask is not None:
        mask = jnp.pad(mask, ((0, 0), (0, 0), (0, 0), (0, pad_key)))
    out = jax.nn.dot_product_attention(
        query,
        key,
        value,
        bias,
        mask,
        scale=scale,
        is_causal=causal,
        query_seq_lengths=jnp.full((batch,), length, jnp.int32),
        key_value_seq_lengths=jnp.full((batch,), source, jnp.int32),
        implementation=implementation,
    )
    return out[:, :length]


def _pad_length(x: jax.Array, amount: int) -> jax.Array:
    """Zeros after the tokens of [B, T, H, D]."""
    return jnp.pad(x, ((0, 0), (0, amount), (0, 0), (0, 0)))


# --- splash ---


def splash_blocks(length: int) -> tuple[int, int, int]:
    """(padded length, tokens of a block, keys that are computed at a time) for so many tokens: the least padding, then
    the largest block."""
    if length <= SPLASH_BLOCKS[-1][0]:
        padded = length + -length % SPLASH_MULTIPLE
        return padded, padded, padded
    return min(((length + -length % block, block, keys) for block, keys in SPLASH_BLOCKS), key=lambda t: (t[0], -t[1]))


def _splash(query, key, value, scale, causal, mesh=None, key_mask=None, interpret=False):
    """The TPU kernel; on a mesh, on each device's own samples and heads."""
    # The import initialises Pallas for TPU, which other platforms need not have.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    if query.shape[1] != key.shape[1]:
        raise ValueError(f"attention backend 'splash' needs equal lengths, got {query.shape[1]} and {key.shape[1]}")
    length = query.shape[1]
    padded, block, keys_at_once = splash_blocks(length)
    pad = padded - length
    mask = (masks.CausalMask if causal else masks.FullMask)((padded, padded))
    given = () if key_mask is None else (key_mask,)

    def local(query, key, value, *seen):
        kernel = kernels.make_splash_mha(
            masks.MultiHeadMask([mask] * query.shape[2]),
            # One kernel for all gradients makes logits and probabilities once, not once for queries and once for keys.
            block_sizes=kernels.BlockSizes(
                *(block, block, keys_at_once),
                *(block, block, keys_at_once),
                use_fused_bwd_kernel=True,
            ),
            head_shards=1,
            q_seq_shards=1,
            residual_checkpoint_name="attention",  # see compute.KEPT
            interpret=interpret,
        )
        # Padding, and keys that are not seen, are a segment of their own, so that no token attends to them.
        queries = keys = (jnp.arange(padded) >= length).astype(jnp.int32)
        if seen:
            queries = jnp.broadcast_to(queries, (query.shape[0], padded))
            keys = 1 - jnp.pad(seen[0], ((0, 0), (0, pad))).astype(jnp.int32)
        heads_first = [_pad_length(x, pad).swapaxes(1, 2) for x in (query * scale, key, value)]
        segments = kernels.SegmentIds(q=queries, kv=keys)
        out = jax.vmap(kernel, in_axes=(0, 0, 0, 0 if seen else None))(*heads_first, segments)
        return out.swapaxes(1, 2)[:, :length].astype(query.dtype)

    if mesh is None:
        return local(query, key, value, *given)
    spec = PartitionSpec(
        tuple(axis for axis in mesh.axis_names if axis != HEAD_AXIS),
        None,
        HEAD_AXIS if HEAD_AXIS in mesh.axis_names else None,
        None,
    )
    specs = spec, spec, spec, *(PartitionSpec(spec[0], None) for _ in given)
    split = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=spec, check_vma=False)
    return split(query, key, value, *given)
