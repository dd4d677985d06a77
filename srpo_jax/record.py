"""What a workdir says of its run, beside the checkpoints.

WORKDIR/config.json     the run's configuration; every checkpoint holds it too
       /recipe.json     the recipe that it came from, as it was without the command line's changes
       /models.json     fingerprints of its models, see resume
       /changes.jsonl   keys of the configuration that were changed on purpose, and when
"""

import datetime
import json
import os
from collections.abc import Collection
from typing import Any, NamedTuple

import jax
from etils import epath
from ml_collections import ConfigDict

from srpo_jax import checkpoint, leftovers, resume, schema, storage, terminal
from srpo_jax import config as config_lib
from srpo_jax.errors import UserError
from srpo_jax.models.lora import Lora

CONFIG, RECIPE, MODELS, CHANGES = "config.json", "recipe.json", "models.json", "changes.jsonl"


class Recipe(NamedTuple):
    """A recipe: the file's name, and what it says (``config.flatten``)."""

    file: str
    values: dict[str, Any]


def check(
    workdir: str | os.PathLike, config: ConfigDict, models: dict[str, str], changes: Collection[str] = ()
) -> None:
    """Checks that a run of ``config`` may start or go on in ``workdir``, which need not exist yet. Writes nothing.

    ``models`` are the fingerprints of its models (``resume.fingerprints``); ``changes`` are keys, or groups of keys,
    that may differ from what the workdir's run had.

    Raises UserError if it is not a folder, or a bucket that does not answer, or holds a run of another configuration
    (the message names what differs).
    """
    workdir = storage.path(workdir)
    storage.check(workdir)
    storage.check_writable(workdir, "--workdir")
    there = read_config(workdir)
    if there is None:
        return
    left = leftovers.damaged(workdir / checkpoint.CHECKPOINTS, checkpoint.complete)
    if left and not checkpoint.steps(workdir):
        raise UserError(
            f"{workdir / checkpoint.CHECKPOINTS} holds no checkpoint that can be read, but {', '.join(left)}; bring "
            "back a copy of one, or choose another --workdir to begin anew"
        )
    found = resume.differences(config_lib.flatten(config), there, models, _read_models(workdir), changes)
    if found:
        more = f"; and {len(found) - 6} more" if len(found) > 6 else ""
        raise UserError(f"{workdir} holds a run of another config: {'; '.join(found[:6])}{more}. "
                        "Choose another --workdir, or change a key of this run on purpose: --change=KEY")  # fmt: skip


def write(
    workdir: str | os.PathLike,
    config: ConfigDict,
    models: dict[str, str],
    changes: Collection[str] = (),
    step: int = 0,
    recipe: Recipe | None = None,
) -> None:
    """Writes ``config.json``, ``models.json`` and, if there is a ``recipe``, ``recipe.json``, each at once or not at
    all; process 0 does it for a job.

    Those of the keys ``changes`` that had another value before are recorded in ``changes.jsonl``, with the ``step``
    from which the new one holds.
    """
    if jax.process_index() != 0:
        return
    if changes and (there := read_config(storage.path(workdir))) is not None:
        found = resume.changed(config_lib.flatten(config), there, changes)
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        lines = [
            json.dumps({"time": now, "after_update": step, "key": key, "from": before, "to": after})
            for key, (before, after) in found.items()
        ]
        if lines:
            file = storage.path(workdir) / CHANGES
            before = file.read_bytes() if file.exists() else b""  # whatever happened to it stays
            between = b"\n" if before and not before.endswith(b"\n") else b""
            storage.write(file, before + between + "".join(f"{line}\n" for line in lines).encode())
    storage.write(storage.path(workdir) / CONFIG, f"{config_lib.to_json(config)}\n".encode())
    storage.write(storage.path(workdir) / MODELS, f"{json.dumps(models, indent=2)}\n".encode())
    if recipe is not None:
        storage.write(storage.path(workdir) / RECIPE, f"{json.dumps(recipe._asdict(), indent=2)}\n".encode())


def read_config(workdir: epath.Path) -> dict[str, Any] | None:
    """The configuration of a run, flat, in the keys of the version that wrote it; None if there is no run.

    It stands in ``config.json`` and, for the case that this is broken or gone, in every checkpoint. Raises UserError if
    it can be read nowhere.
    """
    file, why = workdir / CONFIG, "is gone"
    try:
        if file.exists():
            return config_lib.flatten(_object(file))
    except PermissionError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from error
    except (ValueError, OSError) as error:
        why = f"cannot be read as JSON ({error})"
    numbers = checkpoint.steps(workdir)
    for step in reversed(numbers):
        try:
            found = _object(workdir / checkpoint.CHECKPOINTS / str(step) / "run" / "metadata")["config"]
        except (ValueError, OSError, KeyError):
            continue
        if isinstance(found, dict):
            terminal.warn(f"{file} {why}; the configuration in the checkpoint of update {step} is used in its place")
            return found
    damaged = leftovers.damaged(workdir / checkpoint.CHECKPOINTS, checkpoint.complete)
    if not file.exists() and not damaged and not numbers:
        return None
    raise UserError(
        f"{file} {why}, and no checkpoint beside it holds the configuration; bring back a copy of it, or choose "
        "another --workdir"
    )


def _read_models(workdir: epath.Path) -> dict[str, str]:
    """The fingerprints of a run's models; {} where they cannot be read, or an earlier version wrote none."""
    file = workdir / MODELS
    try:
        return _object(file) if file.exists() else {}
    except (ValueError, OSError) as error:
        terminal.warn(f"{file} cannot be read as JSON ({error}); models are told by their places")
        return {}


def _object(file: epath.Path) -> dict[str, Any]:
    """A JSON object from a file. Raises ValueError if it is none, OSError."""
    content = schema.parse(file.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError("it holds no JSON object")
    return content


def lora(workdir: str | os.PathLike) -> Lora | None:
    """How the low-rank factors of a run with checkpoints adapt their base; None if it trained the transformer itself.

    Raises UserError if the run's configuration cannot be read.
    """
    workdir = storage.path(workdir)
    try:
        found = read_config(workdir)
    except UserError:
        if (workdir / CONFIG).exists():
            raise
        found = None
    if found is None:  # not a run's, but a folder of checkpoints
        return None
    try:
        content = {
            key.removeprefix("lora."): value
            for key, value in resume.up_to_date(found).items()
            if key.startswith("lora.")
        }
        return Lora.from_config(ConfigDict(content))
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"the configuration of {workdir} cannot be read: {error}") from error
