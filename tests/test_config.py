"""The configuration: recipes, checks, and what a command line says to them."""

import pathlib
import runpy
import sys

import pytest

from srpo_jax import config as config_lib
from srpo_jax import main
from srpo_jax.errors import UserError

# How ml_collections imports a recipe.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")


def complete():
    config = config_lib.default()
    config.model.path, config.data.prompts, config.sample.prompts = "model", "prompts.txt", "held_out.txt"
    config.reward.paths.hps = "hps"
    return config


def test_the_default_lacks_only_paths():
    with pytest.raises(UserError, match=r"config\.model\.path=None: give a path"):
        config_lib.validate(config_lib.default())
    config_lib.validate(config_lib.default(), paths=False)
    config_lib.validate(complete())


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("method", "dpo", r"config\.method='dpo': choose one of srpo, direct_align, refl, draft_lv"),
        ("data.height", 100, r"config\.data\.height=100: must be a positive multiple of 16"),
        ("data.width", 0, r"config\.data\.width=0: must be a positive multiple of 16"),
        ("steps", 0, r"config\.steps=0: must be at least 1"),
        ("reward.positive", (), r"config\.reward\.positive=\[\]: must be a list of one or more control words"),
        ("reward.negative", ("Flat", " "), r"config\.reward\.negative=.*none of them empty"),
        ("reward.weights.hps", 0.0, r"config\.reward\.weights: all are 0"),
        ("reward.weights.clip", -1.0, r"config\.reward\.weights\.clip=-1\.0: must not be negative"),
        ("reward.weights.clip", 1.0, r"config\.reward\.paths\.clip=None: give a path: --config\.reward\.paths\.clip"),
        ("reward.form", "other", r"config\.reward\.form='other'"),
        ("align.branches", (), r"config\.align\.branches=\[\]: name one or both of denoise, inversion"),
        ("align.branches", ("denoise", "denoise"), r"config\.align\.branches"),
        ("align.train_timestep", (25, 5), r"config\.align\.train_timestep=\[25, 5\]: must be \(first, last\)"),
        ("align.train_timestep", (5, 51), r"config\.align\.train_timestep"),
        ("align.groundtruth_ratio", 1.0, r"config\.align\.groundtruth_ratio=1\.0"),
        ("align.length", 9, r"config\.align\.length=9"),
        ("align.discount_positive", (0.1,), r"config\.align\.discount_positive"),
        ("rollout.reuse", 0, r"config\.rollout\.reuse=0: must be at least 1"),
        ("rollout.cache", 0, r"config\.rollout\.cache=0: must be at least 1"),
        ("rollout.cache_ends", (1,), r"config\.rollout\.cache_ends=\[1\]: must be two whole numbers"),
        ("rollout.cache_ends", (1, -1), r"config\.rollout\.cache_ends=\[1, -1\]"),
        ("draft_lv.renoisings", 0, r"config\.draft_lv\.renoisings=0"),
        ("optim.learning_rate", 0.0, r"config\.optim\.learning_rate=0\.0: must be greater than 0"),
        ("optim.b2", 1.0, r"config\.optim\.b2=1\.0"),
        ("optim.ema_decay", 1.0, r"config\.optim\.ema_decay=1\.0"),
        ("optim.accumulation", 5, r"config\.optim\.accumulation=5: must divide data\.batch_size=32"),
        ("model.dtype", "float16", r"config\.model\.dtype='float16': choose one of bfloat16, float32"),
        ("model.attention", "flash", r"config\.model\.attention='flash'"),
        ("remat.transformer", "some", r"config\.remat\.transformer='some'"),
        ("sample.prompts", None, r"config\.sample\.prompts=None: give a file of held-out prompts"),
        ("mesh.tensor", 0, r"config\.mesh\.tensor=0"),
        ("mesh.data", -1, r"config\.mesh: only one of"),
    ],
)
def test_bad_values_are_named(key, value, message):
    config = complete()
    config.update_from_flattened_dict({key: value})
    with pytest.raises(UserError, match=message) as error:
        config_lib.validate(config)
    assert "\n" not in str(error.value)


