"""Low-rank factors in the files that others read, and merged into full weights. ``adapters`` reads such files.

    lora-diffusers   transformer.MODULE.lora_A.weight [r, in], .lora_B.weight [out, r]       diffusers, peft, ComfyUI
    lora-comfyui     lora_unet_MODULE.lora_down.weight [R, in], .lora_up.weight [out, R], .alpha   kohya's; ComfyUI, ...

MODULE is diffusers' name of a layer, or Black Forest Labs' with ``_`` for dots: both come from the tables for full
weights (``weights.flux``), whose rules also rearrange the factors, since a kernel [in, *out] may have any "in".

Readers of the first take the product as it is where a file names no alpha: alpha / r is multiplied into B. In the
second a layer that is fused (q, k and v; in single blocks the MLP's first as well) has one pair for all n of its parts:
their A stacked, their B on the diagonal of a matrix that is else 0, R = n r and alpha n times ours.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from srpo_jax.errors import UserError
from srpo_jax.models.flux import FluxConfig
from srpo_jax.models.lora import Lora, factor_shapes, product
from srpo_jax.weights import engine, flux, folder
from srpo_jax.weights.engine import ParameterSource
from srpo_jax.weights.files import Spec
from srpo_jax.weights.rules import Rule

KERNEL, A, B = ".kernel", ".lora_a", ".lora_b"
DIFFUSERS, COMFYUI = "lora-diffusers", "lora-comfyui"
FORMATS = (DIFFUSERS, COMFYUI)
# Folder and file: what diffusers looks for in a folder, and a place in ComfyUI's models.
PLACES = {DIFFUSERS: ("", "pytorch_lora_weights"), COMFYUI: ("loras", "flux1-lora")}


class _Part(NamedTuple):
    """One product A B: of which of a rule's targets, of which of its parts (None: it has no parts), a [in, r], b."""

    target: int
    index: int | None
    a: np.ndarray
    b: np.ndarray


def exported(config: FluxConfig, factors: Mapping[str, Any], lora: Lora, style: str) -> Iterator[tuple[str, Any]]:
    """Yields (foreign name, float32 array) for all factors.

    Args:
      config: of the transformer.
      factors: arrays, or what ``numpy.asarray`` makes arrays of, by dotted path.
      lora: their rank and alpha.
      style: of ``FORMATS``.
    """
    table = flux.diffusers_rules(config) if style == DIFFUSERS else flux.bfl_rules(config)
    source = engine.MemorySource(factors)
    for rule in table.rules:
        adapted = [name.removesuffix(KERNEL) for name in rule.targets if name.removesuffix(KERNEL) + A in factors]
        for layer in range(rule.layers if adapted else 0):
            parts = [part for name in adapted for part in _parts(source, rule, name, layer)]
            for module, down, up, count in _pairs(rule, parts, config, layer):
                if style == DIFFUSERS:
                    yield f"transformer.{module}.lora_A.weight", down
                    yield f"transformer.{module}.lora_B.weight", np.float32(lora.scale) * up
                else:
                    name = "lora_unet_" + module.replace(".", "_")
                    yield f"{name}.lora_down.weight", down
                    yield f"{name}.lora_up.weight", up
                    yield f"{name}.alpha", np.float32(count * lora.alpha)


def _parts(source: ParameterSource, rule: Rule, name: str, layer: int) -> list[_Part]:
    a, b = (np.asarray(source.read_layer(name + suffix, layer), np.float32) for suffix in (A, B))
    target = rule.targets.index(name + KERNEL)
    if a.ndim == 2:
        return [_Part(target, None, a, b)]
    return [_Part(target, index, a[:, index], b[index]) for index in range(a.shape[1])]


def _pairs(
    rule: Rule, parts: list[_Part], config: FluxConfig, layer: int
) -> Iterator[tuple[str, np.ndarray, np.ndarray, int]]:
    """(module, down [R, in], up [out, R], how many parts it holds) of one layer's foreign modules."""
    names = [name.removesuffix(".weight") for name in rule.layer_sources(layer)]
    # A module for every part, or one for all.
    groups = [[part] for part in parts] if len(names) == len(parts) else [parts]
    for number, (name, group) in enumerate(zip(names, groups, strict=True)):
        rank = group[0].b.shape[0]
        kernels = [np.zeros((rank * len(group), *shape), np.float32) for shape in _output_shapes(rule, config)]
        for place, part in enumerate(group):
            rows = kernels[part.target][place * rank : (place + 1) * rank]
            rows[:, ... if part.index is None else part.index] = part.b
        yield name, np.concatenate([part.a.T for part in group]), rule.transform.inverse(kernels)[number], len(group)


def _output_shapes(rule: Rule, config: FluxConfig) -> list[tuple[int, ...]]:
    """What follows "in" in the shapes of a rule's kernels."""
    return [folder.shapes("flux", config)[name][2:] for name in rule.targets]


class MergedSource:
    """A transformer's parameters with factors merged in: W + (alpha / r) A B, in float32, where there are any.

    Raises UserError if the factors are not of this transformer.
    """

    def __init__(self, weights: ParameterSource, factors: Mapping[str, Any], lora: Lora):
        self.path = weights.path
        self._weights, self._factors, self._scale = weights, engine.MemorySource(factors), lora.scale
        self._adapted = {name.removesuffix(A) + KERNEL for name in factors if name.endswith(A)}
        check(weights.specs, factors, lora, self.path)
        full = np.dtype(np.float32)
        self.specs = {
            name: Spec(spec.shape, np.promote_types(spec.dtype, full)) if name in self._adapted else spec
            for name, spec in weights.specs.items()
        }

    def read(self, name: str) -> np.ndarray:
        """A whole parameter."""
        if name not in self._adapted:
            return self._weights.read(name)
        return np.stack([self.read_layer(name, layer) for layer in range(self.specs[name].shape[0])])

    def read_layer(self, name: str, layer: int) -> np.ndarray:
        """One layer of a stack. Layers are expected in order."""
        kernel = self._weights.read_layer(name, layer)
        if name not in self._adapted:
            return kernel
        stem = name.removesuffix(KERNEL)
        a, b = (self._factors.read_layer(stem + suffix, layer) for suffix in (A, B))
        return np.asarray(kernel, self.specs[name].dtype) + product(a, b, self._scale)


def check(specs: Mapping[str, Spec], factors: Mapping[str, Any], lora: Lora, where: Any) -> None:
    """Raises UserError if factors (by path, with a ``shape``) do not fit a transformer's parameters."""
    wrong = []
    for stem in sorted({name.removesuffix(A).removesuffix(B) for name in factors}):
        kernel = specs.get(stem + KERNEL)
        expected = (None, None) if kernel is None else factor_shapes(kernel.shape, lora.rank)
        found = tuple(None if stem + s not in factors else tuple(factors[stem + s].shape) for s in (A, B))
        if kernel is None or found != expected:
            wrong.append(f"{stem} (A {found[0]}, B {found[1]}, where {expected[0]} and {expected[1]} fit)")
    if wrong:
        raise UserError(f"the checkpoint's LoRA is not of {where}: {len(wrong)} layers differ, as {wrong[0]}")
