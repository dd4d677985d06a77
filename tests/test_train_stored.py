"""Training on a stored data set: the numbers of encoding while training, pictures in the place of rollouts, going on,
and data that does not fit."""

import dataclasses
import shutil
import weakref

import numpy as np
import pytest
from helpers import tiny
from helpers.photos import write_folder
from helpers.runs import arrays, assert_same, numbers

from srpo_jax import architectures, conditions, encode, program, sharding, train
from srpo_jax.algorithm import step
from srpo_jax.data import loading, stored
from srpo_jax.errors import UserError
from srpo_jax.weights import folder


@pytest.fixture(scope="module")
def data(models, tmp_path_factory):
    """The training prompts of the tiny models, encoded."""
    out = tmp_path_factory.mktemp("encoded") / "data"
    mesh, options = sharding.make_mesh(tiny.config(models).mesh), dict(text_length=tiny.LENGTH, dtype="float32")
    encode.encode_prompts(models / "pipeline", tiny.PROMPTS, out, mesh=mesh, shard_size=3, **options)
    return out


@pytest.fixture(scope="module")
def recipe(models, data, compiled):
    """A function from changes to a config that reads the data set."""
    usual = {"compilation_cache": compiled, "data__encode": "stored", "data__path": str(data), "data__prompts": None}
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
    monkeypatch.setattr(conditions, "PromptEncoder", lambda *args: pytest.fail("the features are stored"))
    (tmp_path / "run" / "config.json").write_text((whole / "config.json").read_text())
    resumed = recipe(steps=4, sample__every=0)
    train.train(resumed, tmp_path / "run")
    (expected, run), (found, other) = arrays(whole, 4), arrays(tmp_path / "run", 4)
    for description in (run, other):
        for key in ("sample.every", "steps"):
            description["config"].pop(key)
    assert_same((expected, run), (found, other))
    assert numbers(tmp_path / "run") == numbers(whole)


