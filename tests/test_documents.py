"""What the README, docs/ and launch/ print: links lead somewhere, keys exist, commands are read by their parsers."""

import importlib.util
import pathlib
import re
import shlex
import subprocess

import pytest

from srpo_jax import benchmark, command, convert, encode, generate, main, validation
from srpo_jax import config as config_lib

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "launch" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RECIPES = sorted((ROOT / "configs").glob("*.py"))
MODULE = "python -m srpo_jax."
PARSERS = {"generate": generate._parser, "encode": encode._parser, "convert": convert._parser}


def commands(page):
    """The commands of a page's shell blocks, each on one line and without its comment."""
    for block in re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            if line.strip():
                yield line


def ours():
    """(page, module, words) of every command of this package in a page or a recipe's docstring."""
    for page in PAGES:
        for line in commands(page):
            if MODULE in line:
                module, *words = shlex.split(line[line.index(MODULE) + len(MODULE) :], comments=True)
                yield pytest.param(module, words, id=f"{page.name}-{module}")
    for recipe in RECIPES:
        text = recipe.read_text(encoding="utf-8").replace("\\\n", " ")
        for line in [line.strip() for line in text.splitlines() if line.strip().startswith(MODULE)]:
            module, *words = shlex.split(line[len(MODULE) :], comments=True)
            yield pytest.param(module, words, id=f"{recipe.name}-{module}")


def check_run(words):
    """That a run would not ask for another key."""
    task = main.parse(words)
    validation.validate(task.config)
    return task


@pytest.fixture(autouse=True)
def here(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = re.sub(r"`[^`\n]*`", "", page.read_text(encoding="utf-8"))  # without what is code
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    assert links or page.name == "rollouts.md"
    for link in links:
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        if anchor:
            titles = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles], link


@pytest.mark.parametrize("page", [*PAGES, *RECIPES], ids=lambda page: page.name)
def test_keys_are_todays(page):
    text = page.read_text(encoding="utf-8")
    for key in set(re.findall(r"config\.([a-z_]+(?:\.\w+)*\w)", text)) - {"py"}:
        if key.split(".")[0] not in ("json", "default", "reward"):
            config_lib.check_key(key)
    groups = "|".join(name for name, _ in config_lib.default().items() if not isinstance(_, int | float | str))
    for key in re.findall(rf"`(?:--config\.)?((?:{groups})\.\w+(?:\.\w+)*)(?:=[^`]*)?`", text):
        if key.islower():  # others are constants of modules
            config_lib.check_key(key)


@pytest.mark.parametrize(("module", "words"), list(ours()))
def test_commands_are_read_by_their_parsers(module, words):
    if module == "main":
        if "..." not in words:
            check_run(words)
    elif module == "preflight":
        for word in words:
            if found := command.OVERRIDE.fullmatch(word):
                config_lib.check_key(found[1])
    elif module in PARSERS:
        PARSERS[module]().parse_args([word.replace("FORMAT", "diffusers") for word in words])
    elif module == "benchmark":
        assert benchmark.parse(words)
    else:
        assert importlib.util.find_spec(f"srpo_jax.{module}")


@pytest.mark.parametrize("script", ["local", "slurm"])
def test_launched_runs_ask_for_no_other_path(script):
    lines = [line for line in commands(PAGES[1]) if line.startswith(f"launch/{script}.sh") and " -- " in line]
    assert lines
    for line in lines:
        check_run(shlex.split(line.split(" -- ", 1)[1], comments=True) + words_before(line))
        dry = line.replace(" -- ", " --dry-run -- ", 1)
        said = subprocess.run(["bash", "-c", dry], capture_output=True, text=True)
        assert said.returncode == 0 and "--config.sample.prompts=held_out.txt" in said.stdout, said.stderr


def words_before(line):
    before = shlex.split(line.split(" -- ", 1)[0])
    return [word for word in before if word.startswith(("--config=", "--workdir="))]


def test_runs_on_slices_and_clusters_ask_for_no_other_path():
    """Their scripts need gcloud and XPK: here the keys alone."""
    text = (ROOT / "launch" / "README.md").read_text(encoding="utf-8")
    keys = re.search(r"keys=\((.*?)\)", text, re.DOTALL)[1].split()
    check_run([*keys, "--config=configs/flux_dev_hps.py", "--workdir=gs://BUCKET/runs/hps"])
    (line,) = [line for line in commands(PAGES[1]) if line.startswith("launch/gke_xpk.sh create")]
    check_run(shlex.split(line.split(" -- ", 1)[1]) + words_before(line))


@pytest.mark.parametrize("script", sorted((ROOT / "launch").glob("*.sh")), ids=lambda script: script.name)
def test_what_scripts_show_asks_for_no_other_path(script):
    text = script.read_text(encoding="utf-8").replace("\\\n", " ")
    for line in [line.strip() for line in text.splitlines() if " -- --config." in " ".join(line.split())]:
        if line.startswith("launch/"):
            check_run([*shlex.split(line.split(" -- ", 1)[1]), *words_before(line)])