def test_late_steps_bind_the_method_that_takes_them():
    config = complete()
    config.refl.late_steps = 26
    config_lib.validate(config)
    config.method = "refl"
    with pytest.raises(UserError, match=r"config\.refl\.late_steps=26: must not exceed rollout\.steps=25"):
        config_lib.validate(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.rollout": "real"}, r"config\.data\.rollout='real': choose one of online, offline"),
        ({"method": "refl"}, r"config\.method='refl': takes states of a rollout, data\.rollout=offline has none"),
        ({"data.encode": "online"}, r"config\.data\.encode='online': data\.rollout=offline needs encoded pictures"),
        (
            {"rollout.noise": "shared"},
            r"config\.rollout\.noise='shared': .* draws noise for each picture; set it to per",
        ),
        ({"rollout.reuse": 2}, r"config\.rollout\.reuse=2: .* has no rollout to use again; set it to 1"),
        ({"rollout.dtype": "int8"}, r"config\.rollout\.dtype='int8': .* no rollout to make faster; set it to model"),
        ({"rollout.solver": "ab2"}, r"config\.rollout\.solver='ab2': .* no rollout to make faster; set it to euler"),
        ({"rollout.cache": 2}, r"config\.rollout\.cache=2: .* no rollout to make faster; set it to 1"),
    ],
)
def test_what_pictures_in_the_place_of_rollouts_exclude(changes, message):
    config = complete()
    config.data.rollout, config.data.encode, config.data.path = "offline", "stored", "data"
    config.rollout.noise = "per_sample"
    config_lib.validate(config)
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=message):
        config_lib.validate(config)


def test_refl_cannot_use_a_rollout_again():
    config = complete()
    config.method, config.rollout.reuse = "refl", 2
    with pytest.raises(UserError, match=r"config\.rollout\.reuse=2: method=refl needs a rollout at every update"):
        config_lib.validate(config)


def test_unknown_and_missing_keys():
    config = complete()
    with config.unlocked():
        config.optim.learning_rat = 1.0
    with pytest.raises(UserError, match=r"optim\.learning_rat is unknown; do you mean config\.optim\.learning_rate"):
        config_lib.validate(config)
    with config.unlocked():
        del config.optim.learning_rat, config.optim.b1
    with pytest.raises(UserError, match=r"config\.optim\.b1 is missing"):
        config_lib.validate(config)
    with pytest.raises(AttributeError, match="lr"):
        complete().optim.lr = 1.0


def test_what_may_change_between_a_run_and_its_continuation():
    first, second = complete(), complete()
    second.steps, second.mesh.fsdp, second.checkpoint.keep, second.remat.reward = 40, 8, 1, "none"
    assert config_lib.differing_keys(config_lib.flatten(second), config_lib.flatten(first)) == []
    second.optim.b1, second.reward.positive = 0.8, ("Real",)
    differing = config_lib.differing_keys(config_lib.flatten(second), config_lib.flatten(first))
    assert differing == ["optim.b1", "reward.positive"]


# --- the recipes ------------------------------------------------------------------------------------------------------

RECIPES = pathlib.Path(__file__).parents[1] / "configs"


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.py")), ids=lambda path: path.stem)
def test_recipes_lack_nothing_but_paths(path):
    c = runpy.run_path(str(path))["get_config"]()
    for name, weight in c.reward.weights.items():
        c.reward.paths[name] = c.reward.paths[name] or ("reward" if weight else None)
    data = "prompts" if c.data.encode == "online" else "path"
    for group, key in (("model", "path"), ("data", data), ("sample", "prompts")):
        c[group][key] = c[group][key] or "somewhere"
    config_lib.validate(c)


