"""The embedded world: which concepts the small models know, how they are split, and how they are prompted.

The data set (``data/concepts.csv``) has 1,555 concepts, too many to be learnt well by a model that trains on two CPU
cores. ``data/world.csv`` lists the 241 that make up the world. They were chosen for one clear object each and for
pictures that stay apart at low resolution in every style, that share their drawing between the styles, and whose "3D"
picture is not nearly its "Flat" one; clock faces, keycaps, lettered signs, people and most smileys are out.
"""

import csv
import dataclasses
import functools
import pathlib

DATA = pathlib.Path(__file__).parent / "data"
STYLES = ("3D", "Flat", "Mono")
SPLITS = ("train", "holdout")


@dataclasses.dataclass(frozen=True)
class Concept:
    """One row of ``concepts.csv``.

    Attributes:
      id: code points in hex joined by "-", which is also the name of the concept's pictures.
      emoji: the character itself.
      caption: its CLDR short name as lower-case ASCII words, unique.
      group: the Unicode group, for example "food-drink".
      subgroup: the Unicode subgroup, for example "food-fruit".
      split: "train" or "holdout". The reward model and SRPO's prompts see the train split only.
    """

    id: str
    emoji: str
    caption: str
    group: str
    subgroup: str
    split: str


@functools.cache
def concepts() -> tuple[Concept, ...]:
    """All concepts of the data set in the order of its table."""
    fields = [field.name for field in dataclasses.fields(Concept)]
    with open(DATA / "concepts.csv", encoding="utf-8", newline="") as file:
        return tuple(Concept(**{name: row[name] for name in fields}) for row in csv.DictReader(file))


@functools.cache
def world() -> tuple[Concept, ...]:
    """The concepts that the shipped models know, in the order of the data set's table."""
    with open(DATA / "world.csv", encoding="utf-8", newline="") as file:
        chosen = {row["id"] for row in csv.DictReader(file)}
    return tuple(concept for concept in concepts() if concept.id in chosen)


def split(name: str) -> tuple[Concept, ...]:
    """The world's concepts of the split "train" or "holdout". Raises ValueError for another name."""
    if name not in SPLITS:
        raise ValueError(f"split {name!r} is unknown; choose one of {', '.join(SPLITS)}")
    return tuple(concept for concept in world() if concept.split == name)


def prompt(concept: Concept, style: str | None = None) -> str:
    """The text that asks for a picture: "3D. red apple", or the bare caption "red apple" if no style is given.

    Raises ValueError for a style that the world does not have.
    """
    if style is None:
        return concept.caption
    if style not in STYLES:
        raise ValueError(f"style {style!r} is unknown; choose one of {', '.join(STYLES)}")
    return f"{style}. {concept.caption}"
