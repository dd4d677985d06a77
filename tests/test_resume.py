"""Whether a run may go on: what may change, models known by their content, and a workdir of an earlier version."""

import json
import pathlib
import shutil
import zipfile

import numpy as np
import pytest
from helpers import tiny

from srpo_jax import checkpoint, config, convert, record, resume, train
from srpo_jax.errors import UserError

EARLIER = pathlib.Path(__file__).parent / "earlier" / "workdir.zip"


# --- what may change --------------------------------------------------------------------------------------------------


def differences(here, there, models=None, models_there=None):
    return resume.differences(config.flatten(here), config.flatten(there), models or {}, models_there or {})


@pytest.mark.parametrize(
    "changes",
    [
        {"optim.accumulation": 4, "mesh.fsdp": 16},
        {"model.attention": "splash"},
        {"data.prompts": "./prompts.txt", "data.column": "prompt", "data.filter.unique": True},
        {"steps": 99, "checkpoint.every": 7, "rollout.unroll": True},
        {"reward.models.pickscore.path": "elsewhere"},  # it has no weight
    ],
)
def test_what_changes_no_update(changes):
    here, there = config.default(), config.default()
    here.update_from_flattened_dict(changes)
    assert differences(here, there) == []


def test_what_changes_an_update_is_named():
    here, there = config.default(), config.default()
    here.optim.learning_rate, here.reward.models.clip.weight = 1e-3, 0.5
    assert differences(here, there) == [
        "optim.learning_rate is 5e-06 there, 0.001 here",
        "reward.models.clip.kind is None there, 'clip' here",
        "reward.models.clip.weight is None there, 0.5 here",
    ]


def test_a_key_that_an_earlier_version_lacked_has_its_default():
    here, flat = config.default(), config.flatten(config.default())
    del flat["rollout.unroll"], flat["sample.column"], flat["rollout.solver"]
    assert resume.differences(config.flatten(here), flat, {}, {}) == []
    here.rollout.solver = "ab2"
    assert resume.differences(config.flatten(here), flat, {}, {}) == ["rollout.solver is 'euler' there, 'ab2' here"]


def test_refl_of_an_earlier_version_drew_for_each_sample():
    flat = config.flatten(config.default())
    del flat["rollout.draws"]
    assert resume.up_to_date(flat)["rollout.draws"] == "shared"
    assert resume.up_to_date(flat | {"method": "refl"})["rollout.draws"] == "per_sample"


def test_keys_of_an_earlier_version():
    flat = {"reward.weights.hps": 0.0, "reward.weights.clip": 2.0, "reward.paths.clip": "x", "data.rollout": "offline"}
    found = resume.up_to_date(flat)
    assert found["reward.models.clip.weight"] == 2.0 and found["reward.models.clip.kind"] == "clip"
    assert found["reward.models.clip.path"] == "x" and found["reward.models.hps.weight"] == 0.0
    assert found["data.images"] == "stored" and not any(key in found for key in flat)


def test_models_are_known_by_their_content_and_not_by_their_place(models, tmp_path, monkeypatch):
    here, there = tiny.config(models), tiny.config(models)
    known = resume.fingerprints(there)
    assert set(known) == {"model.path", "reward.models.clip.path"} and len(set(known.values())) == 2
    shutil.copytree(models / "pipeline", tmp_path / "moved")
    here.model.path = str(tmp_path / "moved")
    for name in (".DS_Store", ".gitattributes"):
        (tmp_path / "moved" / "tokenizer" / name).write_text("left by a desktop, or a download")
    assert differences(here, there, resume.fingerprints(here), known) == []
    tiny.save_random(tmp_path / "moved" / "vae", "autoencoder", tiny.VAE, 77)
    (message,) = differences(here, there, resume.fingerprints(here), known)
    assert message.startswith(f"model.path='{tmp_path / 'moved'}' holds another model than")
    # A workdir that has no fingerprints: the same place, however it is spelled.
    monkeypatch.chdir(models)
    here.model.path, there.model.path = "./pipeline/", str(models / "pipeline")
    assert differences(here, there, resume.fingerprints(here), {}) == []
    here.model.path = str(tmp_path / "moved")
    assert differences(here, there, resume.fingerprints(here), {})


