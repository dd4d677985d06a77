"""Trains.

    python -m srpo_jax.main --config=configs/flux_dev_hps.py --workdir=runs/hps [--config.optim.learning_rate=1e-5 ...]

  --config   recipe, a Python file; --config.KEY=VALUE overrides one of its keys
  --workdir  folder of the run, made if there is none

A job of several processes starts this in each of them. On TPUs and under SLURM they find each other; elsewhere give all
of --coordinator=HOST:PORT (of process 0), --process_id (from 0) and --process_count.

The same command again goes on from the newest checkpoint. After Ctrl-C or SIGTERM the update is finished and saved.
"""

import re
import sys
from signal import SIGINT
from typing import NamedTuple

from absl import flags, logging
from ml_collections import ConfigDict, config_flags

from srpo_jax import config as config_lib
from srpo_jax import distributed, errors, train
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
    # The recipe has to be known before its overrides are read.
    argv = argv[:1] + sorted(argv[1:], key=lambda word: not re.match(r"--?config=", word))
    for word in argv[1:]:
        if override := re.match(r"--?config\.([\w.]+)", word):
            config_lib.check_key(override[1])
    values = flags.FlagValues()
    config = config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    workdir = flags.DEFINE_string("workdir", None, "", flag_values=values)
    job = [flags.DEFINE_string("coordinator", None, "", flag_values=values)]
    job += [flags.DEFINE_integer(name, None, "", flag_values=values) for name in ("process_id", "process_count")]
    try:
        rest = values(argv)
        if len(rest) > 1:
            raise UserError(f"{rest[1]!r} is not understood; flags are written --name=value")
        for flag in (config, workdir):
            if not flag.value:
                raise UserError(f"--{flag.name} is missing; see python -m srpo_jax.main --help")
        # A file that could not be read raises when its config is touched.
        return Command(config.value.copy_and_resolve_references(), workdir.value, *(flag.value for flag in job))
    except UserError:
        raise
    except Exception as error:  # a recipe is a program: it can fail in any way
        raise UserError(" ".join(f"{error}".split()) + f" ({type(error).__name__}); see --help") from error


def main() -> None:
    """Trains by the process's command line."""
    if {"--help", "-h"} & set(sys.argv[1:]):
        print(__doc__ + "\nKeys of a config and their defaults (srpo_jax/config.py says what they mean):\n")
        print("\n".join(f"  {key} = {value!r}" for key, value in config_lib.flatten(config_lib.default()).items()))
        return
    command = parse(sys.argv)
    config_lib.validate(command.config)  # before machines wait for each other
    distributed.start(command.coordinator, command.process_id, command.process_count)
    logging.set_verbosity(logging.ERROR)  # Orbax tells every step of every save
    try:
        signal = train.train(command.config, command.workdir)
    except KeyboardInterrupt:  # before the first update, or the second one: there is nothing to finish
        signal = SIGINT
    if signal is not None:
        sys.exit(128 + signal)


if __name__ == "__main__":
    sys.exit(errors.run(main))