def test_the_encoders_leave_memory_before_anything_is_loaded(recipe, tmp_path, monkeypatch):
    """They are there for the samples alone."""
    made, load, events = conditions.PromptEncoder.__init__, train.program.load_frozen, []

    def make(self, *args):
        made(self, *args)
        events.append("loaded")
        weakref.finalize(self, events.append, "freed")

    monkeypatch.setattr(conditions.PromptEncoder, "__init__", make)
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
    with pytest.raises(UserError, match="trained on other prompts or pictures than now"):
        train.train(chosen, tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__path": "nothing"}, "nothing is not a folder; expected a data set"),
        ({"data__path": None}, r"give a path: --config.data.path=..."),
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
    with pytest.raises(UserError, match=r"by another text_encoder_2 than .*encode again with --model="):
        train.train(recipe(model__path=str(other)), tmp_path / "run")


def test_features_for_another_transformer(recipe, models, tmp_path):
    other = tmp_path / "pipeline"
    other.mkdir()
    for part in (models / "pipeline").iterdir():
        (other / part.name).symlink_to(part)
    (other / "transformer").unlink()
    tiny.save_random(other / "transformer", "flux", dataclasses.replace(tiny.FLUX, joint_attention_dim=24), 1)
    with pytest.raises(UserError, match="text_encoder_2 has width 32; the transformer beside it expects 24"):
        train.train(recipe(model__path=str(other)), tmp_path / "run")


# --- pictures in the place of rollouts --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pictures(models, tmp_path_factory):
    """Seven pictures of the training prompts, encoded; a data set."""
    path = tmp_path_factory.mktemp("pictures")
    encode_pictures(models, write_folder(path / "photos"), path / "data")
    return path / "data"


def encode_pictures(models, photos, out):
    flags = {"model": models / "pipeline", "images": photos, "out": out, "text-length": tiny.LENGTH, "height": 32}
    flags |= {"width": 48, "dtype": "float32", "shard-size": 3}
    encode.main([f"--{name}={value}" for name, value in flags.items()])


@pytest.fixture(scope="module")
def offline(recipe, pictures):
    usual = {"data__images": "stored", "data__path": str(pictures)}
    return lambda **changes: recipe(**usual | changes)


def test_an_offline_run_resumes_bit_for_bit_and_makes_no_rollout(offline, tmp_path, monkeypatch):
    monkeypatch.setattr(step, "rollout", lambda *args: pytest.fail("real pictures take the place of rollouts"))
    monkeypatch.setattr(conditions, "PromptEncoder", lambda *args: pytest.fail("the features are stored"))
    train.train(offline(steps=4), tmp_path / "whole")
    train.train(offline(steps=3), tmp_path / "run")
    train.train(offline(steps=4), tmp_path / "run")
    assert_same(arrays(tmp_path / "whole", 4), arrays(tmp_path / "run", 4))
    assert numbers(tmp_path / "run") == numbers(tmp_path / "whole")
    moved = [arrays(tmp_path / "whole", update)[0] for update in (2, 4)]
    assert any(moved[0][name].tobytes() != moved[1][name].tobytes() for name in moved[0])


def test_a_batch_has_each_captions_own_picture(offline, pictures, models):
    """Packed as the transformer takes them: token (row, column) holds that 2x2 square of every channel."""
    config = offline(data__batch_size=3)
    architecture = architectures.read(config)
    built = program.build(config, sharding.make_mesh(config.mesh), architecture)
    conditioner = conditions.Conditioner(config, built, None)
    stored_ = {example["prompt"]: example["latents"] for example in stored.DataSet(pictures).read(range(7))}
    stream = loading.batches(loading.open_examples(config, architecture), 3, seed=0)
    for update in (1, 2):
        examples = next(stream)
        batch = conditioner.batch(examples, update)
        assert (batch.latents.shape, batch.latents.dtype) == (built.batch.latents.shape, np.float32)
        for prompt, tokens in zip(examples.prompts, np.asarray(batch.latents), strict=True):
            for row in range(2):
                for column in range(3):
                    square = stored_[prompt][2 * row : 2 * row + 2, 2 * column : 2 * column + 2]  # [2, 2, 16]
                    np.testing.assert_array_equal(tokens[3 * row + column].reshape(16, 2, 2), square.transpose(2, 0, 1))


def test_pictures_serve_a_run_with_rollouts_as_prompts(offline, whole, tmp_path):
    train.train(offline(steps=2, data__images="rollout"), tmp_path / "run")
    assert numbers(tmp_path / "run") == numbers(whole)[:2]


def test_pictures_that_changed_under_the_same_captions_are_noticed(offline, models, pictures, tmp_path):
    path = tmp_path / "data"
    shutil.copytree(pictures, path)
    chosen = offline(steps=1, data__path=str(path))
    train.train(chosen, tmp_path / "run")
    shutil.rmtree(path)
    photos = write_folder(tmp_path / "photos")
    shutil.copy(photos / "1.png", photos / "0.png")
    encode_pictures(models, photos, path)
    chosen.steps = 2
    with pytest.raises(UserError, match="trained on other prompts or pictures than now"):
        train.train(chosen, tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__height": 48}, r"holds pictures of 32x48 .*; set --config.data.height=32 .*width=48, .*--height=48"),
        ({"rollout__noise": "shared"}, r"rollout.noise='shared'"),
        (
            {"data__encode": "online", "data__prompts": "prompts.txt"},
            r"data.encode='online': data.images=stored needs encoded pictures",
        ),
    ],
)
def test_pictures_that_do_not_fit_leave_no_workdir(offline, tmp_path, changes, message):
    with pytest.raises(UserError, match=message) as error:
        train.train(offline(**changes), tmp_path / "run")
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_prompts_in_the_place_of_pictures(offline, data, tmp_path):
    with pytest.raises(UserError, match=r"data holds prompts without pictures; .*srpo_jax.encode --images"):
        train.train(offline(data__path=str(data)), tmp_path / "run")


def test_latents_of_another_autoencoder(offline, models, tmp_path):
    other = tmp_path / "pipeline"
    other.mkdir()
    for part in (models / "pipeline").iterdir():
        (other / part.name).symlink_to(part)
    (other / "vae").unlink()
    tiny.save_random(other / "vae", "autoencoder", tiny.VAE, 99)
    train.train(offline(steps=1, model__path=str(other), data__images="rollout"), tmp_path / "online")
    with pytest.raises(UserError, match=r"by another vae than .*encode again with --model="):
        train.train(offline(model__path=str(other)), tmp_path / "run")