def test_another_reward_under_the_same_path_is_noticed(models, tmp_path):
    shutil.copytree(models / "clip", tmp_path / "clip")
    recipe = tiny.config(models, reward__models__clip__path=str(tmp_path / "clip"), steps=1)
    train.train(recipe, tmp_path / "run")
    shutil.rmtree(tmp_path / "clip")
    shutil.copytree(models / "hps", tmp_path / "clip")
    recipe.steps = 2
    with pytest.raises(UserError, match="reward.models.clip.path=.* holds another model than"):
        train.train(recipe, tmp_path / "run")


def test_changes_on_purpose_are_added_to_whatever_is_there(tmp_path):
    before, after = config.default(), config.default()
    after.optim.b1 = 0.5
    record.write(tmp_path, before, {})
    (tmp_path / "changes.jsonl").write_bytes(b"\xff\n\nnull")
    record.write(tmp_path, after, {}, ("optim",), 7)
    *kept, line = (tmp_path / "changes.jsonl").read_bytes().splitlines()
    assert kept == [b"\xff", b"", b"null"]
    assert json.loads(line).items() >= {"after_update": 7, "key": "optim.b1", "from": 0.9, "to": 0.5}.items()


# --- a workdir of an earlier version ----------------------------------------------------------------------------------


@pytest.fixture
def earlier(tmp_path, monkeypatch):
    """The folder, in which its relative paths lead to its models."""
    with zipfile.ZipFile(EARLIER) as file:
        file.extractall(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


CHANGES = {"full": {"optim__ema_decay": 0.5}, "lora": {"lora__rank": 2, "optim__learning_rate": 1e-2}}


@pytest.mark.parametrize("kind", list(CHANGES))
def test_a_run_of_an_earlier_version_goes_on(earlier, kind):
    """To the weights that that version came to."""
    assert "weights" in json.loads((earlier / f"run_{kind}" / "config.json").read_text())["reward"]
    train.train(tiny.config(pathlib.Path("."), steps=4, **CHANGES[kind]), f"run_{kind}")
    found = tiny.read_arrays(earlier / f"run_{kind}" / "checkpoints" / "4" / "params")
    started = tiny.read_arrays(earlier / f"run_{kind}" / "checkpoints" / "2" / "params")
    with np.load(earlier / f"end_{kind}.npz") as expected:
        assert set(expected) == set(found)
        moved = sum(np.linalg.norm(expected[name] - started[name]) for name in found)
        off = sum(np.linalg.norm(expected[name] - found[name]) for name in found)
    assert moved > 0 and off < 1e-3 * moved
    assert json.loads((earlier / f"run_{kind}" / "config.json").read_text())["reward"]["models"]["clip"]["weight"] == 1


def test_an_earlier_run_with_other_settings_is_refused(earlier):
    with pytest.raises(UserError, match="optim.ema_decay is 0.5 there, 0.0 here"):
        train.train(tiny.config(pathlib.Path("."), steps=4), "run_full")


@pytest.mark.parametrize(("kind", "style", "ema"), [("full", "diffusers", True), ("lora", "lora-diffusers", False)])
def test_a_run_of_an_earlier_version_is_exported(earlier, kind, style, ema):
    out = earlier / "exported"
    words = ["export", "--source=pipeline", f"--checkpoint=run_{kind}", f"--target={out}", f"--format={style}"]
    convert.main([*words, *(["--ema"] if ema else [])])
    assert checkpoint.steps(f"run_{kind}") == [2]
    assert any(path.suffix == ".safetensors" for path in out.rglob("*"))
