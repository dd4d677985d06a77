"""Reads the LoRA files that people have as factors of ours: diffusers', peft's, kohya's, and those in BFL's names.

    transformer.MODULE.lora_A.weight                                      diffusers; our own lora-diffusers
    base_model.model.MODULE.lora_A[.default].weight                       peft, adapter_config.json beside it
    lora_unet_MODULE.lora_down.weight, .alpha  (_ for dots in MODULE)     kohya's sd-scripts; our own lora-comfyui
    diffusion_model.MODULE.lora_A.weight                                  in Black Forest Labs' names of layers

Any prefix goes with any ending, and MODULE may be diffusers' or BFL's name. A pair that BFL's names have for a fused
layer is taken apart exactly: all parts get its A; if its B is block-diagonal, each its block of it.
"""

import dataclasses
import math
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple

import numpy as np

from srpo_jax import schema
from srpo_jax.errors import UserError
from srpo_jax.models.flux import Flux, FluxConfig
from srpo_jax.models.lora import Lora, chosen, factor_shapes
from srpo_jax.weights import engine, flux, folder, sources
from srpo_jax.weights.engine import Source
from srpo_jax.weights.files import read_json
from srpo_jax.weights.lora import KERNEL, A, B
from srpo_jax.weights.rules import Rule, Table

# What peft and diffusers call their file, in the folders that they save.
FILES = (
    "adapter_model.safetensors",
    "pytorch_lora_weights.safetensors",
    "adapter_model.bin",
    "pytorch_lora_weights.bin",
)
ALPHA_NOTE = "lora_adapter_metadata"  # in a file's header: peft's LoraConfig as JSON, keys after "transformer."
PEFT_CONFIG = "adapter_config.json"

_PREFIX = re.compile(
    r"(?:base_model\.model\.|transformer\.|unet\.|model\.|diffusion_model\.|lora_unet_|lora_transformer_|lycoris_)*"
)
_FACTOR = re.compile(r"(.+?)\.(lora_A|lora_B|lora_down|lora_up|lora\.down|lora\.up)(?:\.(\w+))?\.weight")
_KINDS = {"lora_A": "down", "lora_down": "down", "lora.down": "down", "lora_B": "up", "lora_up": "up", "lora.up": "up"}
# What else such files hold, by a part of a name.
_REFUSED = (
    (r"(^|\.)(lora_te\d?_|text_encoder(_\d)?\.|te\d?\.|text_model\.)", "factors of a text encoder"),
    (r"\.dora_scale$|\.lora_magnitude_vector", "DoRA's magnitudes"),
    (
        r"\.(hada_w|lokr_w|oft_|boft_|glora|ia3|on_input)",
        "factors of a kind that is not LoRA (LoHa, LoKr, OFT or alike)",
    ),
    (r"\.lora_mid\.", "LoCon's middle factors"),
    (r"\.bias$|\.diff_b$", "trained biases"),
    (r"\.diff$|\.modules_to_save\.|norm\.(query|key)_norm\.|\.norm_(added_)?[qk]\.", "whole weights beside factors"),
)


class _Scale(NamedTuple):
    """What a file's notes say of the factor before its products; ``alpha`` None: they count as they are."""

    alpha: float | None
    rank_stabilised: bool

    def of(self, rank: int, alpha: float | None) -> float:
        """Of a pair of this rank; ``alpha`` is its own, which goes first."""
        if alpha is not None:
            return alpha / rank
        if self.alpha is None:
            return 1.0
        return self.alpha / (math.sqrt(rank) if self.rank_stabilised else rank)


@dataclasses.dataclass(frozen=True)
class _Note:
    """What is read of peft's config, in its names."""

    lora_alpha: Annotated[float, schema.Range(-1e6, 1e6)] | None = None
    use_rslora: bool | None = None


