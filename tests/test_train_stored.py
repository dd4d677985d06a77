"""Training on a stored data set: the numbers of encoding while training, going on, and data that does not fit."""

import dataclasses
import shutil
import weakref

import pytest
import tiny
from test_train import arrays, numbers, same

from srpo_jax import conditions, encode, sharding, train
from srpo_jax.errors import UserError
from srpo_jax.weights import folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return tiny.write_all(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def data(models):
    """The training prompts of the tiny models, encoded."""
    mesh, options = sharding.make_mesh(tiny.config(models).mesh), dict(text_length=tiny.LENGTH, dtype="float32")
    encode.encode_prompts(models / "pipeline", tiny.PROMPTS, models / "data", mesh=mesh, shard_size=3, **options)
    return models / "data"


@pytest.fixture(scope="module")
def recipe(models, data, tmp_path_factory):
    """A function from changes to a config that reads the data set; its programs are compiled once."""
    cache = str(tmp_path_factory.mktemp("xla"))
    usual = {"compilation_cache": cache, "data__encode": "stored", "data__path": str(data), "data__prompts": None}
    return lambda **changes: tiny.config(models, **usual | changes)


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory):
    """The workdir of an uninterrupted run of four updates."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    assert train.train(recipe(steps=4, sample__every=2), workdir) is None
    return workdir


def test_stored_features_give_the_numbers_of_online_ones(whole, recipe, models, tmp_path):
    online = recipe(steps=2, data__encode="online", data__path=None, data__prompts=str(models / "train.txt"))
    train.train(online, tmp_path / "run")
    for mine, other in zip(numbers(whole)[:2], numbers(tmp_path / "run"), strict=True):
        assert mine == pytest.approx(other, rel=1e-4, abs=1e-6)
    assert checkpoint_source(whole, 2) == checkpoint_source(tmp_path / "run", 2)


def checkpoint_source(workdir, step):
    return {key: arrays(workdir, step)[1][key] for key in ("data", "source")}


def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(whole, recipe, tmp_path, monkeypatch):
    """And, without samples to draw, needs no text encoders."""
    train.train(recipe(steps=1, sample__every=0), tmp_path / "run")
    monkeypatch.setattr(conditions, "TextEncoders", lambda *args: pytest.fail("the features are stored"))
    (tmp_path / "run" / "config.json").write_text((whole / "config.json").read_text())
    resumed = recipe(steps=4, sample__every=0)
    train.train(resumed, tmp_path / "run")
    (expected, run), (found, other) = arrays(whole, 4), arrays(tmp_path / "run", 4)
    for description in (run, other):
        for key in ("sample.every", "steps"):
            description["config"].pop(key)
    same((expected, run), (found, other))
    assert numbers(tmp_path / "run") == numbers(whole)


def test_the_encoders_leave_memory_before_anything_is_loaded(recipe, tmp_path, monkeypatch):
    """They are there for the samples alone."""
    made, load, events = conditions.TextEncoders.__init__, train.program.load_frozen, []

    def make(self, *args):
        made(self, *args)
        events.append("loaded")
        weakref.finalize(self, events.append, "freed")

    monkeypatch.setattr(conditions.TextEncoders, "__init__", make)
    monkeypatch.setattr(train.program, "load_frozen", lambda *args: (events.append("training"), load(*args))[1])
    train.train(recipe(steps=1, sample__every=1, sample__count=1), tmp_path / "run")
    assert events == ["loaded", "freed", "training"]


def test_prompts_that_changed_are_noticed(recipe, data, tmp_path):
    train.train(recipe(steps=1), tmp_path / "run")
    chosen = recipe(steps=2)
    shutil.copytree(data, tmp_path / "data")
    prompts = tmp_path / "data" / "prompts.json"
    prompts.write_text(prompts.read_text().replace("red apple", "red cherry"))
    chosen.data.path = str(tmp_path / "data")
    config = tmp_path / "run" / "config.json"
    config.write_text(config.read_text().replace(str(data), str(tmp_path / "data")))
    with pytest.raises(UserError, match="trained on other prompts than there are now"):
        train.train(chosen, tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__path": "nothing"}, "nothing is not a folder; expected a data set"),
        ({"data__path": None}, r"config.data.path=None: give a path"),
        ({"data__text_length": 4}, r"encoded with 8 tokens .*; set --config.data.text_length=8, or .*--text-length=4"),
        ({"model__dtype": "bfloat16"}, "encoded in float32, .*; encode again with --dtype=bfloat16"),
        ({"data__filter__min_length": 99}, "no prompt is left: 7 prompts; left out: 7 shorter than 99"),
        ({"data__encode": "both"}, "choose one of online, stored"),
    ],
)
def test_data_that_does_not_fit_leaves_no_workdir(recipe, tmp_path, changes, message):
    with pytest.raises(UserError, match=message) as error:
        train.train(recipe(**changes), tmp_path / "run")
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_features_of_other_encoders(recipe, models, tmp_path):
    other = tmp_path / "pipeline"
    other.mkdir()
    for part in (models / "pipeline").iterdir():
        (other / part.name).symlink_to(part)
    (other / "text_encoder_2").unlink()
    _, sizes = folder.read_config(models / "pipeline" / "text_encoder_2")
    tiny.save_random(other / "text_encoder_2", "t5", sizes, 99)
    with pytest.raises(UserError, match=r"by another text_encoder_2 than .*encode the prompts again with --model="):
        train.train(recipe(model__path=str(other)), tmp_path / "run")


def test_features_for_another_transformer(recipe, models, tmp_path):
    other = tmp_path / "pipeline"
    other.mkdir()
    for part in (models / "pipeline").iterdir():
        (other / part.name).symlink_to(part)
    (other / "transformer").unlink()
    tiny.save_random(other / "transformer", "flux", dataclasses.replace(tiny.FLUX, joint_attention_dim=24), 1)
    with pytest.raises(UserError, match="has features of width 32; the transformer of .* expects 24"):
        train.train(recipe(model__path=str(other)), tmp_path / "run")
