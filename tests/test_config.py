"""The configuration: recipes, checks, and what a command line says to them."""

import pathlib
import re
import runpy

import pytest

from srpo_jax import architectures, main, validation
from srpo_jax import config as config_lib
from srpo_jax.costs import work
from srpo_jax.errors import UserError

NAN, INF = float("nan"), float("inf")


def complete():
    config = config_lib.default()
    config.model.path, config.data.prompts, config.sample.prompts = "model", "prompts.txt", "held_out.txt"
    config.reward.models.hps.path = "hps"
    return config


def test_the_default_lacks_only_paths():
    with pytest.raises(UserError, match=r"give paths: --config\.model\.path=\.\.\. "):
        validation.validate(config_lib.default())
    validation.validate(config_lib.default(), paths=False)
    validation.validate(complete())


def test_every_float_has_to_be_finite():
    flat = config_lib.flatten(config_lib.default())
    floats = [key for key, value in flat.items() if isinstance(value, float)]
    assert len(floats) > 15
    for key in floats:
        for value in (NAN, INF, -INF, 1e39):
            config = complete()
            config.update_from_flattened_dict({key: value})
            with pytest.raises(UserError, match=rf"config\.{re.escape(key)}=.*: must be a finite number"):
                validation.validate(config, paths=False)


def test_all_paths_that_are_not_given_are_named_at_once():
    config = config_lib.default()
    config.reward.models.clip.weight = 1.0
    keys = ("model.path", "data.prompts", "reward.models.clip.path", "reward.models.hps.path")
    with pytest.raises(UserError) as error:
        validation.validate(config)
    assert str(error.value) == f"give paths: {' '.join(f'--config.{key}=...' for key in keys)}"
    config.data.encode, config.sample.every, config.reward.models.clip.weight, config.model.path = "stored", 0, 0.0, "m"
    with pytest.raises(
        UserError, match=r"^give paths: --config\.data\.path=\.{3} --config\.reward\.models\.hps\.path=\.{3}$"
    ):
        validation.validate(config)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("method", "dpo", r"config\.method='dpo': choose one of srpo, direct_align, refl, draft_lv"),
        ("data.width", 0, r"config\.data\.width=0: must be at least 1"),
        ("steps", 0, r"config\.steps=0: must be at least 1"),
        ("reward.positive", (), r"config\.reward\.positive=\[\]: must be a list of one or more control words"),
        ("reward.negative", ("Flat", " "), r"config\.reward\.negative=.*none of them empty"),
        ("reward.models.hps.weight", 0.0, r"config\.reward\.models: all weights are 0"),
        ("reward.models.clip.weight", -1.0, r"config\.reward\.models\.clip\.weight=-1\.0: must not be negative"),
        ("reward.models.clip.weight", 1.0, r"give a path: --config\.reward\.models\.clip\.path=\.\.\.$"),
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
        ("data.prompts", None, r"give a path: --config\.data\.prompts=\.\.\.$"),
        ("mesh.tensor", 0, r"config\.mesh\.tensor=0"),
        ("mesh.data", -1, r"config\.mesh: only one of"),
        ("seed", 2**64, r"config\.seed=18446744073709551616: must be from 0 to 18446744073709551615"),
        ("seed", -1, r"config\.seed=-1: must be from 0 to"),
        ("sample.seed", 2**70, r"config\.sample\.seed=1180591620717411303424: must be from 0 to"),
        ("sample.guidance", NAN, r"config\.sample\.guidance=nan: must be a finite number"),
        ("rollout.guidance", INF, r"config\.rollout\.guidance=inf: must be a finite number"),
        ("reward.margin", NAN, r"config\.reward\.margin=nan"),
        ("reward.models.hps.weight", NAN, r"config\.reward\.models\.hps\.weight=nan"),
        ("optim.learning_rate", INF, r"config\.optim\.learning_rate=inf"),
        ("optim.learning_rate", 1e39, r"config\.optim\.learning_rate=1e\+39: must be a finite number"),
        ("optim.eps", 1e-60, r"config\.optim\.eps=1e-60: must be greater than 0"),
        ("steps", None, r"config\.steps=None: must be a whole number"),
        ("steps", True, r"config\.steps=True: must be a whole number"),
        ("compilation_cache", None, r"config\.compilation_cache=None: must be text"),
        ("align.train_timestep", (5.5, 25), r"config\.align\.train_timestep=\(5\.5, 25\): .* list of whole numbers"),
        ("align.discount_positive", ("a", "b"), r"discount_positive=\('a', 'b'\): must be a list of finite numbers"),
        ("align.weights", (0.1, NAN), r"config\.align\.weights=\(0\.1, nan\)"),
        ("rollout.cache_ends", (1, True), r"config\.rollout\.cache_ends=\(1, True\): must be a list of whole"),
        ("reward.positive", (1,), r"config\.reward\.positive=\(1,\): must be a list of texts"),
        ("lora.targets", (re.compile("x"),), r"config\.lora\.targets=.*: must be a list of texts"),
    ],
)
def test_bad_values_are_named(key, value, message):
    config = complete()
    config.update_from_flattened_dict({key: value})
    with pytest.raises(UserError, match=message) as error:
        validation.validate(config)
    assert "\n" not in str(error.value)


