"""A recipe of a micro model in a file, for commands as a user gives them."""

import pathlib

from helpers import tiny

TEXT = """import pathlib
from helpers import tiny


def get_config():
    return tiny.config(pathlib.Path({models!r}), **{changes!r})
"""


def write(out: pathlib.Path, **changes: object) -> pathlib.Path:
    """Writes models and a recipe on them into a folder; returns the recipe's file."""
    models = tiny.write_all(out / "models")
    (out / "recipe.py").write_text(TEXT.format(models=str(models), changes=changes))
    return out / "recipe.py"
