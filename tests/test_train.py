"""Training of a tiny pipeline: what it leaves, going on, interruption, errors, and that every key counts."""

import dataclasses
import json
import re
import shutil
import signal
import sys
from unittest import mock

import jax
import numpy as np
import pytest
from helpers import jobs, tiny
from helpers.pages import Checker
from helpers.runs import arrays, assert_same, numbers
from ml_collections import ConfigDict
from PIL import Image

from srpo_jax import (
    architectures,
    checkpoint,
    config,
    encode,
    metrics,
    optim,
    program,
    run_page,
    sharding,
    stored_weights,
    train,
    validation,
    wandb_board,
)
from srpo_jax.data import loading
from srpo_jax.errors import UserError
from srpo_jax.weights import folder


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory):
    """The workdir of an uninterrupted run of four updates."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    assert train.train(recipe(steps=4, optim__ema_decay=0.5, sample__every=2), workdir) is None
    return workdir


# --- what a run leaves ------------------------------------------------------------------------------------------------


def test_a_run_leaves_metrics_samples_checkpoints_and_its_config(whole, models):
    records = metrics.read(whole)
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    names = {f"{term}/{name}" for term in ("denoise", "inversion") for name in ("loss", "reward", "caption_reward")}
    assert set(records[0]) == names | {
        "step",
        "loss",
        "grad_norm",
        "skipped",
        "step_seconds",
        "data_seconds",
        "images_per_second",
        "goodput",
    }
    assert all(0 < record["goodput"] < 1 for record in records)
    assert checkpoint.steps(whole) == [2, 4]
    saved = json.loads((whole / "config.json").read_text())
    assert saved["optim"]["ema_decay"] == 0.5 and saved["data"]["prompts"] == str(models / "train.txt")
    assert any((whole / "tensorboard").iterdir())


def test_a_run_leaves_a_page(whole):
    """With the pictures that were cut out of its sample grids."""
    page = (whole / "report.html").read_text()
    assert "has done all of its 4 updates" in page and "Reward in training" in page
    held_out = json.loads((whole / "samples" / "prompts.json").read_text())
    cards = Checker(page).cards
    assert [card["data-prompt"] for card in cards] == held_out and len(held_out) == 3
    assert all(name in page for name in ("before", "update 2", "update 4"))


def test_a_page_that_cannot_be_drawn_stops_no_run(recipe, tmp_path, monkeypatch, capsys):
    def broken(*_):
        raise RuntimeError("no page")

    monkeypatch.setattr(run_page, "page", broken)
    assert train.train(recipe(steps=2, sample__every=1), tmp_path / "run") is None
    assert checkpoint.steps(tmp_path / "run") == [2]
    assert capsys.readouterr().err.count("report.html was not drawn (RuntimeError: no page)") == 4


def test_sample_grids_show_the_held_out_prompts_with_the_same_noise(whole):
    assert sorted(path.name for path in (whole / "samples").glob("*.png")) == ["000000.png", "000002.png", "000004.png"]
    pictures = [np.asarray(Image.open(whole / "samples" / f"{n:06d}.png"), np.int32) for n in (0, 2, 4)]
    assert all(picture.shape == (2 * 32, 2 * 48, 3) for picture in pictures)
    assert (pictures[0][32:, 48:] == 255).all()  # three prompts fill three of four places
    first, moved = pictures[0][:32], [np.abs(picture - pictures[0])[:32].mean() for picture in pictures[1:]]
    # Other weights, but not other noise: a picture is nearer to itself two updates later than to its neighbour.
    assert 0 < moved[0] < moved[1] and moved[0] < np.abs(first[:, :48] - first[:, 48:]).mean() / 2


def test_the_weights_move_and_the_average_follows(whole, models):
    trained, average = (stored_weights.load_params(whole, 4, ema=ema) for ema in (False, True))
    start = folder.load(models / "pipeline" / "transformer")[2]
    start, kernel, mean = (np.asarray(tree["double_blocks"]["img_mod"]["kernel"]) for tree in (start, trained, average))
    assert 0 < np.abs(mean - start).max() < np.abs(kernel - start).max() < 4.1e-3  # four updates of 1e-3


# --- going on ---------------------------------------------------------------------------------------------------------


def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(whole, recipe, tmp_path):
    workdir = tmp_path / "run"
    changes = dict(optim__ema_decay=0.5, sample__every=2)
    train.train(recipe(steps=2, **changes), workdir)
    # What a crash after the checkpoint of step 2 leaves: lines of later steps, and half a checkpoint.
    with open(workdir / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "loss": 99.0}\n{"step": 4, "lo')
    (workdir / "checkpoints" / "3.orbax-checkpoint-tmp").mkdir()
    (workdir / "checkpoints" / "4" / "params").mkdir(parents=True)
    assert checkpoint.steps(workdir) == [2]
    train.train(recipe(steps=4, **changes), workdir)
    assert checkpoint.steps(workdir) == [2, 4]
    expected, run = arrays(whole, 4)
    found, other_run = arrays(workdir, 4)
    assert_same((expected, run), (found, other_run))
    assert numbers(workdir) == numbers(whole)
    for name in ("000002.png", "000004.png"):
        assert (workdir / "samples" / name).read_bytes() == (whole / "samples" / name).read_bytes()


def test_a_run_resumed_between_the_updates_of_a_rollout(recipe, tmp_path):
    """Updates 1 and 2 share a rollout, and so do 3 and 4: it goes on after update 1 and ends after 3."""
    config = recipe(steps=3, rollout__reuse=2, checkpoint__every=1)
    train.train(config, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    for later in (2, 3):
        shutil.rmtree(tmp_path / "resumed" / "checkpoints" / f"{later}")
    train.train(config, tmp_path / "resumed")
    assert_same(arrays(tmp_path / "whole", 3), arrays(tmp_path / "resumed", 3))
    assert numbers(tmp_path / "whole") == numbers(tmp_path / "resumed")
    first, second, third = (arrays(tmp_path / "resumed", step)[0] for step in (1, 2, 3))
    for name in [name for name in first if name.startswith("rollout")]:
        np.testing.assert_array_equal(first[name], second[name])
        assert (first[name] != third[name]).all()
    assert any(name.startswith("rollout") for name in first)


def test_a_run_in_few_bits_goes_on_bit_for_bit(recipe, tmp_path):
    """The random bits of the rounding are those of the update, whoever makes it."""
    config = recipe(
        steps=3, checkpoint__every=1, model__dtype="bfloat16", optim__weights="bfloat16", optim__moments="float8",
        optim__ema_decay=0.5, method="direct_align",
    )  # fmt: skip
    train.train(config, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    for later in (2, 3):
        shutil.rmtree(tmp_path / "resumed" / "checkpoints" / f"{later}")
    train.train(config, tmp_path / "resumed")
    assert_same(arrays(tmp_path / "whole", 3), arrays(tmp_path / "resumed", 3))
    assert numbers(tmp_path / "whole") == numbers(tmp_path / "resumed")
    first, third = (arrays(tmp_path / "whole", step)[0] for step in (1, 3))
    dtypes = {kind: {str(a.dtype) for name, a in first.items() if name.startswith(kind)} for kind in ("params", "ema")}
    assert dtypes == {"params": {"bfloat16"}, "ema": {"float32"}}
    moved = [(first[name] != third[name]).any() for name in first if name.startswith("params")]
    assert np.mean(moved) > 0.9, "some scales near 1 may not have taken a step yet"


def test_moments_in_the_hosts_memory_are_the_same(whole, recipe, tmp_path, monkeypatch):
    """A run that goes on with them there ends where the one does that kept them on the device."""
    monkeypatch.setattr(optim, "LARGEST", 1000)  # stacks go layer by layer
    train.train(recipe(steps=2, optim__ema_decay=0.5, sample__every=2), tmp_path / "run")
    offloaded = recipe(steps=4, optim__ema_decay=0.5, sample__every=2, optim__offload=True)
    kinds = program.build(offloaded, sharding.make_mesh(offloaded.mesh), architectures.read(offloaded)).state
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(kinds.opt_state.mean)} == {"pinned_host"}
    train.train(offloaded, tmp_path / "run")
    assert_same(arrays(whole, 4), arrays(tmp_path / "run", 4), configs=False)


def test_a_finished_run_has_nothing_to_do(whole, recipe, capsys):
    before = (whole / "metrics.jsonl").read_bytes()
    assert train.train(recipe(steps=4, optim__ema_decay=0.5, sample__every=2), whole) is None
    assert "nothing to do" in capsys.readouterr().out
    assert (whole / "metrics.jsonl").read_bytes() == before


def test_another_config_is_refused_by_its_keys(whole, recipe):
    changed = recipe(steps=5, optim__ema_decay=0.5, sample__every=2, optim__b1=0.5, reward__positive=("Real",))
    message = r"optim\.b1 is 0\.9 there, 0\.5 here; reward\.positive is \['Real', 'Detail'\] there, \['Real'\] here"
    with pytest.raises(UserError, match=message):
        train.train(changed, whole)


def test_a_terminated_run_saves_and_goes_on(whole, recipe, models, tmp_path):
    workdir = tmp_path / "run"
    changes = dict(steps=4, optim__ema_decay=0.5, sample__every=2, compilation_cache=recipe().compilation_cache)
    child = jobs.stop_after_three(models, workdir, changes)
    assert child.returncode == 128 + signal.SIGTERM, child.stderr
    assert "SIGTERM: this update is finished (" in child.stderr
    assert re.search(r"^stopped after update 3, \d+\.\d s after the signal; ", child.stderr, re.M)
    assert checkpoint.steps(workdir) == [2, 3]
    train.train(recipe(**changes), workdir)
    assert_same(arrays(whole, 4), arrays(workdir, 4))
    assert numbers(workdir) == numbers(whole)


# --- what stops a run -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__prompts": "none.txt"}, "none.txt cannot be read"),
        ({"model__path": "nothing"}, "nothing/transformer is not a folder"),
        ({"reward__models__clip__path": "nothing"}, "nothing is not a folder"),
        ({"optim__accumulation": 3}, "optim.accumulation=3"),
        ({"mesh__fsdp": 3}, "mesh: data=1, fsdp=3, tensor=1 needs 3 devices, here are 1"),
        ({"data__height": 40}, "data.height=40"),
    ],
)
def test_bad_input_leaves_no_workdir(recipe, tmp_path, changes, message):
    with pytest.raises(UserError, match=message) as error:
        train.train(recipe(**changes), tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_all_paths_that_lead_nowhere_are_named_at_once(recipe, tmp_path):
    changes = {"model__path": "nothing", "data__prompts": "none.txt", "sample__prompts": "data/*.csv"}
    with pytest.raises(UserError, match="^not there: config.model.path=nothing, config.data.prompts=none.txt$"):
        train.train(recipe(sample__every=1, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_column_of_the_held_out_prompts(recipe, tmp_path):
    (tmp_path / "p.csv").write_text("en,de\nred apple,roter Apfel\n")
    changes = {"sample__every": 1, "sample__prompts": str(tmp_path / "p.csv")}
    with pytest.raises(UserError, match="name the column of the prompts by .*; there are 'en', 'de'"):
        train.train(recipe(**changes), tmp_path / "run")
    with pytest.raises(UserError, match="no column 'fr'; there are 'en', 'de'"):
        train.train(recipe(sample__column="fr", **changes), tmp_path / "run")


def test_a_reward_in_the_place_of_the_transformer(recipe, models, tmp_path):
    broken = tmp_path / "pipeline"
    broken.mkdir()
    for part in (models / "pipeline").iterdir():
        (broken / part.name).symlink_to(models / "clip" if part.name == "transformer" else part)
    with pytest.raises(UserError, match="transformer holds a clip network; expected the transformer of FLUX.1"):
        train.train(recipe(model__path=str(broken)), tmp_path / "run")


def test_encoders_of_another_width(recipe, models, tmp_path):
    broken = tmp_path / "pipeline"
    broken.mkdir()
    for part in (models / "pipeline").iterdir():
        (broken / part.name).symlink_to(part)
    (broken / "text_encoder").unlink()
    _, old = folder.read_config(models / "pipeline" / "text_encoder")
    tiny.save_random(broken / "text_encoder", "clip_text", dataclasses.replace(old, hidden_size=32), 0)
    with pytest.raises(UserError, match="text_encoder has width 32; the transformer beside it expects 16"):
        train.train(recipe(model__path=str(broken)), tmp_path / "run")


# --- every key is read ------------------------------------------------------------------------------------------------


class Recording(ConfigDict):
    """A config that notes which keys are read, apart from being checked, copied or written down."""

    def note_reads(self, seen, prefix=""):
        object.__setattr__(self, "_seen", seen)
        object.__setattr__(self, "_prefix", prefix)
        for key, value in self._fields.items():
            if isinstance(value, ConfigDict):
                child = Recording(value)
                child.note_reads(seen, f"{prefix}{key}.")
                self._fields[key] = child
        return self

    def __getitem__(self, key):
        if "_seen" in self.__dict__:
            self._seen.add(self._prefix + key)
        return super().__getitem__(key)


def test_every_key_is_read(recipe, tmp_path, monkeypatch):
    """A key that the program checks and writes down but never uses would be a promise that it breaks."""
    every = dict(
        steps=2, sample__every=2, sample__count=1, optim__ema_decay=0.5, optim__warmup_steps=2, optim__accumulation=2,
        reward__models__hps__weight=0.5, reward__models__pickscore__weight=0.5, lora__rank=2, evaluate__every=2,
        evaluate__count=1, evaluate__steps=2, checkpoint__best="hps:max",
    )  # fmt: skip
    plain = recipe(**every)
    plain.reward.models.hps.path = plain.reward.models.pickscore.path = plain.reward.models.clip.path
    keys, seen = set(config.flatten(plain)), set()
    recorded = Recording(plain).note_reads(seen)
    for module, name in ((config, "flatten"), (config, "to_json"), (validation, "validate")):
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda c, f=function: f(plain if isinstance(c, Recording) else c))
    train.train(recorded, tmp_path / "run")
    assert len(keys & seen) > 50 and "data.path" not in seen, "what is not read must not count as read"
    # What another source of data reads.
    data = tmp_path / "data"
    mesh, options = sharding.make_mesh(plain.mesh), dict(text_length=plain.data.text_length, dtype=plain.model.dtype)
    encode.encode_prompts(plain.model.path, tiny.PROMPTS, data, mesh=mesh, **options)
    recorded.data.encode, recorded.data.path = "stored", str(data)
    assert len(loading.open_examples(recorded, architectures.read(recorded))) == len(tiny.PROMPTS)
    # Weights & Biases, which may not be installed.
    recorded.wandb.project = "ours"
    monkeypatch.setitem(sys.modules, "wandb", mock.MagicMock(Error=OSError))
    wandb_board.open_board(recorded, tmp_path / "run").close()
    # Where no factors are trained, but the transformer itself.
    recorded.lora.rank = 0
    assert program.computes(recorded, mesh).transformer.param_dtype == plain.optim.weights
    assert not keys - seen
