"""Command lines: every command reads its flags in one way, spells them in one way, and tells mistakes in one line."""

import importlib
import pathlib
import re

import pytest

from srpo_jax import command, errors, growth, values
from srpo_jax.config import default
from srpo_jax.errors import UserError

PACKAGE = pathlib.Path(command.__file__).parent
COMMANDS = sorted(
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    for path in PACKAGE.rglob("*.py")
    if "\nif __name__ ==" in path.read_text(encoding="utf-8")
)
RECIPE = "configs/emoji.py"


def run(name: str, *words: str) -> None:
    importlib.import_module(f"srpo_jax.{name}").main([*words])


def test_there_are_commands():
    assert {"main", "generate", "encode", "convert", "emoji.train_flow"} <= set(COMMANDS) and len(COMMANDS) >= 14


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_the_docstring_and_every_flag_with_its_meaning(name, capsys):
    with pytest.raises(SystemExit) as end:
        run(name, "--help")
    assert end.value.code == 0
    shown = capsys.readouterr().out
    docstring = importlib.import_module(f"srpo_jax.{name}").__doc__
    assert docstring.strip() in shown and f"python -m srpo_jax.{name}" in shown
    flags = re.findall(r"^  (--[^\s,]+)", shown, re.MULTILINE)
    assert all(re.fullmatch(r"--[a-z0-9]+(-[a-z0-9]+)*", flag) for flag in flags)
    # Once: the docstring has no list of its own.
    assert not re.search(r"^\s*--[a-z-]+  ", docstring, re.MULTILINE)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_flag_that_is_not_there_is_one_line_and_exit_code_1(name, capsys):
    assert errors.run(lambda: run(name, "--colour=red")) == 1
    told = capsys.readouterr().err
    assert told.startswith("error: unrecognized flag --colour") and told.count("\n") == 1
    assert f"python -m srpo_jax.{name} --help" in told


@pytest.mark.parametrize(
    ("name", "word", "meant"),
    [
        ("main", "--process_id=1", "--process-id"),
        ("encode", "--process_count=2", "--process-count"),
        ("main", "--wokdir=runs", "--workdir"),
        ("main", "-workdir=runs", "--workdir"),
        ("main", "--learning_rate=1", "--config.optim.learning_rate"),
        ("main", "--optim.learning_rate=1", "--config.optim.learning_rate"),
        ("generate", "--text_length=16", "--text-length"),
        ("convert", "--sourc=x", None),  # of a subcommand, which is not named
        ("emoji.train_flow", "--distil_steps=3", "--distil-steps"),
        ("emoji.train_autoencoder", "--learning_rate=1", "--learning-rate"),
        ("benchmark", "--device_batch=3", "--device-batch"),
        ("generate", "--zebra=1", None),
    ],
)
def test_the_flag_that_is_meant_is_named(name, word, meant):
    with pytest.raises(UserError) as error:
        run(name, word)
    told = f"unrecognized flag {word.split('=')[0]}"
    assert str(error.value).startswith(f"{told}; do you mean {meant}?" if meant else f"{told}; see ")


def test_flags_of_subcommands_are_meant_too():
    with pytest.raises(UserError, match=r"unrecognized flag --max_shard_size; do you mean --max-shard-size\?"):
        run("convert", "export", "--source=a", "--target=b", "--format=bfl", "--max_shard_size=1GB")


