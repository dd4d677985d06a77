"""Matrix products of 8-bit numbers, for passes that need no gradient: the tensor units do them twice as fast.

    y = s_x s_w (x / s_x) (W / s_w), with x / s_x and W / s_w rounded to 8 bits

Every token of x and every output feature of W has a scale of its own, from its largest magnitude. Sums are as wide as
the units make them: int32 for int8 (A100, TPU v5e, v6e and later), float32 for float8 (H100 and later).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

LARGEST = {"int8": 127.0, "float8": 448.0}  # of the numbers that are multiplied, by kind
DTYPE = {"int8": jnp.int8, "float8": jnp.float8_e4m3fn}


def quantize(x: jax.Array, kind: str, axis: int = -1) -> tuple[jax.Array, jax.Array]:
    """8-bit numbers of the shape of ``x``, and float32 scales, of size 1 along ``axis``: one for all of it."""
    x = x.astype(jnp.float32)
    largest = jnp.abs(x).max(axis, keepdims=True)
    scale = jnp.where(largest > 0, largest / LARGEST[kind], 1.0)
    unit = x / scale
    return (jnp.round(unit) if kind == "int8" else unit).astype(DTYPE[kind]), scale


class EightBitKernel(nnx.Module):
    """Stands where a stacked layer has its kernel.

    Args:
      kernel: [layers, in, *out], floating point.
      kind: "int8" or "float8".
      place: called on the 8-bit numbers and the scales while their axes are the kernel's, to say where they lie.
    """

    def __init__(self, kernel: jax.Array, kind: str, place: Callable[[jax.Array], jax.Array] = lambda x: x):
        self.kind, self.features_out = kind, kernel.shape[2:]
        codes, scales = quantize(kernel, kind, axis=1)
        codes, scales = place(codes), place(scales)
        # The units read both sides along the axis that is summed.
        self.codes = nnx.Param(codes.reshape(*kernel.shape[:2], -1).swapaxes(1, 2))
        self.scales = nnx.Param(scales.reshape(kernel.shape[0], -1))

    def product(self, x: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """[..., in] -> [..., *out] in ``dtype``, of one layer, as a scan over the stack hands it out."""
        codes, scales = quantize(x, self.kind)
        # What float8 sums to is rounded to ``dtype`` at once, before it is scaled: half the bytes, the same digits.
        wide = jnp.int32 if self.kind == "int8" else dtype
        y = jax.lax.dot_general(codes, self.codes[...], (((x.ndim - 1,), (1,)), ((), ())), preferred_element_type=wide)
        y = (y.astype(jnp.float32) * scales * self.scales[...]).astype(dtype)
        return y.reshape(*x.shape[:-1], *self.features_out)
