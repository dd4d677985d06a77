"""The comparison of where images come from: a shrunk one runs from the shipped weights to its table and sheet."""

import json

import numpy as np
import pytest
from PIL import Image

from srpo_jax import architectures, config, metrics, validation
from srpo_jax.costs import work
from srpo_jax.data import images
from srpo_jax.emoji import demo, pictures, rollouts, world
from srpo_jax.errors import UserError


def test_pictures_of_the_train_split_with_their_bare_names(tmp_path):
    rollouts.write_pictures(tmp_path / "all", world.STYLES)
    found, wrong = images.read(tmp_path / "all")
    train = world.split("train")
    assert [picture.caption for picture in found] == [concept.caption for concept in train] * 3 and not wrong
    expected = pictures.load(train)
    for style, place in ((0, 0), (1, 7), (2, len(train) - 1)):
        pixels, _ = images.load(found[style * len(train) + place], 64, 64)
        np.testing.assert_array_equal(pixels, expected[style, place])


def test_shrunk_comparison(tmp_path, monkeypatch, capsys):
    recipe = demo.load_recipe()
    recipe.data.batch_size = recipe.rollout.steps = recipe.refl.late_steps = 2
    monkeypatch.setattr(demo, "load_recipe", lambda: recipe)
    words = [f"--out={tmp_path}", "--updates=2", "--concepts=3", "--seeds=1", "--case=offline, 3D"]
    rollouts.main(words)
    table = (tmp_path / "rollouts.md").read_text()
    assert table in capsys.readouterr().out and len(table.splitlines()) == 4
    before, offline = json.loads((tmp_path / "rollouts.json").read_text())
    assert before["accuracy"] >= 0.6 and "seconds" not in before
    records = metrics.read(tmp_path / "runs" / "offline_wanted")
    assert offline["seconds"] == pytest.approx(np.mean([record["step_seconds"] for record in records]))
    assert offline["images_per_second"] == pytest.approx(2 / offline["seconds"])
    assert f"| offline, 3D | {offline['seconds']:.1f} |" in table and f"| {offline['3D']:.1%} |" in table
    there = json.loads((tmp_path / "runs" / "offline_wanted" / "config.json").read_text())
    assert (there["data"]["images"], there["rollout"]["reuse"]) == ("stored", 1)
    assert len(json.loads((tmp_path / "pictures" / "offline_wanted_encoded" / "prompts.json").read_text())) == 182
    with Image.open(tmp_path / "rollouts.png") as sheet:
        assert sheet.height > 2 * 64 and sheet.width > 3 * 64

    # Everything is done: the same command measures again and trains nothing.
    rollouts.main(words)
    assert json.loads((tmp_path / "rollouts.json").read_text()) == [before, offline]


@pytest.mark.parametrize("case", list(rollouts.CASES)[1:11])
def test_cases_are_cheaper_rollouts(case, monkeypatch, tmp_path):
    """What is trained is the recipe but for the rollout, and takes fewer FLOPs, or FLOPs of fewer bits."""
    recipe = demo.load_recipe()
    demo.prepare(tmp_path, recipe)
    monkeypatch.setattr("srpo_jax.train.train", lambda config, workdir, recipe: None)
    own, workdir = rollouts.run(tmp_path, recipe, case)
    validation.validate(own)
    there, here = config.flatten(recipe), config.flatten(own)
    assert {key.split(".")[0] for key in here if here[key] != there[key]} == {"rollout", "sample"}
    architecture = architectures.read(recipe)
    cost = [work.sample(c, architecture)["rollout"].model for c in (own, recipe)]
    if case in ("int8", "float8"):
        assert cost[0] == cost[1] and own.rollout.dtype == case
    else:
        assert cost[0] < 0.7 * cost[1]
    assert workdir.parent == tmp_path / "runs"


@pytest.mark.parametrize("flag", ["--concepts=0", "--seeds=65"])
def test_bad_numbers_are_refused(flag, tmp_path):
    with pytest.raises(UserError, match=f"{flag}: must be from 1 to"):
        rollouts.main([f"--out={tmp_path}", flag])
    assert list(tmp_path.iterdir()) == []
