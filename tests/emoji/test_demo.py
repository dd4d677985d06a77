"""The demonstration: its verdicts are right, and a shrunk one runs from the shipped weights to the report."""

import json

import numpy as np
import pytest
from PIL import Image

from srpo_jax import report
from srpo_jax.emoji import demo, pictures, results, world
from srpo_jax.emoji.judge import Judgement
from srpo_jax.emoji.measure import Measured, measure
from srpo_jax.errors import UserError


def moment(share: float, accuracy: float) -> Measured:
    figures = {"3D": share, "Flat": 1 - share, "Mono": 0.0, "accuracy": accuracy, "distance": 0.2}
    values = {name: np.full((1, 2), value) for name, value in figures.items()}
    judgement = Judgement(np.full((2, 3), 1 / 3), np.full((2, len(world.world())), 1 / len(world.world())))
    return Measured(np.zeros((1, 2, 8, 8, 3), np.uint8), judgement, values)


@pytest.mark.parametrize(
    "before, after, reached",
    [
        ((0.3, 0.90), (0.61, 0.88), [True, True]),  # more than doubled
        ((0.3, 0.90), (0.59, 0.90), [False, True]),
        ((0.5, 0.90), (0.81, 0.87), [True, True]),  # reached 80 %; three points exactly
        ((0.5, 0.90), (0.79, 0.86), [False, False]),
        ((0.0, 0.90), (0.0, 0.95), [False, True]),
    ],
)
def test_targets(before, after, reached):
    curves = {run: {0: moment(*before), 5: moment(0.1, 0.1), 10: moment(*after)} for run in demo.RUNS}
    found = results.Results(demo.load_recipe(), world.split("holdout")[:1], curves, {}, [("all", 90.0)])
    assert [target.reached for target in found.targets()] == reached
    assert [(target.before, target.after) for target in found.targets()] == list(zip(before, after, strict=True))


def test_distance_is_zero_for_the_artists_pictures():
    concepts = world.split("holdout")[:3]

    def critic(images: np.ndarray) -> Judgement:
        assert images.shape == (6, 64, 64, 3)
        return Judgement(np.eye(3)[[0, 1, 0, 0, 2, 0]], np.eye(len(world.world()))[[0] * 6])

    drawings = np.repeat(pictures.load(concepts, ["3D"])[0][:, None], 2, axis=1)
    measured = measure(drawings, concepts, critic)
    assert measured.figures["distance"] == 0
    assert measured.figures["3D"] == pytest.approx(4 / 6)
    assert measure(255 - drawings, concepts, critic).figures["distance"] > 0.2


@pytest.mark.parametrize("flag", ["--concepts=0", "--concepts=60", "--seeds=65"])
def test_bad_numbers_are_refused(flag, tmp_path):
    with pytest.raises(UserError, match=f"{flag}: must be from 1 to"):
        demo.main([f"--out={tmp_path}", flag])
    assert list(tmp_path.iterdir()) == []


def test_shrunk_demonstration(tmp_path, monkeypatch, capsys):
    recipe = demo.load_recipe()
    recipe.data.batch_size = 2
    recipe.rollout.steps = recipe.refl.late_steps = 2
    recipe.sample.every = 0
    recipe.checkpoint.every = 2
    monkeypatch.setattr(demo, "load_recipe", lambda: recipe)
    demo.main([f"--out={tmp_path}", "--updates=2", "--concepts=5", "--seeds=1"])

    content = json.loads((tmp_path / "metrics.json").read_text())
    assert set(content["judged"]) == set(content["training"]) == set(demo.RUNS)
    before = content["judged"][results.GUARDED][0]
    assert before["accuracy"] >= 0.6  # the shipped model draws what it is asked for
    for run in demo.RUNS:
        assert [entry["step"] for entry in content["judged"][run]] == [0, 2]
        assert content["judged"][run][0] == before
        assert [record["step"] for record in content["training"][run]] == [1, 2]
    guarded, contrast = (content["training"][run][0] for run in demo.RUNS)
    assert "inversion/reward" in guarded and "inversion/reward" not in contrast
    # The same noise and weights: the branches share their first rollout.
    assert guarded["denoise/reward"] == pytest.approx(contrast["denoise/reward"], rel=1e-4)
    with Image.open(tmp_path / "before_after.png") as sheet:
        assert sheet.width > 5 * 64
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("<figure>") == 5 and page.count("<img ") == 5 * 3
    assert "Concept right" in capsys.readouterr().out

    # Everything is done: the same command measures again and trains nothing.
    again = demo.demonstrate(tmp_path, recipe, world.split("holdout")[:5], 1).content()
    assert again["judged"] == content["judged"]
    assert again["training"] == content["training"]


def test_page_shows_every_picture_once():
    concepts = world.split("holdout")[:30]
    many = Measured(
        np.zeros((30, 1, 8, 8, 3), np.uint8),
        Judgement(np.full((30, 3), 1 / 3), np.full((30, len(world.world())), 1 / len(world.world()))),
        {name: np.repeat(values[:, :1], 30, 0) for name, values in moment(0.5, 0.5).values.items()},
    )
    record = {
        "step": 1,
        "denoise/reward": 0.1,
        "inversion/reward": 0.1,
        "denoise/caption_reward": 0.1,
        "grad_norm": 1.0,
    }
    found = results.Results(
        demo.load_recipe(),
        concepts,
        {run: {0: many, 1: many} for run in demo.RUNS},
        {run: [record] for run in demo.RUNS},
        [],
    )
    open_, folded = (part for part in results.page(found).parts if isinstance(part, report.Gallery))
    assert (len(open_.comparisons), len(folded.comparisons)) == (results.SHOWN, 30 - results.SHOWN)
    assert {c.prompt for c in open_.comparisons + folded.comparisons} == {c.caption for c in concepts}
    assert report.render(results.page(found)).count("<svg") == 6
