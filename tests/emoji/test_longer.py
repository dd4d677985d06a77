"""The long run: what it asks of its judge and of its config, and the table."""

import numpy as np
import pytest

from srpo_jax import resume, text, validation
from srpo_jax.config import flatten
from srpo_jax.emoji import demo, longer, measure, world
from srpo_jax.emoji.judge import Judgement
from srpo_jax.errors import UserError
from srpo_jax.evaluation import in_training, stopping


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """(folder, the recipe with its paths, the long run's config)."""
    out = tmp_path_factory.mktemp("longer")
    config = demo.load_recipe()
    demo.prepare(out, config)
    return out, config, longer.lengthened(out, config, world.split("holdout")[::2])


def test_the_judge_is_asked_for_what_is_wanted(prepared):
    out, _, _ = prepared
    plain, wanted = (text.load_tokenizer(out / "models" / name / "tokenizer") for name in ("judge", "judge_wanted"))
    found = text.tokenize(wanted, ["fox", "red apple"], 16)
    np.testing.assert_array_equal(found, text.tokenize(plain, ["3D. fox", "3D. red apple"], 16))
    longer.ask_for_wanted(out / "models" / "judge", out / "models" / "judge_wanted")  # is there
    assert not list((out / "models").glob(".*"))


def test_the_long_run_is_the_recipe_but_for_its_length_and_what_it_looks_at(prepared):
    _, config, own = prepared
    validation.validate(own)
    validation.check_files(own)
    assert own.steps == 5 * config.steps
    assert resume.differences(flatten(own), flatten(config), {}, {}) == []  # none that counts for what is trained
    what = in_training.plan(own, resume.fingerprints(own))
    assert what.aim == stopping.Aim(longer.WANTED_SCORE, True)
    assert set(what.held_out) == {longer.WANTED_SCORE, longer.PLAIN_SCORE} and what.own == ("clip",)
    assert len(what.items) == 30


def moment(share, accuracy):
    values = {"3D": share, "accuracy": accuracy, "distance": 0.25}
    found = {name: np.broadcast_to(np.asarray(value, float), (4, 2)) for name, value in values.items()}
    return measure.Measured(np.zeros((4, 2, 8, 8, 3), np.uint8), Judgement(np.eye(3), np.eye(3)), found)


def test_the_table_compares_pair_by_pair():
    half = [[1, 0]] * 4
    moments = {"before": moment(0, 1), "recipe": moment(half, 1), "best": moment(1, half), "last": moment(1, 0)}
    lines = longer.table(moments).splitlines()
    assert lines[0] == "|  | before | recipe | best | last |"
    assert lines[2].startswith("| judged 3D | 0.0% (0.0% to 0.0%) | 50.0% (50.0% to 50.0%) | 100.0% (")
    assert "3D +0.500 (+0.500 to +0.500), accuracy -0.500 (-0.500 to -0.500), distance +0.000" in lines[-1]


def test_one_concept_is_too_few(tmp_path):
    with pytest.raises(UserError, match="--concepts=1: take at least 2"):
        longer.main([f"--out={tmp_path}", "--concepts=1"])
