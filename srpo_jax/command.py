"""Command lines, read in one way by every command: flags are whole words with hyphens, ``--text-length=16``.

A command with a recipe also takes ``--config=FILE`` and ``--config.KEY=VALUE`` for the recipe's keys. The functions of
a text are types of flags, for ``add_argument``; what is wrong with a value is told as ``--steps=0: must be ...``.
"""

import argparse
import difflib
import importlib.util
import pathlib
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from ml_collections import ConfigDict

from srpo_jax import config as config_lib
from srpo_jax import values
from srpo_jax.errors import UserError

MESH = (("data", 1), ("fsdp", -1), ("tensor", 1))  # axes and their sizes unless told otherwise, see sharding
REQUIRED = "the following arguments are required: "  # as argparse begins
OVERRIDE = re.compile(r"--config\.([\w.]+)(?:=(.*))?", re.DOTALL)


class Parser(argparse.ArgumentParser):
    """argparse's parser, whose complaints are ``UserError``: one line, exit code 1."""

    keys: Sequence[str] = ()  # flags that it does not read itself, to suggest beside its own

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> tuple:
        """Parses. Nothing is left over, of a subcommand's words too, which argparse would leave to the parser above."""
        self._words = sys.argv[1:] if args is None else list(args)
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(self._unrecognized() or f"{unknown[0]!r} is not understood; flags are written --name=value")
        return found, unknown

    def error(self, message: str) -> NoReturn:
        """Raises UserError."""
        if wrong := re.fullmatch(r"argument (\S+): (=.*)", message, re.DOTALL):  # by ``typed``
            message = wrong[1] + wrong[2]
        elif message.endswith(" is required") or message.startswith(REQUIRED):  # it may be there, misspelt
            absent = f"{message.removeprefix(REQUIRED)} is missing" if message.startswith(REQUIRED) else message
            message = self._unrecognized() or absent
        raise UserError(f"{' '.join(message.split())}; see {self.prog} --help")

    def _unrecognized(self) -> str | None:
        """What to say of the first flag that this parser does not have; None if there is no such flag."""
        known = [*(flag for flag in self._option_string_actions if flag.startswith("--")), *self.keys]
        for word in self._words:
            name = word.split("=")[0]
            if re.fullmatch(r"--?[A-Za-z]\S*", name) and name not in self._option_string_actions:
                near = difflib.get_close_matches("--" + name.lstrip("-").replace("_", "-"), known, n=1, cutoff=0.75)
                near = near or [flag for flag in known if flag.endswith("." + name.lstrip("-"))]
                return f"unrecognized flag {name}" + (f"; do you mean {near[0]}?" if near else "")
        return None


def parser(module: str, description: str | None) -> Parser:
    """The parser of ``python -m srpo_jax.MODULE``; ``description`` is the module's docstring, shown as it is."""
    return Parser(
        prog=f"python -m srpo_jax.{module}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


# --- flags that several commands have ---------------------------------------------------------------------------------


def add_drawing(parser: argparse.ArgumentParser) -> None:
    """How pictures are drawn, for ``sampling.Look`` and ``sampling.computes``."""
    add, words = parser.add_argument, "pixels, a multiple of 16 (default: 1024)"
    add("--height", type=at_least(1), default=1024, help=words)
    add("--width", type=at_least(1), default=1024, help=words)
    add("--steps", type=at_least(1), default=50, help="of the sampler (default: 50)")
    add("--guidance", type=number, default=3.5, help="guidance scale (default: 3.5)")
    add("--seed", type=seed, default=0, help="of the initial noise (default: 0)")
    add("--text-length", type=at_least(1), help="tokens of a prompt (default: the tokenizer's, at most 512)")
    add("--batch", type=at_least(1), help="images at a time (default: one a device)")
    add("--dtype", choices=config_lib.DTYPES, help="of drawing (default: float32 on CPU, bfloat16 on accelerators)")
    words = "of the transformer: auto is splash on TPUs, cudnn on NVIDIA GPUs in bfloat16, else xla (default: auto)"
    add("--attention", choices=config_lib.ATTENTION, default="auto", help=words)


def add_mesh(parser: argparse.ArgumentParser) -> None:
    """The flags of a mesh, for ``sharding.make_mesh``, of commands without a recipe."""
    for axis, default in MESH:
        words = f"devices along this axis of the mesh; -1 is the rest (default: {default})"
        parser.add_argument(f"--{axis}", type=_axis, default=default, metavar="N", help=words)


def add_job(parser: argparse.ArgumentParser) -> None:
    """The place of this process in a job of several, for ``distributed.job``. TPUs and SLURM say it by themselves."""
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="of process 0, in a job of several processes")
    parser.add_argument("--process-id", type=at_least(0), metavar="N", help="of this process, from 0")
    parser.add_argument("--process-count", type=at_least(1), metavar="N", help="of the job")


