"""Evaluation while a tiny run trains: what it leaves, the best checkpoint, patience, interruption, going on."""

import importlib.util
import json
import os
import signal

import numpy as np
import pytest
from helpers.runs import arrays, assert_same, scalars
from safetensors.numpy import load_file

from srpo_jax import checkpoint, convert, evaluate, generate, stored_weights, train, validation
from srpo_jax.errors import UserError
from srpo_jax.evaluation import drift, history, in_training
from srpo_jax.evaluation.in_training import Evaluator

WANDB = importlib.util.find_spec("wandb") is not None


@pytest.fixture(scope="module")
def asked(recipe, models):
    """A function from changes to a recipe that evaluates at every update, two pictures of three prompts."""

    def make(**changes):
        scores = (f"held=sgp_hps:{models / 'hps'}", f"look=diversity:{models / 'hps'}")
        plain = {
            "steps": 4, "evaluate__every": 1, "evaluate__prompts": str(models / "held_out.txt"), "evaluate__steps": 2,
            "evaluate__images": 2, "evaluate__scores": scores, "checkpoint__best": "clip:min", "checkpoint__keep": 1,
            "checkpoint__every": 4, "checkpoint__resumable": 1, "wandb__project": "ours" if WANDB else "",
            "wandb__mode": "offline",
        }  # fmt: skip
        return recipe(**{**plain, **changes})

    return make


