"""The folder of an evaluation: what was scored, picture by picture, as it goes.

    OUT/evaluation.json   how pictures are drawn, and which models and scorers these are, by their contents
       /scores.jsonl      a line a picture: {"model", "prompt", "image", "file", "scores": {name: value}, "signals":
                          {name: value}}
       /drift.json        of checkpoints from their pipelines: {"of": [[prompt, number]], "drift": {MODEL: value}}
       /images/MODEL/     the pictures, WORDS-PROMPT-NUMBER.png, PROMPT being the start of its SHA-256

Lines are added as pictures are scored. What is there is not made again; a score that is asked for later gets lines of
its own. A last line that was cut off is dropped.
"""

import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from srpo_jax import storage
from srpo_jax.errors import UserError
from srpo_jax.evaluation.candidates import Candidate, Item

SETTINGS, SCORES, DRIFT = "evaluation.json", "scores.jsonl", "drift.json"


class Records:
    """The scores and signals of an evaluation by (folder of the model, item), and their file.

    Args:
      out: folder of the evaluation, which need not exist.
    """

    def __init__(self, out: pathlib.Path):
        self._out = out
        self.scores: dict[tuple[str, Item], dict[str, float]] = {}
        self.signals: dict[tuple[str, Item], dict[str, float]] = {}
        file = out / SCORES
        content = file.read_bytes() if file.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        for number, line in enumerate(whole.decode().split("\n")[:-1], 1):
            try:
                record = json.loads(line)
                key = record["model"], Item(record["prompt"], record["image"])
                self._note(key, record["scores"], record.get("signals", {}))
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{file}, line {number}, cannot be read ({error}); choose another --out") from error
        self._cut = len(content) - len(whole)

    def _note(self, key: tuple[str, Item], scores: dict[str, float], signals: dict[str, float]) -> None:
        self.scores.setdefault(key, {}).update(scores)
        self.signals.setdefault(key, {}).update(signals)

    def begin(
        self, settings: dict[str, Any], models: dict[str, dict[str, str]], scores: dict[str, dict[str, str]]
    ) -> None:
        """Writes what this evaluation is, and what it adds to an earlier one of the folder.

        Args:
          settings: of drawing, by the names of their flags.
          models, scores: by name, each with "source", for people, and "content", which tells it from others.

        Raises UserError if what is there under one name was made in another way, and writes nothing then.
        """
        file = self._out / SETTINGS
        there: dict[str, Any] = {"settings": settings, "models": {}, "scores": {}}
        if file.exists():
            try:
                there = json.loads(file.read_text(encoding="utf-8"))
            except ValueError as error:
                raise UserError(f"{file} cannot be read: {error}; choose another --out") from error
        for key, value in settings.items():
            if (other := there["settings"].get(key)) != value:
                flag = "--" + key.replace("_", "-")
                raise UserError(f"{self._out} holds pictures of {flag}={other}, not {value}; choose another --out")
        for group, given in (("models", models), ("scores", scores)):
            for name, what in given.items():
                if there[group].get(name, what)["content"] != what["content"]:
                    words = f"{there[group][name]['source']}, with other weights or pictures than {what['source']}"
                    raise UserError(f"{self._out} holds {name!r} of {words}; give this one another name or --out")
                there[group][name] = what
        storage.write(storage.path(file), (json.dumps(there, indent=2) + "\n").encode())
        if self._cut:
            with open(self._out / SCORES, "rb+") as lines:
                lines.truncate(os.path.getsize(self._out / SCORES) - self._cut)
            self._cut = 0

    def drift(self, items: Sequence[Item]) -> dict[str, float]:
        """What is known of drift on these items, by the folder of the model."""
        try:
            found = json.loads((self._out / DRIFT).read_text(encoding="utf-8"))
            return dict(found["drift"]) if found["of"] == [list(item) for item in items] else {}
        except (OSError, ValueError, KeyError, TypeError):  # it is made again
            return {}

    def keep_drift(self, items: Sequence[Item], values: dict[str, float]) -> None:
        """Writes drift on these items."""
        content = json.dumps({"of": items, "drift": values}, indent=2, ensure_ascii=False)
        storage.write(storage.path(self._out / DRIFT), content.encode())

    def add(self, model: Candidate, item: Item, scores: dict[str, float], signals: dict[str, float]) -> None:
        """Adds a line."""
        self._note((model.folder, item), scores, signals)
        record = {"model": model.folder, "prompt": item.prompt, "image": item.image}
        record |= {"file": model.where(item), "scores": scores}
        record |= {"signals": signals} if signals else {}
        with open(self._out / SCORES, "a", encoding="utf-8") as lines:
            lines.write(json.dumps(record, allow_nan=False, ensure_ascii=False) + "\n")