def test_late_steps_bind_the_method_that_takes_them():
    config = complete()
    config.refl.late_steps = 26
    validation.validate(config)
    config.method = "refl"
    with pytest.raises(UserError, match=r"config\.refl\.late_steps=26: must not exceed rollout\.steps=25"):
        validation.validate(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.images": "real"}, r"config\.data\.images='real': choose one of rollout, stored"),
        ({"method": "refl"}, r"config\.method='refl': takes states of a rollout, data\.images=stored has none"),
        ({"data.encode": "online"}, r"config\.data\.encode='online': data\.images=stored needs encoded pictures"),
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
    config.data.images, config.data.encode, config.data.path = "stored", "stored", "data"
    config.rollout.noise = "per_sample"
    validation.validate(config)
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=message):
        validation.validate(config)


def test_refl_cannot_use_a_rollout_again():
    config = complete()
    config.method, config.rollout.reuse = "refl", 2
    with pytest.raises(UserError, match=r"config\.rollout\.reuse=2: method=refl needs a rollout at every update"):
        validation.validate(config)


def test_unknown_and_missing_keys():
    config = complete()
    with config.unlocked():
        config.optim.learning_rat = 1.0
    with pytest.raises(UserError, match=r"optim\.learning_rat is unknown; do you mean config\.optim\.learning_rate"):
        validation.validate(config)
    with config.unlocked():
        del config.optim.learning_rat, config.optim.b1
    with pytest.raises(UserError, match=r"config\.optim\.b1 is missing"):
        validation.validate(config)
    with pytest.raises(AttributeError, match="lr"):
        complete().optim.lr = 1.0


# --- rewards: name and kind are two things ---------------------------------------------------------------------------


def test_rewards_of_one_kind_under_two_names():
    config = complete()
    for key, text in (("first.kind", "clip"), ("first.path", "a"), ("second.kind", "clip"), ("second.path", "b")):
        config_lib.set_text(config, f"reward.models.{key}", text)
    validation.validate(config)
    assert config.reward.models.second.to_dict() == {"kind": "clip", "path": "b", "weight": 1.0}
    config_lib.set_text(config, "reward.models.third.path", "c")
    with pytest.raises(UserError, match=r"config\.reward\.models\.third\.kind='': choose one of hps, pickscore, clip"):
        validation.validate(config)
    config_lib.set_text(config, "reward.models.third.kind", "beauty")
    with pytest.raises(UserError, match=r"config\.reward\.models\.third\.kind='beauty': choose one of hps, pickscore"):
        validation.validate(config)
    with pytest.raises(UserError, match=r"config\.reward\.models\.third\.margin is unknown"):
        config_lib.set_text(config, "reward.models.third.margin", "1")


