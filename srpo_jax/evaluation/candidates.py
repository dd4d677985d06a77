"""What is evaluated: pipelines as they are, checkpoints of runs, and folders of pictures that others have drawn."""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import re
from collections import Counter
from typing import NamedTuple

import numpy as np

from srpo_jax import architectures, checkpoint, record, schema, storage, stored_weights
from srpo_jax.config import reward_of
from srpo_jax.data import images
from srpo_jax.errors import UserError
from srpo_jax.evaluation import history
from srpo_jax.models.lora import Lora
from srpo_jax.weights import fingerprint

NAME = r"\w[\w .+@-]*"  # of a model: what can stand in a file's name
ALL, IMAGES = "all", "images"


class Item(NamedTuple):
    """A picture that is wanted of every model: the prompt's text, and which of its pictures, from 0."""

    prompt: str
    image: int

    @property
    def name(self) -> np.ndarray:
        """What its noise depends on, uint32 [3]: the first 8 bytes of the prompt's SHA-256, and the number."""
        words = np.frombuffer(self._digest[:8], ">u4")
        return np.array([*words, self.image], np.uint32)

    @property
    def file(self) -> str:
        """Of its picture, in the folder of a model."""
        words = re.sub(r"[^\w]+", "-", self.prompt)[:40].strip("-") or "image"
        return f"{words}-{self._digest.hex()[:8]}-{self.image}.png"

    @property
    def _digest(self) -> bytes:
        return hashlib.sha256(self.prompt.encode()).digest()


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One of the models that are compared.

    Attributes:
      label: its name on the page.
      source: what it is, for people.
      content: tells its weights, or pictures, from others.
      pipeline: folder; None for pictures that are there.
      workdir, step, ema: the checkpoint whose weights stand in the pipeline's transformer, or beside it.
      lora: how these are low-rank factors; None if they are not.
      trained_with: fingerprints of the rewards that it was trained with (``Score.content``).
      pictures: those that are there; of a pipeline none.
    """

    label: str
    source: str
    content: str
    pipeline: str | None = None
    workdir: str | None = None
    step: int | None = None
    ema: bool = False
    lora: Lora | None = None
    trained_with: tuple[str, ...] = ()
    pictures: tuple[images.Picture, ...] = dataclasses.field(default=(), repr=False)

    @property
    def folder(self) -> str:
        """Its label as the name of a folder."""
        return self.label.replace(" ", "-")

    @functools.cached_property
    def there(self) -> dict[Item, images.Picture]:
        """Its ``pictures`` by caption and number, counted from 0 for each caption in their order."""
        counts: Counter[str] = Counter()
        found = {}
        for picture in self.pictures:
            found[Item(picture.caption, counts[picture.caption])] = picture
            counts[picture.caption] += 1
        return found

    def file(self, item: Item) -> str:
        """Of a picture that is drawn, below the folder of the evaluation."""
        return f"{IMAGES}/{self.folder}/{item.file}"

    def where(self, item: Item) -> str:
        """``file``, or the name of a picture that was there."""
        return self.there[item].name if self.pictures else self.file(item)


class Asked(NamedTuple):
    """A flag of the command line: "model", "checkpoint" or "pictures", and its value."""

    kind: str
    text: str


def read(
    asked: list[Asked], ema: bool, quantize: str, step: int | str | None = None, outside: bool = False
) -> list[Candidate]:
    """The candidates that a command line asks for, in its order.

    Args:
      asked: ``[LABEL=]FOLDER`` of a pipeline or of pictures, and ``[LABEL=]WORKDIR[@STEP|@best|@all]`` of a run, whose
        pipeline is the one that is named last before it.
      ema: take the moving averages of checkpoints.
      quantize: how the frozen weights of a LoRA are stored, "trained" is as the run stored them.
      step: of the runs that say none by ``@``: its number, ``ALL`` or ``history.BEST``; None takes the newest.
      outside: see ``data.images.read``.

    Raises UserError for what is not there, a checkpoint before any pipeline, and two of one label.
    """
    found: list[Candidate] = []
    model = None
    for kind, text in asked:
        label, place = _split(text)
        if kind == "model":
            model = _pipeline(label, place)
            found.append(model)
        elif kind == "pictures":
            found.append(_pictures(label, place, outside))
        elif model is None:
            raise UserError(
                f"--checkpoint={text}: name the pipeline that it was trained from before it, --model=FOLDER"
            )
        else:
            found += _checkpoints(label, place, model, ema, quantize, step)
    seen: dict[str, Candidate] = {}
    for candidate in found:
        if (other := seen.setdefault(candidate.folder, candidate)) is not candidate:
            both = f"{other.source} and {candidate.source}"
            raise UserError(f"{both} are both called {candidate.label!r}; give one another name: NAME=...")
    return found


def _split(text: str) -> tuple[str | None, str]:
    if found := re.fullmatch(rf"({NAME})=(.+)", text, re.DOTALL):
        return found[1].strip(), os.path.expanduser(found[2])
    return None, os.path.expanduser(text)


def _name(path: str) -> str:
    """A path's last part, as a label."""
    return re.sub(r"[^\w.+@-]+", "-", path.rstrip("/").rsplit("/", 1)[-1]).strip("-.+@") or "model"


