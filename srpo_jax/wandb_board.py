"""A run's numbers on Weights & Biases, beside TensorBoard; offline, in files that ``wandb sync WORKDIR/wandb/*`` sends.

The run's id lies in WORKDIR/wandb.json: a run that goes on is the same one there. What it had reported of later
updates than it goes on from is reported again; charts are over "update".
"""

import importlib.util
import json
import os
import pathlib
import secrets
import tempfile

import jax
from ml_collections import ConfigDict

from srpo_jax import config as config_lib
from srpo_jax import storage
from srpo_jax.errors import UserError

FILE = "wandb.json"


def check(config: ConfigDict, workdir: str | os.PathLike) -> None:
    """Raises UserError if the board that a configuration asks for cannot be written from here."""
    asked = config.wandb
    if not asked.project:
        return
    if importlib.util.find_spec("wandb") is None:
        raise UserError(
            f"config.wandb.project={asked.project!r} needs another package: pip install '.[wandb]', or leave it empty"
        )
    if asked.mode == "offline" and storage.in_bucket(storage.path(workdir)):
        raise UserError(f"config.wandb.mode='offline' writes files, {workdir} is a bucket; choose a local --workdir")


class Board:
    """A run of Weights & Biases; of a job, process 0 makes one.

    Args:
      config: of the run, with ``wandb.project``.
      workdir: of the run.

    Raises UserError if Weights & Biases refuses it.
    """

    def __init__(self, config: ConfigDict, workdir: str | os.PathLike):
        import wandb

        place = storage.path(workdir)
        file, asked, identity = place / FILE, config.wandb, ""
        if file.exists():
            try:
                identity = str(json.loads(file.read_text(encoding="utf-8"))["id"])
            except (ValueError, KeyError, TypeError):
                identity = ""
        identity = identity or secrets.token_hex(6)
        storage.write(file, f"{json.dumps({'id': identity})}\n".encode())
        self._temporary = tempfile.TemporaryDirectory(prefix="srpo_jax.") if storage.in_bucket(place) else None
        try:
            self._run = wandb.init(
                project=asked.project,
                name=asked.name or pathlib.PurePosixPath(os.fspath(place)).name,
                id=identity,
                resume="allow",
                mode=asked.mode,
                dir=self._temporary.name if self._temporary else os.fspath(place),
                config=config_lib.flatten(config),
                settings=wandb.Settings(console="off", silent=True),
            )
        except wandb.Error as error:
            words = " ".join(str(error).split())[:300]
            raise UserError(
                f"config.wandb.project={asked.project!r}: Weights & Biases refuses ({words}); log in with `wandb "
                "login`, or set config.wandb.mode=offline"
            ) from error
        # An own axis: rows of updates that are repeated after an interruption would be dropped on the board's own.
        self._run.define_metric("*", step_metric="update")

    def log(self, step: int, values: dict[str, float]) -> None:
        """Reports numbers of an update by name."""
        self._run.log({"update": step} | values)

    def close(self) -> None:
        """Sends what is left, or writes it."""
        self._run.finish()
        if self._temporary:
            self._temporary.cleanup()


def open_board(config: ConfigDict, workdir: str | os.PathLike) -> Board | None:
    """The board of a configuration on process 0; None where there is none."""
    return Board(config, workdir) if config.wandb.project and jax.process_index() == 0 else None
