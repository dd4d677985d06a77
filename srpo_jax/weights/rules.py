"""The language of the conversion tables: which tensors of a foreign file make which of our parameters.

A table is written once, for reading (import); writing (export) runs the same rules backwards. Nothing here touches
files: see ``engine`` for the strict, streaming execution and ``transforms`` for the arrays' part.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

Arrays = list[np.ndarray]


@dataclasses.dataclass(frozen=True)
class Transform:
    """An invertible rearrangement of arrays, without arithmetic: every element is moved, none is changed.

    ``forward`` maps a rule's sources to its targets, ``inverse`` back; both list to list in the rule's order, and both
    for one layer. They hold for any dtype and are exact inverses bit for bit. Results may be views of the inputs.
    """

    forward: Callable[[Arrays], Arrays]
    inverse: Callable[[Arrays], Arrays]

    def __rshift__(self, after: "Transform") -> "Transform":
        """``a >> b``: first a, then b (on the way in; the inverse runs b's inverse, then a's)."""
        return Transform(
            lambda arrays: after.forward(self.forward(arrays)),
            lambda arrays: self.inverse(after.inverse(arrays)),
        )

    def inverted(self) -> "Transform":
        """The same rearrangement the other way round."""
        return Transform(self.inverse, self.forward)


def _names(names: str | Sequence[str]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


@dataclasses.dataclass(frozen=True)
class Rule:
    """Some foreign tensors and the parameters of ours that they make.

    Attributes:
      targets: our parameters' dotted paths; a single string is taken as one target.
      sources: foreign tensor names; a single string is taken as one source. With ``layers``, ``{i}`` is the layer.
      transform: from the sources to the targets, for one layer.
      layers: None for plain parameters. A number says that targets are stacks [layers, ...] whose slice i comes from
        the sources with i in place of ``{i}``.
    """

    targets: str | Sequence[str]
    sources: str | Sequence[str]
    transform: Transform
    layers: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", _names(self.targets))
        object.__setattr__(self, "sources", _names(self.sources))
        for name in self.sources:
            if (self.layers is not None) != ("{i}" in name):
                raise ValueError(f"rule for {self.targets[0]}: {name!r} and layers={self.layers} disagree on {{i}}")

    def layer_sources(self, layer: int) -> tuple[str, ...]:
        """The foreign names of one layer (of the only one, 0, where the rule is not stacked)."""
        return tuple(name.replace("{i}", str(layer)) for name in self.sources)


@dataclasses.dataclass(frozen=True)
class Table:
    """All rules between one network's parameters and one foreign format.

    Attributes:
      rules: every parameter is a target of exactly one rule; every foreign tensor is a source of exactly one.
      ignored: names that files of this format may hold and that carry nothing learned (``position_ids`` buffers). They
        are skipped when read and not written. Anything else that no rule uses is an error.
      aliases: second names of tied tensors, ``{alias: name used in a rule}``. A file may hold either name or both; if
        both, the two must be equal bit for bit. Only the rule's name is written.
      unread: how the names of parts begin that such files hold and our network does not have, as the text tower of a
        CLIP whose vision tower alone it is. They are skipped as well.
    """

    rules: tuple[Rule, ...]
    ignored: frozenset[str] = frozenset()
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    unread: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "rules", tuple(self.rules))
        object.__setattr__(self, "ignored", frozenset(self.ignored))
        for kind in ("targets", "sources"):
            seen: set[str] = set()
            for name in (name for rule in self.rules for name in getattr(rule, kind)):
                if name in seen:
                    raise ValueError(f"table names {name!r} twice among the {kind} of its rules")
                seen.add(name)