@pytest.mark.parametrize(
    ("name", "words", "told"),
    [
        ("main", [], "--workdir, --config is missing"),
        (
            "main",
            ["--workdir=w", f"--config={RECIPE}", "now"],
            "'now' is not understood; flags are written --name",
        ),
        ("main", ["--workdir=w", f"--config={RECIPE}", "--config.steps", "3"], "write --config.steps=VALUE"),
        ("main", ["--workdir=w", f"--config={RECIPE}", "--config.optim=3"], "is a group of keys; give one of them, as"),
        ("generate", ["--model=m", "--out=o"], "one of the arguments --prompts --prompt is required"),
        ("generate", ["--dtype=float16"], "invalid choice: 'float16'"),
        ("convert", [], "command is missing"),
        ("preflight", [f"--config={RECIPE}", "--topology="], "--topology=: give one or more words"),
    ],
)
def test_what_is_wrong_with_a_command_line(name, words, told, monkeypatch):
    monkeypatch.setattr("srpo_jax.costs.topologies.prepare", lambda: None)
    with pytest.raises(UserError) as error:
        run(name, *words)
    assert told in str(error.value) and "\n" not in str(error.value)


TOO_LARGE = str(2**64)  # whose last 64 bits are 0
WHOLE, POSITIVE, FINITE = "must be a whole number", "must be greater than 0", "must be a finite number"


@pytest.mark.parametrize(
    ("name", "flag", "told"),
    [
        ("generate", "--steps=0", "must be at least 1"),
        ("generate", "--steps=2.5", WHOLE),
        ("generate", "--batch=-1", "must be at least 1"),
        ("generate", "--text-length=0", "must be at least 1"),
        ("generate", "--step=0", "must be at least 1"),
        ("generate", "--height=0", "must be at least 1"),
        ("generate", "--width=-16", "must be at least 1"),
        ("generate", "--seed=-1", "must be from 0 to 18446744073709551615"),
        ("generate", f"--seed={TOO_LARGE}", "must be from 0 to 18446744073709551615"),
        ("generate", "--guidance=nan", FINITE),
        ("generate", "--guidance=-inf", FINITE),
        ("generate", "--guidance=1e39", FINITE),
        ("generate", "--guidance=strong", FINITE),
        ("generate", "--data=0", "must be at least 1, or -1 for the rest"),
        ("encode", "--shard-size=0", "must be at least 1"),
        ("encode", "--text-length=1", "must be at least 2"),
        ("encode", "--min-length=-1", "must be at least 0"),
        ("encode", "--max-length=-1", "must be at least 0"),
        ("encode", "--sample=-1", "must be at least 0"),
        ("encode", f"--seed={TOO_LARGE}", "must be from 0"),
        ("encode", "--fsdp=-2", "must be at least 1, or -1 for the rest"),
        ("encode", "--process-id=-1", "must be at least 0"),
        ("main", "--process-count=0", "must be at least 1"),
        ("inspect_data", "--show=-1", "must be at least 0"),
        ("inspect_data", "--seed=-1", "must be from 0"),
        ("preflight", "--device-batch=0", "must be at least 1"),
        ("benchmark", "--runs=0", "must be at least 1"),
        ("sweep", "--minutes=0", POSITIVE),
        ("sweep", "--minutes=nan", FINITE),
        ("emoji.demo", "--updates=0", "must be at least 1"),
        ("emoji.demo", "--seeds=65", "must be from 1 to 64"),
        ("emoji.rollouts", "--updates=-1", "must be at least 1"),
        ("emoji.train_clip", "--steps=0", "must be at least 1"),
        ("emoji.train_flow", "--learning-rate=inf", FINITE),
        ("emoji.train_flow", "--minutes=-1", "must not be negative"),
        ("emoji.train_flow", f"--seed={TOO_LARGE}", "must be from 0"),
        ("emoji.train_autoencoder", "--every=0", "must be at least 1"),
        ("emoji.train_autoencoder", "--learning-rate=0", POSITIVE),
    ],
)
def test_numbers_are_checked(name, flag, told, monkeypatch):
    monkeypatch.setattr("srpo_jax.costs.topologies.prepare", lambda: None)
    with pytest.raises(UserError) as error:
        run(name, flag)
    assert str(error.value).startswith(f"{flag}: {told}")


def test_seeds_as_far_as_they_differ():
    assert command.seed("0") == 0 and command.seed(str(values.SEED)) == values.SEED == 2**64 - 1


