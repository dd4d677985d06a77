"""The package's outside: what it imports is what it asks for, and what it ships is there."""

import ast
import importlib.metadata
import pathlib
import re
import sys

import pytest

import srpo_jax

ROOT = pathlib.Path(srpo_jax.__file__).parent
# Only the import of torch pickles needs torch, only config.wandb needs wandb; both say so when it is not there.
OPTIONAL = {"torch", "wandb"}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def imported() -> set[str]:
    names = set()
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names.add(node.module.split(".")[0])
    return names - set(sys.stdlib_module_names) - {"srpo_jax"}


def test_every_import_is_a_declared_dependency():
    setup = ast.parse((ROOT.parent / "setup.py").read_text(encoding="utf-8"))
    call = next(node for node in ast.walk(setup) if isinstance(node, ast.keyword) and node.arg == "install_requires")
    declared = {normal(re.match(r"[\w.-]+", requirement)[0]) for requirement in ast.literal_eval(call.value)}
    distributions = importlib.metadata.packages_distributions()
    missing = {
        name
        for name in imported() - OPTIONAL
        if not {normal(distribution) for distribution in distributions.get(name, [name])} & declared
    }
    assert not missing


@pytest.mark.parametrize("name", ["MIT.txt", "Unicode-3.0.txt"])
def test_licences_travel_with_the_pictures(name):
    folder = ROOT / "emoji" / "data"
    assert (folder / "LICENSES" / name).stat().st_size > 500
    assert "Microsoft Corporation, MIT" in (folder / "README.md").read_text(encoding="utf-8")


def test_no_test_imports_another():
    """What they share lies in helpers."""
    found = []
    for path in (ROOT.parent / "tests").rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            found += [f"{path.name}: {name}" for name in names if name.startswith("test_")]
    assert not found