# --- types of flags ---------------------------------------------------------------------------------------------------


def typed(kind: type, good: Callable[[Any], bool] = lambda value: True, remedy: str = "") -> Callable[[str], Any]:
    """A type for ``add_argument``: values of a kind of ``values.NAMES`` that are ``good``, or else the ``remedy``."""

    def read(text: str) -> Any:
        try:
            value = values.read(text, kind)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"={text}: {error}") from None
        if not good(value):
            raise argparse.ArgumentTypeError(f"={text}: {remedy}")
        return value

    return read


def between(least: int, most: int) -> Callable[[str], int]:
    """Whole numbers from ``least`` to ``most``."""
    return typed(int, lambda value: least <= value <= most, f"must be from {least} to {most}")


def at_least(least: int) -> Callable[[str], int]:
    """Whole numbers from ``least`` on."""
    return typed(int, lambda value: value >= least, f"must be at least {least}")


number = typed(float)
positive = typed(float, lambda value: value > 0, "must be greater than 0")
not_negative = typed(float, lambda value: value >= 0, "must not be negative")
seed = between(0, values.SEED)
_axis = typed(int, lambda value: value >= 1 or value == -1, "must be at least 1, or -1 for the rest of the devices")


def update(text: str) -> int | str:
    """The number of an update, from 1, or "best"."""
    return text if text == "best" else at_least(1)(text)


def words(text: str) -> list[str]:
    """One or more words with commas between them."""
    found = [word.strip() for word in text.split(",") if word.strip()]
    if not found:
        raise argparse.ArgumentTypeError(f"={text}: give one or more words, with commas between them")
    return found


def path(text: str) -> str:
    """A file, folder, pattern, bucket or data set; ``~`` is the home folder."""
    return values.expand(text)


def local(text: str) -> pathlib.Path:
    """A file or folder of this machine; ``~`` is the home folder."""
    return pathlib.Path(values.expand(text))


# --- recipes ----------------------------------------------------------------------------------------------------------


def read_recipe(spec: str) -> ConfigDict:
    """The config that a recipe makes: ``FILE``, or ``FILE:ARGUMENT`` for its ``get_config``.

    Raises UserError if the file is missing, fails or makes something else.
    """
    file, *argument = spec.split(":", 1)
    if not pathlib.Path(file).is_file():
        raise UserError(f"--config={file}: there is no such file; give a recipe, as configs/flux_dev_hps.py")
    try:
        found = importlib.util.spec_from_file_location("_recipe", file)
        sys.modules["_recipe"] = module = importlib.util.module_from_spec(found)
        found.loader.exec_module(module)
        config = module.get_config(*argument)
    except Exception as error:  # a recipe is a program: it can fail in any way
        raise UserError(f"--config={file}: {' '.join(str(error).split())} ({type(error).__name__})") from error
    if not isinstance(config, ConfigDict):
        raise UserError(f"--config={file}: get_config() must return a ConfigDict, not {type(config).__name__}")
    return config.lock()


def parse_recipe(
    parser: Parser,
    arguments: Sequence[str] | None,
    default: Callable[[argparse.Namespace], ConfigDict] | None = None,
) -> tuple[ConfigDict, argparse.Namespace]:
    """Reads a command line with a recipe.

    Args:
      parser: of the command's own flags; ``--config`` is added.
      arguments: the words after the program's name; None takes the process's.
      default: makes the config that ``--config.KEY=VALUE`` changes where there is no ``--config``, from the other
        flags; None demands ``--config``.

    Returns:
      The config, references resolved and ``~`` in paths expanded, and the flags; ``config`` among them is the recipe,
      and ``recipe`` what it says by itself (``config.flatten``).

    Raises UserError for what is wrong with the command line, an unknown key among it.
    """
    shown = "recipe, a Python file; --config.KEY=VALUE changes one of its keys (lists: a,b)"
    parser.add_argument("--config", type=path, required=default is None, metavar="FILE", help=shown)
    parser.keys = [f"--config.{key}" for key in config_lib.flatten(config_lib.default())]
    own, changes = [], []
    for word in sys.argv[1:] if arguments is None else arguments:
        if found := OVERRIDE.fullmatch(word):
            config_lib.check_key(found[1])
            if found[2] is None:
                raise UserError(f"{word} has no value; write {word}=VALUE")
            changes.append(found.groups())
        else:
            own.append(word)
    found = parser.parse_args(own)
    config = default(found) if found.config is None else read_recipe(found.config)
    plain = config.copy_and_resolve_references()
    config_lib.expand_paths(plain)
    found.recipe = config_lib.flatten(plain)
    for key, text in changes:
        config_lib.set_text(config, key, text)
    config = config.copy_and_resolve_references()
    config_lib.expand_paths(config)
    return config, found
