"""Trains.

    python -m srpo_jax.main --config=configs/flux_dev_hps.py --workdir=runs/hps [--config.optim.learning_rate=1e-5 ...]

  --config   recipe, a Python file; --config.KEY=VALUE overrides one of its keys
  --workdir  folder of the run, made if there is none; local, or gs://BUCKET/PATH (pip install gcsfs)

A job of several processes starts this in each of them. On TPUs and under SLURM they find each other; elsewhere give all
of --coordinator=HOST:PORT (of process 0), --process_id (from 0) and --process_count.

The same command again goes on from the newest checkpoint. After Ctrl-C or SIGTERM the update is finished and saved.

Exit codes: 0 the run is complete; 128 + signal (143 for SIGTERM) it was stopped and saved; 134 another process of the
job was lost: start all of them again; 1 a mistake, or a crash.
"""

import sys
from signal import SIGINT
from typing import NamedTuple

from absl import flags, logging
from ml_collections import ConfigDict

from srpo_jax import command, distributed, errors, train
from srpo_jax import config as config_lib
from srpo_jax.errors import UserError


class Command(NamedTuple):
    """A command line: what to train, where, and the place of this process in its job (see ``distributed.start``)."""

    config: ConfigDict
    workdir: str
    coordinator: str | None = None
    process_id: int | None = None
    process_count: int | None = None


def parse(argv: list[str]) -> Command:
    """Reads a command line; ``argv[0]`` is the program. Raises UserError for what is wrong with it."""

    def define(values: flags.FlagValues) -> None:
        flags.DEFINE_string("workdir", None, "", flag_values=values)
        flags.DEFINE_string("coordinator", None, "", flag_values=values)
        for name in ("process_id", "process_count"):
            flags.DEFINE_integer(name, None, "", flag_values=values)

    config, values = command.parse(argv, "python -m srpo_jax.main", define)
    if not values["workdir"]:
        raise UserError("--workdir is missing; see python -m srpo_jax.main --help")
    return Command(config, **values)


def main() -> None:
    """Trains by the process's command line."""
    if {"--help", "-h"} & set(sys.argv[1:]):
        print(__doc__ + "\nKeys of a config and their defaults (srpo_jax/config.py says what they mean):\n")
        print("\n".join(f"  {key} = {value!r}" for key, value in config_lib.flatten(config_lib.default()).items()))
        return
    task = parse(sys.argv)
    config_lib.validate(task.config)  # before machines wait for each other
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
