"""Low-rank adaptation of a transformer (LoRA; Hu et al., arXiv 2106.09685): y = x W + b + (alpha / r) (x A) B.

W and b are frozen; A [in, r] and B [r, out] are all that is trained. The sum W + (alpha / r) A B is never formed: its
gradient would be as large as W's, and a small A B would be lost in a bfloat16 W. A layer onto queries, keys and values
has an A and a B for each of the three, as diffusers and peft, which keep three layers, have them.

Adapted layers stay where they are: beside ``double_blocks.img_attn.qkv.kernel`` lie ``...qkv.lora_a`` and
``...qkv.lora_b``, stacked over layers as the kernels are. ``split`` and ``join`` go between the network's parameters
and the pair (factors, frozen rest). What can be adapted are the linear layers in the stacks of blocks that a network's
class names (``STACKS``).
"""

import dataclasses
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from srpo_jax import seeds
from srpo_jax.models import compute as models_compute
from srpo_jax.models import quantize
from srpo_jax.models.compute import LORA_FACTORS, Params, path_name
from srpo_jax.models.flux_layers import Linear, product_of_parts
from srpo_jax.patterns import Pattern


@dataclasses.dataclass(frozen=True)
class Lora:
    """What is adapted, and how.

    Attributes:
      rank: r, of every product A B.
      alpha: the product counts alpha / r.
      targets: regular expressions; a layer is adapted if one of them matches the whole of its path, as
        ``double_blocks.img_attn.qkv``.
      quantized: how the kernels of the frozen blocks are stored, "none" or a kind of ``quantize.KINDS``.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]
    quantized: str = "none"

    @property
    def scale(self) -> float:
        """What the product A B is multiplied with."""
        return self.alpha / self.rank

    @classmethod
    def from_config(cls, config: Any) -> "Lora | None":
        """Reads the ``lora`` part of a configuration; None if its rank is 0."""
        if not config.rank:
            return None
        return cls(config.rank, config.alpha, tuple(config.targets), config.quantize)


class LoraLinear(Linear):
    """A linear layer of a stack with factors beside its kernel.

    Args:
      layer: the stacked layer, kernel [layers, in, *out].
      lora_a: [layers, in, r], or [layers, in, parts, r] for a layer onto several parts (q, k and v).
      lora_b: [layers, r, out], or [layers, parts, r, *out of a part].
      scale: of the product.
    """

    def __init__(self, layer: Linear, lora_a: jax.Array, lora_b: jax.Array, scale: float):
        self.kernel, self.bias, self.dtype = layer.kernel, layer.bias, layer.dtype
        self.lora_a, self.lora_b = nnx.Param(lora_a), nnx.Param(lora_b)
        self.scale = scale

    def __call__(self, *parts: jax.Array) -> jax.Array:
        a, b = self.lora_a[...].astype(self.dtype), self.lora_b[...].astype(self.dtype)
        low = self.scale * product_of_parts([x.astype(self.dtype) for x in parts], a)
        if a.ndim == 3:
            return super().__call__(*parts) + jnp.einsum("...pr,prhd->...phd", low, b)
        return super().__call__(*parts) + jnp.tensordot(low, b, axes=1)


def factor_shapes(kernel: tuple[int, ...], rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of A and B beside a stacked kernel [layers, in, *out]."""
    layers, features_in, *out = kernel
    parts = tuple(out[:1]) if len(out) > 1 else ()
    return (layers, features_in, *parts, rank), (layers, *parts, rank, *out[len(parts) :])


def layers(network: nnx.Module) -> dict[str, tuple[nnx.Module, str]]:
    """Every layer that can be adapted by its path: (the module that has it, the attribute)."""
    found = {}
    for stack in type(network).STACKS:
        for path, module in nnx.iter_modules(getattr(network, stack)):
            for name, child in vars(module).items():
                if isinstance(child, Linear):
                    found[".".join((stack, *map(str, path), name))] = module, name
    return dict(sorted(found.items()))


def chosen(lora: Lora, names: Any) -> list[str]:
    """The paths among ``names`` that a target matches. Raises ValueError for a target that matches none, UserError for
    one that takes too long."""
    patterns = [Pattern(target, "config.lora.targets") for target in lora.targets]
    for target, pattern in zip(lora.targets, patterns, strict=True):
        if not any(map(pattern.fits, names)):
            raise ValueError(f"{target!r} matches no layer; there are {', '.join(names)}")
    return [name for name in names if any(pattern.fits(name) for pattern in patterns)]


def adapt(network: nnx.Module, lora: Lora) -> nnx.Module:
    """Puts float32 factors of 0 beside the chosen layers' kernels, in place. Raises ValueError as ``chosen`` does."""
    found = layers(network)
    for path in chosen(lora, found):
        module, name = found[path]
        layer = getattr(module, name)
        shape_a, shape_b = factor_shapes(layer.kernel.shape, lora.rank)
        setattr(module, name, LoraLinear(layer, jnp.zeros(shape_a), jnp.zeros(shape_b), lora.scale))
    return network


def abstract(constructor: Callable[[nnx.Rngs], nnx.Module], lora: Lora) -> tuple[nnx.GraphDef, Params]:
    """Graph definition and ``ShapeDtypeStruct`` parameters of an adapted network, whose frozen part is quantised as
    ``lora`` says. Raises ValueError as ``chosen`` does."""

    def construct(rngs: nnx.Rngs) -> nnx.Module:
        network = constructor(rngs)
        if lora.quantized != "none":
            for module, name in layers(network).values():
                layer = getattr(module, name)
                layer.kernel = quantize.QuantizedKernel(layer.kernel[...], lora.quantized)
        return adapt(network, lora)

    return models_compute.abstract(construct)


# --- parameters -------------------------------------------------------------------------------------------------------


def split(params: Params) -> tuple[Params, Params]:
    """(factors, all else) of an adapted network's parameters, each nested as they are."""

    def pick(node: Params, wanted: bool) -> Params:
        picked = {}
        for key, child in node.items():
            if not isinstance(child, dict):
                if (key in LORA_FACTORS) == wanted:
                    picked[key] = child
            elif inner := pick(child, wanted):
                picked[key] = inner
        return picked

    return pick(params, True), pick(params, False)


def initial(like: Params, seed: int) -> Params:
    """The factors before training: B is 0, so that nothing changes, and A uniform in +-1/sqrt(in), as peft has them.

    ``like`` has their shapes. Each A has a key of its own from ``seed`` and its path: the numbers do not depend on what
    else is adapted, nor on the mesh.
    """

    def make(path: tuple, leaf: Any) -> jax.Array:
        name = path_name(path)
        if name.endswith("lora_b"):
            return jnp.zeros(leaf.shape, leaf.dtype)
        limit = leaf.shape[1] ** -0.5
        key = jax.random.fold_in(seeds.key(seed), zlib.crc32(name.encode()))
        return jax.random.uniform(key, leaf.shape, leaf.dtype, -limit, limit)

    return jax.tree_util.tree_map_with_path(make, like)


def product(lora_a: np.ndarray, lora_b: np.ndarray, scale: float) -> np.ndarray:
    """``scale`` A B of one layer, shaped as the kernel [in, *out], on the host in float32."""
    a, b = np.asarray(lora_a, np.float32), np.asarray(lora_b, np.float32)
    return np.float32(scale) * (np.einsum("ipr,prhd->iphd", a, b) if a.ndim == 3 else a @ b)