def read(path: str | os.PathLike, config: FluxConfig, lora: Lora) -> dict[str, np.ndarray]:
    """Factors by dotted path, float32.

    Args:
      path: a LoRA's file, or the folder that peft or diffusers saved it in.
      config: of the transformer.
      lora: what is adapted; the factors are scaled to its alpha.

    Raises UserError unless the file holds factors of this rank for exactly the layers that ``lora`` adapts.
    """
    source = sources.open_source(path, FILES)
    for pattern, what in _REFUSED:
        if names := [name for name in source.specs if re.search(pattern, name)]:
            raise UserError(
                f"{source.path} holds {what}, which are not supported ({len(names)} tensors, as {names[0]})"
            )
    noted = _noted(source)
    found = _modules(source)
    shapes = folder.shapes("flux", config)
    kernels = [name for name in shapes if name.startswith(Flux.STACKS) and name.endswith(KERNEL)]
    stems = set(chosen(lora, [name.removesuffix(KERNEL) for name in kernels]))
    factors = {}
    for stem in stems:
        for suffix, shape in zip((A, B), factor_shapes(shapes[stem + KERNEL], lora.rank), strict=True):
            factors[stem + suffix] = np.zeros(shape, np.float32)
    table = _table(config, found)
    weights = engine.source_shapes(table, shapes)
    used: set[str] = set()
    for rule in table.rules:
        if stems.isdisjoint(name.removesuffix(KERNEL) for name in rule.targets if name.endswith(KERNEL)):
            continue
        for layer in range(rule.layers):
            pairs = []
            for name in rule.layer_sources(layer):
                names = found.get(_plain(name.removesuffix(".weight")), {})
                pairs.append(_pair(source, names, name, weights[name], noted))
                used.update(names.values())
            _put(factors, rule, layer, pairs, lora, source)
    if rest := sorted(source.specs.keys() - used):
        raise UserError(f"{source.path} holds {len(rest)} tensors that lora.targets does not name, as {rest[0]}")
    return factors


def _plain(module: str) -> str:
    """A module's name as kohya writes it, without prefix."""
    return module.replace(".", "_")


def _modules(source: Source) -> dict[str, dict[str, str]]:
    """``{module: {"down", "up", "alpha": tensor's name}}``, modules as ``_plain`` writes them."""
    found: dict[str, dict[str, str]] = {}
    for name in source.specs:
        if match := _FACTOR.fullmatch(name):
            module, kind = match[1], _KINDS[match[2]]
        elif name.endswith(".alpha"):
            module, kind = name.removesuffix(".alpha"), "alpha"
        else:
            continue
        names = found.setdefault(_plain(_PREFIX.sub("", module, count=1)), {})
        if kind in names:
            raise UserError(f"{source.path} holds several adapters for a layer: {names[kind]} and {name}; keep one")
        names[kind] = name
    return found


def _table(config: FluxConfig, found: Mapping[str, Any]) -> Table:
    """The table in whose names the file's modules are."""

    def known(table: Table) -> int:
        names = (n for rule in table.rules for i in range(rule.layers or 1) for n in rule.layer_sources(i))
        return sum(_plain(name.removesuffix(".weight")) in found for name in names)

    return max(flux.diffusers_rules(config), flux.bfl_rules(config), key=known)


def _pair(
    source: Source, names: Mapping[str, str], weight: str, shape: tuple[int, ...], noted: _Scale
) -> tuple[np.ndarray, np.ndarray]:
    """A pair (down [R, in], up [out, R]) with its scale in ``up``, for a weight [out, in]."""
    module = weight.removesuffix(".weight")
    for kind, word in (("down", "lora_A"), ("up", "lora_B")):
        if kind not in names:
            raise UserError(f"{source.path} lacks {word} of {module}, a layer that lora.targets names")
    down, up = (np.asarray(source.read(names[kind]), np.float32) for kind in ("down", "up"))
    if down.ndim != 2 or up.ndim != 2 or (up.shape[0], down.shape[1]) != shape or not down.shape[0] == up.shape[1] > 0:
        raise UserError(
            f"{source.path}: the factors of {module} have shapes {down.shape} and {up.shape}; "
            f"this transformer needs (r, {shape[1]}) and ({shape[0]}, r)"
        )
    alpha = None
    if "alpha" in names:
        values = np.asarray(source.read(names["alpha"]), np.float32).reshape(-1)
        if values.size != 1:
            raise UserError(f"{source.path}: {names['alpha']} has {values.size} numbers; expected one")
        if not np.isfinite(values).all():
            raise UserError(f"{source.path}: {names['alpha']} is {values[0]}; expected a finite number")
        alpha = float(values[0])
    return down, up * np.float32(noted.of(len(down), alpha))


