"""Every row of the catalogue of bad inputs gives one line and its exit code, soon, and leaves nothing behind."""

import importlib
import json
import os
import pathlib
import re
import time

import pytest
from helpers import tiny
from helpers.catalogue import CATALOGUE, Changed

from srpo_jax import convert, errors

SECONDS = 60  # for a row on a loaded machine; a hang takes longer


@pytest.fixture(scope="module")
def recipe_file(models, tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "recipe.py"
    path.write_text(
        "import pathlib\nfrom helpers import tiny\n\n"
        f"def get_config():\n    return tiny.config(pathlib.Path({str(models)!r}))\n"
    )
    return path


@pytest.fixture(scope="module")
def diffusers(model, tmp_path_factory):
    """The pipeline as diffusers has it; its library is not needed for that."""
    path = tmp_path_factory.mktemp("diffusers") / "pipeline"
    convert.main(["export", f"--source={model}", f"--target={path}", "--format=diffusers"])
    return path


def linked(source, target):
    """A copy of a folder whose files are links, so that a row can put others in their place."""
    for path in source.rglob("*"):
        place = target / path.relative_to(source)
        if path.is_dir():
            place.mkdir(parents=True, exist_ok=True)
        else:
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(path)


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, Changed):
        whole = json.loads(path.read_text())
        for key, value in content.values.items():
            *groups, name = key.split(".")
            inner = whole
            for group in groups:
                inner = inner[group]
            inner[name] = value
        content = json.dumps(whole)
    if path.is_symlink():
        path.unlink()
    if callable(content):
        content(path)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content)


def test_the_catalogue_is_large_and_has_no_row_twice():
    names = [row.name for row in CATALOGUE]
    assert len(names) == len(set(names)) >= 100


@pytest.mark.parametrize("row", CATALOGUE, ids=lambda row: re.sub(r"\W+", "-", row.name)[:60])
def test_bad_input(row, tmp_path, model, models, recipe_file, request, capsys):
    places = {"here": tmp_path, "pipeline": model, "recipe": recipe_file, "reward": models / "clip"}
    if "{diffusers}" in row.words:
        places["diffusers"] = request.getfixturevalue("diffusers")
    for name in ("pipeline", "diffusers"):
        if any(file.startswith(f"{name}/") for file in row.files):
            linked(pathlib.Path(places[name]), tmp_path / name)
            places[name] = tmp_path / name
    for file, content in row.files.items():
        put(tmp_path / file, content)
    command, *words = [word.format(**places) for word in row.words.split(" ")]
    main = importlib.import_module(f"srpo_jax.{command}").main
    before = sorted(tmp_path.rglob("*"))
    started = time.monotonic()
    code = errors.run(lambda: main(words))
    assert time.monotonic() - started < SECONDS
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith("error: ") and code == row.code
    assert re.search(row.says, last.removeprefix("error: ")), last
    assert sorted(tmp_path.rglob("*")) == before  # nothing half-written


def test_the_helpers_of_rows_make_what_is_good(models, tmp_path, capsys):
    """The rows' words are refused for what they say: without it they pass."""
    (tmp_path / "a.txt").write_text("red apple\n")
    words = f"--model={models / 'pipeline'} --prompts={tmp_path / 'a.txt'} --out={tmp_path / 'out'}"
    encode = importlib.import_module("srpo_jax.encode")
    assert (
        errors.run(lambda: encode.main([*words.split(), f"--text-length={tiny.LENGTH}", "--include=^(\\w+\\s?)+$"]))
        == 0
    )
    assert os.listdir(tmp_path / "out")
