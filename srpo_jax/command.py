"""Command lines with a recipe: ``--config=FILE``, ``--config.KEY=VALUE`` for its keys, and a program's own flags."""

import re
from collections.abc import Callable
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from srpo_jax import config as config_lib
from srpo_jax.errors import UserError


def parse(
    argv: list[str],
    program: str,
    define: Callable[[flags.FlagValues], None],
    default: Callable[[dict[str, Any]], ConfigDict] | None = None,
) -> tuple[ConfigDict, dict[str, Any]]:
    """Reads a command line.

    Args:
      argv: its words; ``argv[0]`` is the program's file.
      program: what a user runs, as ``python -m srpo_jax.main``, for messages.
      define: defines the program's own flags in the values that it is given.
      default: makes the config that ``--config.KEY=VALUE`` changes where there is no ``--config``, from the values of
        the other flags; None demands ``--config``.

    Returns:
      The config, references resolved, and the values of the other flags by name.

    Raises UserError for what is wrong with the command line, an unknown key among it.
    """
    for word in argv[1:]:
        if override := re.match(r"--?config\.([\w.]+)", word):
            config_lib.check_key(override[1])
    own, values = flags.FlagValues(), flags.FlagValues()
    define(own)
    try:
        words = own(argv, known_only=True)
        found = {name: own[name].value for name in own}
        # The recipe has to be known before its overrides are read.
        words = words[:1] + sorted(words[1:], key=lambda word: not re.match(r"--?config=", word))
        if default is None or any(re.match(r"--?config=", word) for word in words[1:2]):
            config = config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=words)
        else:
            config = config_flags.DEFINE_config_dict("config", default(found), flag_values=values, sys_argv=words)
        rest = values(words)
        if len(rest) > 1:
            raise UserError(f"{rest[1]!r} is not understood; flags are written --name=value")
        if not config.value:
            raise UserError(f"--config is missing; see {program} --help")
        # A file that could not be read raises when its config is touched.
        return config.value.copy_and_resolve_references(), found
    except UserError:
        raise
    except Exception as error:  # a recipe is a program: it can fail in any way
        raise UserError(" ".join(f"{error}".split()) + f" ({type(error).__name__}); see {program} --help") from error