@pytest.mark.parametrize(
    ("before", "today"),
    [
        ("reward.weights.hps", "reward.models.hps.weight"),
        ("reward.paths.clip", "reward.models.clip.path"),
        ("data.rollout", "data.images"),
    ],
)
def test_a_key_of_an_earlier_version_is_told_its_name_of_today(before, today):
    with pytest.raises(UserError, match=rf"^config\.{re.escape(before)} is config\.{re.escape(today)} now$"):
        config_lib.set_text(complete(), before, "1")
    config = complete()
    group, _, name = before.rpartition(".")
    with config.unlocked():
        config.update_from_flattened_dict(
            {group: {**config.get(group, {}), name: 1}} if group != "data" else {before: 1}
        )
    with pytest.raises(UserError, match=rf"config\.{re.escape(before)} is config\.{re.escape(today)} now"):
        validation.validate(config)


# --- the recipes ------------------------------------------------------------------------------------------------------

RECIPES = pathlib.Path(__file__).parents[1] / "configs"


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.py")), ids=lambda path: path.stem)
def test_recipes_lack_nothing_but_paths(path):
    c = runpy.run_path(str(path))["get_config"]()
    for reward in c.reward.models.values():
        reward.path = reward.path or ("reward" if reward.weight else None)
    data = "prompts" if c.data.encode == "online" else "path"
    for group, key in (("model", "path"), ("data", data), ("sample", "prompts")):
        c[group][key] = c[group][key] or "somewhere"
    validation.validate(c)


def test_what_tells_the_released_recipes_apart():
    hps, pickscore = (
        config_lib.flatten(runpy.run_path(str(RECIPES / f"flux_dev_{name}.py"))["get_config"]())
        for name in ("hps", "pickscore")
    )
    assert {key: (hps[key], pickscore[key]) for key in hps if hps[key] != pickscore[key]} == {
        "reward.models.hps.weight": (1.0, 0.0),
        "reward.models.pickscore.weight": (0.0, 1.0),
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
        "data.images": ("rollout", "stored"),
        "rollout.noise": ("shared", "per_sample"),
    }


def test_the_fast_recipe_is_the_released_one_with_cheaper_rollouts():
    released, fast = (
        runpy.run_path(str(RECIPES / f"flux_dev_{name}.py"))["get_config"]() for name in ("hps", "hps_fast")
    )
    one, other = config_lib.flatten(released), config_lib.flatten(fast)
    assert {key: (one[key], other[key]) for key in one if one[key] != other[key]} == {
        "rollout.cache": (1, 2),
        "rollout.reuse": (1, 2),
    }
    spent = [
        sum(part.model for part in work.sample(c, architectures.published(c, "flux-dev")).values())
        for c in (released, fast)
    ]
    assert spent[1] / spent[0] == pytest.approx(0.42, abs=0.005)


# --- the command line ------------------------------------------------------------------------------------------------

RECIPE = "from srpo_jax.config import default\ndef get_config():\n    c = default()\n    c.steps = 7\n    return c\n"


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.py"
    path.write_text(RECIPE)
    return f"--config={path}"