def _pipeline(label: str | None, path: str) -> Candidate:
    family, _ = architectures.read_pipeline(path)
    parts = fingerprint.of_parts(path, family.components, family.tokenizers)
    return Candidate(label or _name(path), path, fingerprint.joined(parts.values()), path)


def _checkpoints(
    label: str | None, text: str, model: Candidate, ema: bool, quantize: str, step: int | str | None
) -> list[Candidate]:
    found = re.fullmatch(rf"(.+?)(?:@(\d+|{ALL}|{history.BEST}))?", text, re.DOTALL)
    workdir, which = found[1], found[2] or step
    chosen = history.best(workdir, int(which) if str(which).isdecimal() else which)
    stored_weights.load_params(workdir, None if chosen == ALL else chosen, ema)  # what is wrong is told here
    there = checkpoint.steps(workdir)
    steps = there if chosen == ALL else [chosen or there[-1]]
    lora, rewards = record.lora(workdir), _rewards(workdir)
    if lora is None and quantize != "none":
        raise UserError(f"--quantize={quantize} is for the base of a LoRA run; {workdir} is none")
    if lora is not None and quantize != "trained":
        lora = dataclasses.replace(lora, quantized=quantize)
    average = " EMA" if ema else ""
    made = []
    for step in steps:
        marker = storage.path(workdir) / checkpoint.CHECKPOINTS / str(step) / checkpoint.COMMITTED
        told = [model.content, hashlib.sha256(marker.read_bytes()).hexdigest(), str(step), average, repr(lora)]
        name = label if label and which != ALL else f"{label or _name(workdir)}@{step}{average}"
        source = f"{workdir}, update {step}{', moving average' if ema else ''}, of {model.source}"
        made.append(
            Candidate(name, source, fingerprint.joined(told), model.pipeline, workdir, step, ema, lora, rewards)
        )
    return made


def _rewards(workdir: str) -> tuple[str, ...]:
    """Fingerprints of the rewards that a run was trained with, as far as its folder tells."""
    file = storage.path(workdir) / record.MODELS
    try:
        content = schema.parse(file.read_bytes()) if file.exists() else {}
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read as JSON: {error}; bring back a copy of it, or delete it") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} holds no JSON object; bring back a copy of it, or delete it")
    return tuple(sorted(str(value) for key, value in content.items() if reward_of(key)))


def _pictures(label: str | None, path: str, outside: bool) -> Candidate:
    found, wrong = images.read(path, outside=outside)
    if wrong:
        raise UserError(f"--pictures={path}: {images.describe_broken(wrong, len(found) + len(wrong))}")
    digest = hashlib.sha256()
    for picture in found:
        try:
            content = picture.content()
        except OSError as error:
            raise UserError(f"{picture.name} cannot be read: {error.strerror or error}") from error
        digest.update(json.dumps([picture.caption, len(content)]).encode() + content)
    name = label or _name(str(pathlib.Path(path).resolve()))
    return Candidate(name, path, digest.hexdigest()[:16], pictures=tuple(found))
