"""Which prompts are used: explicit conditions, and how many each of them left out."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from srpo_jax.errors import UserError
from srpo_jax.patterns import Pattern


@dataclasses.dataclass(frozen=True)
class Filter:
    """Conditions on prompts; the defaults keep everything.

    Attributes:
      min_length: characters.
      max_length: characters; 0 is no limit.
      include: regular expression that must be found somewhere in the prompt; "" is none.
      exclude: one that must not be found.
      unique: of equal prompts keep the first.
      sample: keep this many of the rest, drawn at random, in their order; 0 keeps all.
      seed: of that draw.
    """

    min_length: int = 0
    max_length: int = 0
    include: str = ""
    exclude: str = ""
    unique: bool = False
    sample: int = 0
    seed: int = 0


def select(prompts: Sequence[str], conditions: Filter) -> tuple[list[int], dict[str, int]]:
    """Applies the conditions one after the other, in the order of ``Filter``'s attributes.

    Returns:
      The places of the prompts that stay, ascending, and how many each condition left out, in words, zeros included;
      a condition that was not set is not named.

    Raises UserError for a regular expression that is none or takes too long, or if no prompt stays.
    """
    places, counts = list(range(len(prompts))), {}

    def keep(name: str, stay: list[int]) -> None:
        nonlocal places
        counts[name] = len(places) - len(stay)
        places = stay

    least, most = conditions.min_length, conditions.max_length
    if least:
        keep(f"shorter than {least}", [place for place in places if len(prompts[place]) >= least])
    if most:
        keep(f"longer than {most}", [place for place in places if len(prompts[place]) <= most])
    if conditions.include:
        pattern = Pattern(conditions.include, "include")
        keep(f"without /{conditions.include}/", [place for place in places if pattern.found_in(prompts[place])])
    if conditions.exclude:
        pattern = Pattern(conditions.exclude, "exclude")
        keep(f"with /{conditions.exclude}/", [place for place in places if not pattern.found_in(prompts[place])])
    if conditions.unique:
        first: dict[str, int] = {}
        for place in places:
            first.setdefault(prompts[place], place)
        keep("repeated", list(first.values()))
    if 0 < conditions.sample < len(places):
        chosen = np.random.default_rng(conditions.seed).choice(len(places), conditions.sample, replace=False)
        keep("not drawn", [places[index] for index in sorted(chosen)])
    if not places:
        raise UserError(f"no prompt is left: {describe(len(prompts), counts)}")
    return places, counts


def describe(total: int, counts: dict[str, int], noun: str = "prompts") -> str:
    """The result of ``select`` of ``total`` prompts in a line, as "10 prompts; left out: 2 repeated; 8 stay"."""
    if not counts:
        return f"{total} {noun}"
    left_out = ", ".join(f"{count} {name}" for name, count in counts.items())
    return f"{total} {noun}; left out: {left_out}; {total - sum(counts.values())} stay"