@pytest.fixture(scope="module")
def whole(asked, tmp_path_factory):
    """The workdir of an uninterrupted run of four updates."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    assert train.train(asked(), workdir) is None
    return workdir


def figures(workdir):
    """The history without its clock."""
    return [(e.step, e.how, e.scores, e.signals, e.warnings, e.best) for e in history.read(workdir)]


def boards(workdir):
    """The files of the one run of Weights & Biases that a workdir has, one a start of training."""
    identity = json.loads((workdir / "wandb.json").read_text())["id"]
    return [file.read_bytes() for file in (workdir / "wandb").glob(f"offline-run-*/run-{identity}.wandb")]


def test_a_run_leaves_its_evaluations(whole):
    entries = history.read(whole)
    assert [entry.step for entry in entries] == [0, 1, 2, 3, 4]
    texts = history.prompts(whole)
    assert texts == [text for text in ("black dog", "white bird", "tall tower") for _ in range(2)]
    plotted = scalars(whole / "tensorboard")
    for entry in entries:
        assert list(entry.scores) == ["clip", "held", "held_win", "held_sigmoid", "look"]
        folder = history.picture(whole, entry.step, 0).parent
        assert sorted(path.name for path in folder.glob("*.png")) == [f"{n:04d}.png" for n in range(6)]
        kept = json.loads((folder / "scores.json").read_text())
        for name, figure in entry.scores.items():
            assert figure.mean == pytest.approx(np.mean(kept["scores"][name]), abs=1e-6) and figure.n == 6
            assert figure.low <= figure.mean <= figure.high
            assert plotted[f"evaluate/{name}", entry.step] == pytest.approx(figure.mean, abs=1e-6)
        for name, values in kept["signals"].items():
            assert entry.signals[name] == pytest.approx(np.mean(values), rel=1e-6)
        assert {"draw", "score", "save pictures", "statistics"} <= entry.seconds.keys()
    assert list(entries[0].seconds)[0] == "compile" and "compile" not in entries[1].seconds
    moved = [entry.signals["drift"] for entry in entries]
    assert 1 < entries[0].signals["look_vendi"] <= 6
    assert moved[0] == pytest.approx(0, abs=1e-9) and 0 < moved[1] < moved[2]


def test_the_best_checkpoint_stays_beside_the_newest(whole):
    means = [entry.scores["clip"].mean for entry in history.read(whole)]
    best = int(np.argmin(means))
    assert best == 1, "the tests below need one that is neither the base nor the last"
    assert [entry.best for entry in history.read(whole)] == [int(np.argmin(means[: n + 1])) for n in range(5)]
    assert checkpoint.steps(whole) == [best, 4]
    assert [checkpoint.resumable(whole / "checkpoints" / str(step)) for step in (best, 4)] == [False, True]


def test_the_commands_take_the_best(whole, models, model, tmp_path):
    """And evaluate says the same of it: the same pictures, the same scores."""
    size = ["--height=32", "--width=48", "--steps=2", "--text-length=8"]
    out = tmp_path / "out"
    evaluate.main([
        f"--out={out}", f"--prompts={models / 'held_out.txt'}", f"--model=m={model}", f"--checkpoint=c={whole}",
        "--step=best", f"--score=clip:{models / 'clip'}", "--images=2", "--batch=2", *size,
    ])  # fmt: skip
    rows = {row["model"]: row for row in json.loads((out / "summary.json").read_text())["rows"]}
    entries = history.read(whole)
    for label, entry in (("m", entries[0]), ("c", entries[1])):
        ours = entry.scores["clip"]
        # A reward of a run reads pictures by its own program, whose sums are rounded in another order.
        assert rows[label]["mean"] == pytest.approx(ours.mean, abs=2e-3)
        assert rows[label]["mean_low"] == pytest.approx(ours.low, abs=2e-3)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["models"]["c"]["update"] == 1
    # The run's own is of the first two pictures, which are one prompt's; this one is of the first of two prompts.
    assert summary["drift"] == {"c": pytest.approx(entries[1].signals["drift"], rel=0.5)}
    generate.main([f"--model={model}", "--prompt=red apple", f"--out={tmp_path / 'g'}", f"--checkpoint={whole}",
                   "--step=best", *size])  # fmt: skip
    assert len(list((tmp_path / "g").iterdir())) == 1
    convert.main(["export", f"--source={model}", f"--target={tmp_path / 'e'}", f"--checkpoint={whole}", "--step=best",
                  "--format=diffusers", "--dtype=float32"])  # fmt: skip
    exported = load_file(tmp_path / "e" / "transformer" / "diffusion_pytorch_model.safetensors")
    expected = np.asarray(stored_weights.load_params(whole, 1)["img_in"]["bias"])
    np.testing.assert_array_equal(exported["x_embedder.bias"], expected)


def test_a_run_stopped_while_it_evaluates_goes_on_as_if_nothing_was(whole, asked, tmp_path, monkeypatch):
    workdir, judge = tmp_path / "run", Evaluator._judge

    def interrupted(self, *args):
        if len(self.entries) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        judge(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "_judge", interrupted)
        assert train.train(asked(), workdir) == signal.SIGTERM
    assert checkpoint.steps(workdir) == [1, 2] and [entry.step for entry in history.read(workdir)] == [0, 1]
    # What a crash after the evaluation of update 3, and before its checkpoint, leaves.
    history.write(workdir, [*history.read(workdir), history.read(whole)[3]])
    train.train(asked(), workdir)
    assert figures(workdir) == figures(whole)
    assert_same(arrays(whole, 4), arrays(workdir, 4))
    assert checkpoint.steps(workdir) == checkpoint.steps(whole)
    assert not WANDB or len(boards(workdir)) == 2
    for step in range(5):
        for number in range(6):
            file = history.picture(workdir, step, number)
            assert file.read_bytes() == history.picture(whole, step, number).read_bytes()


def test_patience_ends_a_run(asked, tmp_path, monkeypatch, capsys):
    planned = {0: 0.1, 1: 0.3, 2: 0.2, 3: 0.2, 4: 0.4}
    monkeypatch.setattr(
        in_training.stopping, "best", lambda entries, aim: max(entries, key=lambda e: planned[e.step]).step
    )
    few = {"evaluate__scores": (), "evaluate__images": 1, "checkpoint__best": "clip:max", "wandb__project": ""}
    assert train.train(asked(evaluate__patience=2, **few), tmp_path / "run") is None
    entries = history.read(tmp_path / "run")
    assert [entry.best for entry in entries] == [0, 1, 1, 1]
    assert "2 evaluations without a better clip than that of update 1" in entries[-1].warnings[0]
    assert checkpoint.steps(tmp_path / "run") == [1, 3]
    assert "over-optimisation of that will not be noticed" in capsys.readouterr().err
    train.train(asked(evaluate__patience=2, **few), tmp_path / "run")
    assert "ended with update 3, by evaluate.patience=2; nothing to do" in capsys.readouterr().out


def test_numbers_on_weights_and_biases(whole):
    """In the files that `wandb sync` sends: nothing is asked of a network."""
    if not WANDB:
        pytest.skip("wandb is not installed: pip install '.[wandb]'")
    (content,) = boards(whole)
    for name in (b"evaluate/clip", b"evaluate/signals/drift", b"grad_norm", b"images_per_second"):
        assert name in content


def test_velocities_drift_from_those_of_the_base(whole):
    found = np.load(whole / "evaluations" / "base.npz")
    states, velocities = found["states"], found["velocities"]
    assert states.shape == velocities.shape == (2, drift.STEPS, 6, 64)
    assert np.isfinite(velocities).all() and np.abs(states[:, 0] - states[:, -1]).mean() > 0.1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"evaluate__every": 0}, "checkpoint.best='clip:min': is by evaluations; set evaluate.every too"),
        ({"checkpoint__best": "clip"}, "checkpoint.best='clip': write NAME:max or NAME:min"),
        ({"checkpoint__best": "", "evaluate__patience": 2}, "patience=2: waits for a better score; say which"),
        ({"evaluate__scores": ("taste:x",)}, "evaluate.scores: 'taste:x': 'taste' is no kind of score; choose one of"),
        ({"evaluate__images": 0}, "evaluate.images=0: must be at least 1"),
        ({"wandb__mode": "maybe"}, "wandb.mode='maybe': choose one of online, offline"),
        ({"checkpoint__best": "other:max"}, "there is no such score; choose one of clip, held, held_win, held_sigmoid"),
        ({"evaluate__images": 1}, "diversity compares the pictures of a prompt; draw 2 or more"),
        ({"evaluate__scores": ("hps:nothing",)}, "nothing is not a folder"),
        ({"evaluate__scores": ("clip:{models}/clip",)}, "'clip' is the name of a reward of this run"),
        ({"evaluate__prompts": "none.txt"}, "none.txt"),
    ],
)
def test_bad_input_leaves_no_workdir(asked, models, tmp_path, changes, message):
    scores = changes.get("evaluate__scores", ())
    changes |= {"evaluate__scores": tuple(text.format(models=models) for text in scores)} if scores else {}
    with pytest.raises(UserError, match=message) as error:
        config = asked(**changes)
        validation.validate(config)
        train.train(config, tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()