def test_overrides_in_any_order(recipe):
    words = ["--config.optim.b1=0.5", "--workdir=w", recipe, "--config.reward.positive=('3D',)"]
    config, workdir, *job, given = main.parse(words)
    assert (config.steps, config.optim.b1, config.reward.positive, workdir) == (7, 0.5, ("3D",), "w")
    assert job == [None, None, None, (), None] and given.values["optim.b1"] == 0.9
    with pytest.raises(AttributeError, match="lr"):
        config.optim.lr = 1.0


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("reward.positive", "Real,Detail", ("Real", "Detail")),
        ("reward.positive", "Real, Oil painting", ("Real", "Oil painting")),
        ("reward.positive", "Real", ("Real",)),
        ("reward.positive", "'Real','Detail'", ("Real", "Detail")),
        ("reward.positive", "('Real, or so',)", ("Real, or so",)),
        ("reward.positive", "['3D', 'Flat']", ("3D", "Flat")),
        ("reward.positive", "1,2", ("1", "2")),
        ("reward.positive", "None", ("None",)),
        ("align.branches", "denoise", ("denoise",)),
        ("align.train_timestep", "5,25", (5, 25)),
        ("align.train_timestep", "(5, 25)", (5, 25)),
        ("align.discount_positive", "0,1e-1", (0.0, 0.1)),
        ("data.column", "None", None),
        ("lora.init", "None", None),
        ("data.column", "caption", "caption"),
        ("data.filter.include", "", ""),
        ("compilation_cache", "a=b", "a=b"),
        ("optim.offload", "true", True),
        ("optim.offload", "False", False),
        ("optim.learning_rate", "1e-5", 1e-5),
        ("optim.learning_rate", "1", 1.0),
        ("mesh.fsdp", "-1", -1),
    ],
)
def test_what_a_text_stands_for(recipe, key, text, value):
    config = main.parse(["--workdir=w", recipe, f"--config.{key}={text}"]).config
    found = config
    for name in key.split("."):
        found = found[name]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        ("align.train_timestep", "5.5,25", "must be whole numbers, as 1,2"),
        ("align.discount_positive", "a,b", "must be finite numbers, as 1,2"),
        ("align.discount_positive", "nan,1", "must be finite numbers"),
        ("align.discount_positive", "(1,", "must be finite numbers"),
        ("reward.positive", "('Real', 1)", "must be texts, as one,two"),
        ("optim.learning_rate", "inf", "must be a finite number"),
        ("optim.learning_rate", "None", "must be a finite number"),
        ("optim.offload", "maybe", "must be True or False"),
        ("steps", "1e3", "must be a whole number"),
        ("steps", "None", "must be a whole number"),
    ],
)
def test_what_a_text_cannot_stand_for(recipe, key, text, message):
    with pytest.raises(UserError) as error:
        main.parse(["--workdir=w", recipe, f"--config.{key}={text}"])
    assert str(error.value).startswith(f"--config.{key}={text}: {message}")


def test_no_folder_of_the_name_none(recipe):
    config = main.parse(["--workdir=w", recipe, "--config.compilation_cache=None"]).config
    with pytest.raises(UserError, match=r"config\.compilation_cache=None: must be text"):
        validation.validate(config, paths=False)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--workdir=w", "RECIPE", "--config.optim.lr=1"], r"config\.optim\.lr is unknown"),
        (["--workdir=w", "RECIPE", "--config.steps=1.5"], r"--config\.steps=1\.5"),
        (["--workdir=w", "RECIPE", "--flag=1"], "unrecognized flag --flag"),
        (["--workdir=w", "RECIPE", "--process-id=a"], "--process-id=a: must be a whole number"),
        (["--workdir=w", "RECIPE", "word"], "'word' is not understood"),
        (["RECIPE"], "--workdir is missing"),
        (["--workdir=w"], "--config is missing"),
        (["--workdir=w", "--config=missing.py"], "missing.py"),
    ],
)
def test_a_wrong_command_line_is_one_line(recipe, words, message):
    with pytest.raises(UserError, match=message) as error:
        main.parse([recipe if word == "RECIPE" else word for word in words])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("def get_config(:", r"broken\.py"),
        ("x = 1", "no attribute 'get_config'"),
        (RECIPE.replace("c.steps", "c.optim.stepz"), "stepz"),
    ],
)
def test_a_recipe_that_fails_is_one_line(tmp_path, content, message):
    (tmp_path / "broken.py").write_text(content)
    with pytest.raises(UserError, match=message) as error:
        main.parse([f"--config={tmp_path / 'broken.py'}", "--workdir=w"])
    assert "\n" not in str(error.value)


def test_help_lists_every_key(capsys):
    with pytest.raises(SystemExit, match="0"):
        main.main(["--help"])
    shown = capsys.readouterr().out
    assert all(f"  {key} = " in shown for key in config_lib.flatten(config_lib.default()))
