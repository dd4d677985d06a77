"""Weights in 8 or 4 bits, for networks that are read and not trained: blocks of an axis share a scale.

    int8  round(127 w / s) with s the block's largest |w|: blocks of 128, 8.125 bits a weight
    nf4   the nearest of sixteen quantiles of a normal distribution, times s: blocks of 64, 4.25 bits a weight
          (NormalFloat of QLoRA, Dettmers et al., arXiv 2305.14314)

Blocks lie along the axis that a matrix product sums over. Scales are bfloat16; codes are found against the rounded
scale, so that its rounding adds no error of its own.
"""

import math
from statistics import NormalDist

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

KINDS = ("int8", "nf4")
BLOCK = {"int8": 128, "nf4": 64}


def _normal_quantiles() -> np.ndarray:
    """The sixteen numbers of NormalFloat 4, ascending from -1 to 1: 7 below 0, 0, and 8 above (the paper's section 3).

    Each half takes quantiles evenly spaced in probability between one half and 1 - (1/30 + 1/32) / 2.
    """
    inverse, tail = NormalDist().inv_cdf, 1 - (1 / 32 + 1 / 30) / 2
    above = [inverse(p) for p in np.linspace(tail, 0.5, 9)[:-1]]
    below = [-inverse(p) for p in np.linspace(tail, 0.5, 8)[:-1]]
    values = np.array(sorted([*below, 0.0, *above]))
    return (values / values.max()).astype(np.float32)


NF4 = _normal_quantiles()


def block_size(kind: str, features: int) -> int:
    """Weights that share a scale, for an axis of ``features``: the kind's own number or what both have in common."""
    return math.gcd(BLOCK[kind], features)


def quantize(w: jax.Array, kind: str, axis: int = 0) -> tuple[jax.Array, jax.Array]:
    """Weights to codes and scales.

    Args:
      w: floating point, any shape.
      kind: of ``KINDS``.
      axis: along which the blocks lie.

    Returns:
      Codes, int8 in the shape of ``w``, or for nf4 uint8 with two neighbours of ``axis`` in a byte (the first in the
      low half); scales, bfloat16, with one entry a block along ``axis``.

    Raises ValueError for an axis of odd length and nf4.
    """
    size = w.shape[axis]
    block = block_size(kind, size)
    blocks = w.astype(jnp.float32).reshape(*w.shape[:axis], size // block, block, *w.shape[axis + 1 :])
    largest = jnp.abs(blocks).max(axis + 1, keepdims=True)
    scales = (largest / 127 if kind == "int8" else largest).astype(jnp.bfloat16)
    # Of a block of zeros any code does.
    unit = blocks / jnp.where(scales == 0, 1, scales).astype(jnp.float32)
    if kind == "int8":
        codes = jnp.clip(jnp.round(unit), -127, 127).astype(jnp.int8).reshape(w.shape)
    else:
        if size % 2:
            raise ValueError(f"an axis of {size} cannot be packed in pairs")
        middles = (NF4[1:] + NF4[:-1]) / 2
        codes = sum((unit > middle).astype(jnp.uint8) for middle in middles).reshape(w.shape)
        pairs = codes.reshape(*w.shape[:axis], size // 2, 2, *w.shape[axis + 1 :])
        low, high = (jax.lax.index_in_dim(pairs, half, axis + 1, keepdims=False) for half in (0, 1))
        codes = low | (high << 4)
    return codes, jnp.squeeze(scales, axis + 1)


def dequantize(codes: jax.Array, scales: jax.Array, kind: str, axis: int = 0, dtype=jnp.float32) -> jax.Array:
    """The weights that codes and scales stand for, in ``dtype``: undoes ``quantize`` up to its rounding."""
    if kind == "nf4":
        shifts = jnp.array([0, 4], jnp.uint8).reshape(2, *[1] * (codes.ndim - axis - 1))
        halves = jnp.expand_dims(codes, axis + 1) >> shifts & 15
        codes = halves.reshape(*codes.shape[:axis], 2 * codes.shape[axis], *codes.shape[axis + 1 :])
        values = _look_up(codes)
    else:
        values = codes.astype(jnp.float32)
    blocks = scales.shape[axis]
    values = values.reshape(*codes.shape[:axis], blocks, codes.shape[axis] // blocks, *codes.shape[axis + 1 :])
    return (values * jnp.expand_dims(scales.astype(jnp.float32), axis + 1)).reshape(codes.shape).astype(dtype)


def _look_up(codes: jax.Array) -> jax.Array:
    """``NF4[codes]`` up to a last bit, as a sum of the steps between the entry 0 and a code's own.

    Elementwise, where a TPU would take long to gather; and without ``where``, whose constants JAX makes into arrays as
    large as the weights and keeps for the backward pass.
    """
    zero = int(np.argmin(np.abs(NF4)))
    value = jnp.zeros((), jnp.float32)
    for code in range(1, len(NF4)):
        step = float(NF4[code] - NF4[code - 1])
        if code > zero:
            value = value + step * (codes >= code).astype(jnp.float32)
        else:
            value = value - step * (codes < code).astype(jnp.float32)
    return value


class QuantizedKernel(nnx.Module):
    """Stands where a layer has its kernel: ``kernel[...]`` gives the weights, made anew at each use.

    Args:
      kernel: [..., in, *out]; of a stack, with the layers as a leading axis.
      kind: of ``KINDS``.
    """

    def __init__(self, kernel: jax.Array, kind: str):
        self.shape, self.kind, self.dtype = kernel.shape, kind, kernel.dtype
        codes, scales = quantize(kernel, kind, axis=1)
        self.codes, self.scales = nnx.Param(codes), nnx.Param(scales)

    def __getitem__(self, index: object) -> jax.Array:
        # One layer of the stack, as the scan hands it out.
        return dequantize(self.codes[...], self.scales[...], self.kind, 0, self.dtype)[index]