def test_what_tells_the_released_recipes_apart():
    hps, pickscore = (
        config_lib.flatten(runpy.run_path(str(RECIPES / f"flux_dev_{name}.py"))["get_config"]())
        for name in ("hps", "pickscore")
    )
    assert {key: (hps[key], pickscore[key]) for key in hps if hps[key] != pickscore[key]} == {
        "reward.weights.hps": (1.0, 0.0),
        "reward.weights.pickscore": (0.0, 1.0),
        "rollout.guidance": (1.0, 2.0),
        "align.train_timestep": ([5, 25], [5, 30]),
        "align.discount_positive": ([0.1, 0.25], [0.1, 0.5]),
        "align.discount_negative": ([0.3, 0.01], [0.6, 0.01]),
    }


def test_the_offline_recipe_is_the_released_one_without_rollouts():
    online, offline = (
        config_lib.flatten(runpy.run_path(str(RECIPES / f"flux_dev_{name}.py"))["get_config"]())
        for name in ("hps", "hps_offline")
    )
    assert {key: (online[key], offline[key]) for key in online if online[key] != offline[key]} == {
        "data.encode": ("online", "stored"),
        "data.rollout": ("online", "offline"),
        "rollout.noise": ("shared", "per_sample"),
    }


# --- the command line ------------------------------------------------------------------------------------------------

RECIPE = "from srpo_jax.config import default\ndef get_config():\n    c = default()\n    c.steps = 7\n    return c\n"


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.py"
    path.write_text(RECIPE)
    return f"--config={path}"


def test_overrides_in_any_order(recipe):
    words = ["--config.optim.b1=0.5", "--workdir=w", recipe, "--config.reward.positive=('3D',)"]
    config, workdir, *job = main.parse(["main", *words])
    assert (config.steps, config.optim.b1, config.reward.positive, workdir) == (7, 0.5, ("3D",), "w")
    assert job == [None, None, None]
    with pytest.raises(AttributeError, match="lr"):
        config.optim.lr = 1.0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--workdir=w", "RECIPE", "--config.optim.lr=1"], r"config\.optim\.lr is unknown"),
        (["--workdir=w", "RECIPE", "--config.reward.weights.foo=1"], "'foo' is unknown; choose one of hps"),
        (["--workdir=w", "RECIPE", "--config.steps=1.5"], r"--config\.steps=1\.5"),
        (["--workdir=w", "RECIPE", "--flag=1"], "'flag'"),
        (["--workdir=w", "RECIPE", "--process_id=a"], "--process_id=a"),
        (["--workdir=w", "RECIPE", "word"], "'word' is not understood"),
        (["RECIPE"], "--workdir is missing"),
        (["--workdir=w"], "--config is missing"),
        (["--workdir=w", "--config=missing.py"], "missing.py"),
    ],
)
def test_a_wrong_command_line_is_one_line(recipe, words, message):
    with pytest.raises(UserError, match=message) as error:
        main.parse(["main"] + [recipe if word == "RECIPE" else word for word in words])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("def get_config(:", r"broken\.py, line 1"),
        ("x = 1", "no attribute 'get_config'"),
        (RECIPE.replace("c.steps", "c.optim.stepz"), "stepz"),
    ],
)
def test_a_recipe_that_fails_is_one_line(tmp_path, content, message, monkeypatch):
    monkeypatch.delitem(sys.modules, "config_config", raising=False)  # the recipe that was read before
    (tmp_path / "broken.py").write_text(content)
    with pytest.raises(UserError, match=message) as error:
        main.parse(["main", f"--config={tmp_path / 'broken.py'}", "--workdir=w"])
    assert "\n" not in str(error.value)


def test_help_lists_every_key(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["main", "--help"])
    main.main()
    shown = capsys.readouterr().out
    assert all(f"  {key} = " in shown for key in config_lib.flatten(config_lib.default()))