# --- paths ------------------------------------------------------------------------------------------------------------


def test_the_home_folder_in_flags(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    home = str(tmp_path)
    assert command.path("~/runs/a") == f"{home}/runs/a" and command.path("~") == home
    assert command.path("tfds:~/data:train") == f"tfds:{home}/data:train"
    assert command.path("gs://bucket/~x") == "gs://bucket/~x" and command.path("a/~/b") == "a/~/b"
    assert command.local("~/x.json") == tmp_path / "x.json"
    with pytest.raises(UserError, match=re.escape(f"--reports={home}/none*.json: there is no such file")):
        growth.main(["--reports=~/none*.json", "--out=x.svg"])


def test_the_home_folder_in_a_recipe_and_its_keys(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    lines = "from srpo_jax.config import default\ndef get_config():\n    c = default()\n    c.model.path = '~/flux'\n"
    (tmp_path / "recipe.py").write_text(lines + "    return c\n")
    words = ["--config=~/recipe.py", "--config.data.prompts=~/p.txt", "--config.reward.models.hps.path=~/hps"]
    config, _ = command.parse_recipe(command.parser("test", ""), words)
    found = config.model.path, config.data.prompts, config.reward.models.hps.path
    assert found == tuple(f"{tmp_path}/{name}" for name in ("flux", "p.txt", "hps"))


@pytest.mark.parametrize("name", COMMANDS)
def test_every_path_of_a_command_is_expanded(name, capsys, monkeypatch):
    """Flags whose names are those of files and folders have a type that expands."""
    paths = {"model", "prompts", "images", "out", "checkpoint", "latents", "workdir", "json", "trace", "sheet", "data"}
    paths |= {"source", "target", "config", "tokenizer", "reports", "vae", "path"}
    seen = []
    add = command.Parser.add_argument

    def noted(self, *names, **options):
        if names and names[0].lstrip("-") in paths and options.get("type") is not command._axis:
            seen.append((names[0], options.get("type")))
        return add(self, *names, **options)

    monkeypatch.setattr(command.Parser, "add_argument", noted)
    with pytest.raises(SystemExit):
        run(name, "--help")
    if name == "evaluate":  # whose folders have labels before them, and whose --images is a number
        labelled = {"--model", "--checkpoint", "--images"}
        assert labelled < {flag for flag, _ in seen}
        seen = [item for item in seen if item[0] not in labelled]
    assert seen and all(kind in (command.path, command.local) for _, kind in seen), seen


# --- recipes ----------------------------------------------------------------------------------------------------------


def test_a_recipe_takes_an_argument(tmp_path):
    lines = "from srpo_jax.config import default\ndef get_config(steps='1'):\n    c = default()\n"
    (tmp_path / "recipe.py").write_text(lines + "    c.steps = int(steps)\n    return c\n")
    for spec, steps in (("recipe.py", 1), ("recipe.py:7", 7)):
        assert command.parse_recipe(command.parser("test", ""), [f"--config={tmp_path}/{spec}"])[0].steps == steps


def test_a_default_takes_the_place_of_a_recipe():
    parser = command.parser("test", "")
    parser.add_argument("--steps", type=command.at_least(1))

    def made(flags):
        config = default()
        config.steps = flags.steps
        return config

    config, flags = command.parse_recipe(parser, ["--config.seed=5", "--steps=3"], made)
    assert (config.steps, config.seed, flags.config) == (3, 5, None)
    with pytest.raises(AttributeError):
        config.optim.lr = 1.0  # locked


def test_a_recipe_that_makes_something_else(tmp_path):
    (tmp_path / "recipe.py").write_text("def get_config():\n    return {}\n")
    with pytest.raises(UserError, match="must return a ConfigDict, not dict"):
        command.parse_recipe(command.parser("test", ""), [f"--config={tmp_path / 'recipe.py'}"])