def _put(
    factors: dict[str, np.ndarray],
    rule: Rule,
    layer: int,
    pairs: list[tuple[np.ndarray, np.ndarray]],
    lora: Lora,
    source: Source,
) -> None:
    """Writes one layer of the factors that a rule's pairs make."""
    module = rule.layer_sources(layer)[0].removesuffix(".weight")
    if len({len(down) for down, _ in pairs}) > 1:
        raise UserError(
            f"{source.path}: the factors of {module} and its neighbours differ in rank, which is not supported"
        )
    kernels = rule.transform.forward([up for _, up in pairs])
    for target, kernel in zip(rule.targets, kernels, strict=True):
        stem = target.removesuffix(KERNEL)
        parts = [kernel] if kernel.ndim == 2 else list(np.moveaxis(kernel, 1, 0))
        if stem + A not in factors:
            if np.any(kernel):
                raise UserError(f"{source.path}: {module} holds factors of {stem}, which lora.targets does not name")
            continue
        for index, part in enumerate(parts):
            down = pairs[index if len(pairs) > 1 else 0][0]
            a, b = _of_rank(down, part, lora.rank, f"{source.path}: the factors of {module}")
            place = layer if kernel.ndim == 2 else (layer, index)
            factors[stem + B][place] = b / np.float32(lora.scale)
            factors[stem + A][layer][:, ... if kernel.ndim == 2 else index] = a.T


def _of_rank(down: np.ndarray, up: np.ndarray, rank: int, what: str) -> tuple[np.ndarray, np.ndarray]:
    """Of a pair (down [R, in], up [R, *out]) the ``rank`` rows that count: all, or the one block that is not 0."""
    if len(down) == rank:
        return down, up
    if len(down) % rank == 0:
        blocks = [slice(start, start + rank) for start in range(0, len(down), rank)]
        filled = [block for block in blocks if np.any(up[block])]
        if len(filled) <= 1:
            return down[(filled or blocks)[0]], up[(filled or blocks)[0]]
    raise UserError(f"{what} have rank {len(down)}; lora.rank={rank} needs that or a block-diagonal pair of parts")


# --- what is said beside the factors ---


def _noted(source: Source) -> _Scale:
    """The scale from a file's header, else from the ``adapter_config.json`` beside it. Raises UserError."""
    place = pathlib.Path(source.path).parent / PEFT_CONFIG
    if text := getattr(source, "metadata", {}).get(ALPHA_NOTE):
        where, prefix = f"{source.path}: its {ALPHA_NOTE}", "transformer."
        try:
            note = schema.parse(text)
        except ValueError as error:
            raise UserError(f"{where} is no JSON: {error}; remove it from the file") from error
        if not isinstance(note, dict):
            raise UserError(f"{where} is no JSON object; remove it from the file")
    elif place.is_file():
        where, prefix, note = str(place), "", read_json(place)
    else:
        return _Scale(None, False)
    note = {key.removeprefix(prefix): value for key, value in note.items() if key.startswith(prefix)}
    kind = note.get("peft_type") or "LORA"
    if kind != "LORA":
        raise UserError(f"{where} describes {kind!s:.60}, which is not supported; expected a LoRA")
    for key in ("alpha_pattern", "rank_pattern", "use_dora", "lora_bias", "modules_to_save", "layer_replication"):
        if note.get(key):
            raise UserError(f"{where} asks for peft's {key}, which is not supported")
    start = note.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(("pissa", "olora", "corda", "loftq", "lora_ga")):
        raise UserError(f"{where}: a start by {start} changes the base as well: convert it to a plain LoRA in peft")
    try:
        found = schema.read(_Note, note, where)
    except ValueError as error:
        raise UserError(str(error)) from error
    return _Scale(found.lora_alpha, bool(found.use_rslora))
