"""Trains.

    python -m srpo_jax.main --config=configs/flux_dev_hps.py --workdir=runs/hps [--config.optim.learning_rate=1e-5 ...]

A job of several processes starts this in each of them. On TPUs and under SLURM they find each other; elsewhere give all
of --coordinator, --process-id and --process-count.

The same command again goes on from the newest checkpoint; --change=KEY lets a key of its configuration have another
value from there on. --replay=STEP shows what was not finite in an update that was skipped (docs/faults.md). After
Ctrl-C or SIGTERM the update is finished and saved.

Exit codes: 0 the run is complete; 128 + signal (143 for SIGTERM) it was stopped and saved; 134 another process of the
job was lost: start all of them again; 74 storage did not take a checkpoint; 1 a mistake, or a crash.
"""

import sys
from signal import SIGINT
from typing import NamedTuple

from absl import logging
from ml_collections import ConfigDict

from srpo_jax import command, distributed, errors, nonfinite, record, train, validation
from srpo_jax import config as config_lib


class Command(NamedTuple):
    """A command line: what to train, where, the place of this process in its job (see ``distributed.start``), keys that
    may change, the update to go through again instead, and the recipe."""

    config: ConfigDict
    workdir: str
    coordinator: str | None = None
    process_id: int | None = None
    process_count: int | None = None
    changes: tuple[str, ...] = ()
    replay: int | None = None
    recipe: record.Recipe | None = None


def parse(arguments: list[str] | None) -> Command:
    """Reads a command line. Raises UserError for what is wrong with it."""
    parser = command.parser("main", __doc__)
    keys = "".join(f"\n  {key} = {value!r}" for key, value in config_lib.flatten(config_lib.default()).items())
    parser.epilog = f"Keys of a config and their defaults (srpo_jax/config.py says what they mean):\n{keys}"
    words = "folder of the run, made if there is none; local, or gs://BUCKET/PATH (pip install gcsfs)"
    parser.add_argument("--workdir", type=command.path, required=True, help=words)
    words = "key (or group of keys) of the config that may differ from the run in --workdir; can be given several times"
    parser.add_argument("--change", action="append", default=[], type=key, metavar="KEY", help=words)
    words = "do not train; show what was not finite in an update that was skipped, of WORKDIR/nonfinite"
    parser.add_argument("--replay", type=command.at_least(1), metavar="STEP", help=words)
    command.add_job(parser)
    config, own = command.parse_recipe(parser, arguments)
    place = own.coordinator, own.process_id, own.process_count
    return Command(config, own.workdir, *place, tuple(own.change), own.replay, record.Recipe(own.config, own.recipe))


def key(text: str) -> str:
    """A key of a config, ``optim.b1`` or ``config.optim.b1``. Raises UserError for an unknown one."""
    found = text.removeprefix("--").removeprefix("config.")
    config_lib.check_key(found)
    return found


def main(arguments: list[str] | None = None) -> None:
    """Trains by a command line. Raises UserError."""
    task = parse(arguments)
    validation.validate(task.config)  # before machines wait for each other
    logging.set_verbosity(logging.FATAL)  # Orbax tells every step of every save, and of one that fails many times
    with distributed.job(task.coordinator, task.process_id, task.process_count):
        try:
            if task.replay is not None:
                nonfinite.replay(task.config, task.workdir, task.replay, task.changes)
                return
            signal = train.train(task.config, task.workdir, task.changes, task.recipe)
        except KeyboardInterrupt:  # before the first update, or the second one: there is nothing to finish
            signal = SIGINT
    if signal is not None:
        sys.exit(128 + signal)


if __name__ == "__main__":
    sys.exit(errors.run(main))
