"""Trains.

    python -m srpo_jax.main --config=configs/flux_dev_hps.py --workdir=runs/hps [--config.optim.learning_rate=1e-5 ...]

A job of several processes starts this in each of them. On TPUs and under SLURM they find each other; elsewhere give all
of --coordinator, --process-id and --process-count.

The same command again goes on from the newest checkpoint. After Ctrl-C or SIGTERM the update is finished and saved.

Exit codes: 0 the run is complete; 128 + signal (143 for SIGTERM) it was stopped and saved; 134 another process of the
job was lost: start all of them again; 1 a mistake, or a crash.
"""

import sys
from signal import SIGINT
from typing import NamedTuple

from absl import logging
from ml_collections import ConfigDict

from srpo_jax import command, distributed, errors, train, validation
from srpo_jax import config as config_lib


class Command(NamedTuple):
    """A command line: what to train, where, and the place of this process in its job (see ``distributed.start``)."""

    config: ConfigDict
    workdir: str
    coordinator: str | None = None
    process_id: int | None = None
    process_count: int | None = None


def parse(arguments: list[str] | None) -> Command:
    """Reads a command line. Raises UserError for what is wrong with it."""
    parser = command.parser("main", __doc__)
    keys = "".join(f"\n  {key} = {value!r}" for key, value in config_lib.flatten(config_lib.default()).items())
    parser.epilog = f"Keys of a config and their defaults (srpo_jax/config.py says what they mean):\n{keys}"
    words = "folder of the run, made if there is none; local, or gs://BUCKET/PATH (pip install gcsfs)"
    parser.add_argument("--workdir", type=command.path, required=True, help=words)
    command.add_job(parser)
    config, own = command.parse_recipe(parser, arguments)
    return Command(config, own.workdir, own.coordinator, own.process_id, own.process_count)


def main(arguments: list[str] | None = None) -> None:
    """Trains by a command line. Raises UserError."""
    task = parse(arguments)
    validation.validate(task.config)  # before machines wait for each other
    logging.set_verbosity(logging.ERROR)  # Orbax tells every step of every save
    with distributed.job(task.coordinator, task.process_id, task.process_count):
        try:
            signal = train.train(task.config, task.workdir)
        except KeyboardInterrupt:  # before the first update, or the second one: there is nothing to finish
            signal = SIGINT
    if signal is not None:
        sys.exit(128 + signal)


if __name__ == "__main__":
    sys.exit(errors.run(main))
