"""Updates that are not finite: they change nothing, are counted and kept, and what was not finite first is named."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from helpers import tiny, updates
from helpers.bits import same
from helpers.runs import arrays, assert_same, numbers

from srpo_jax import checkpoint, conditions, errands, main, metrics, nonfinite, optim, storage, train
from srpo_jax.algorithm import step
from srpo_jax.config import default
from srpo_jax.data.loading import Examples
from srpo_jax.errors import UserError
from srpo_jax.models.compute import Compute
from srpo_jax.weights import engine, folder


def assert_same_bits(found, wanted):
    assert jax.tree.all(jax.tree.map(same, found, wanted))


# --- the update -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("moments", ["float32", "bfloat16", "float8"])
@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
def test_an_update_that_is_not_good_changes_no_bit(monkeypatch, moments, weights):
    monkeypatch.setattr(optim, "LARGEST", 1000)  # the stack goes layer by layer
    settings = default().optim
    settings.moments, settings.learning_rate = moments, 1e-2
    optimizer, rng = optim.make_optimizer(settings), np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(4, 8, 256)), weights), "b": jnp.asarray(rng.normal(size=3), weights)}
    grads = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), params)
    apply = jax.jit(optimizer.apply)
    params, state = apply(params, grads, optimizer.init(params), jax.random.key(0), optax.tree.norm(grads))
    broken = jax.tree.map(lambda g: g.at[0].set(jnp.nan), grads)
    for bad, norm in ((broken, jnp.nan), (grads, optax.tree.norm(grads))):
        found = apply(params, bad, state, jax.random.key(1), norm, False)
        assert_same_bits(found, (params, state))
    moved, after = apply(params, grads, state, jax.random.key(1), optax.tree.norm(grads), True)
    assert (moved["w"] != params["w"]).any() and after.count == 2


@pytest.mark.parametrize(
    ("changes", "norm", "largest", "keeps"),
    [
        ({}, 1.0, 1.0, True),
        ({}, 3e38, 1e30, True),  # clipped
        ({"learning_rate": 1e38}, 1.0, 1.0, False),
        ({"learning_rate": 1e30}, 1.0, 1e-3, True),
        ({}, 1.0, 3e38, False),
        ({}, 1.0, np.nan, False),
        ({"clip_norm": 1e30}, 1e20, 1.0, False),  # its square is infinite
        ({"clip_norm": 1e30}, 1e10, 1.0, True),
        ({"weight_decay": 1e30}, 1.0, 1e20, False),
    ],
)
def test_whether_numbers_stay_finite_is_known_before(changes, norm, largest, keeps):
    settings = default().optim
    for name, value in changes.items():
        settings[name] = value
    optimizer = optim.make_optimizer(settings)
    params = {"w": jnp.full(8, largest, jnp.float32)}
    state = optimizer.init(params)
    assert bool(optimizer.keeps_finite(state, jnp.float32(norm), jnp.float32(largest))) == keeps
    if keeps:  # and they do
        grads = {"w": jnp.zeros(8).at[0].set(norm)}
        after = optimizer.apply(params, grads, state, jax.random.key(0), jnp.float32(norm))
        assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(after))


def test_a_batch_with_one_nan_changes_nothing_but_the_number_of_the_update():
    settings = updates.settings(ema_decay=0.5)
    networks, params, frozen = updates.make_networks(Compute())
    batch, optimizer = updates.make_batch(), optim.make_optimizer(default().optim)
    ema = jax.tree.map(lambda p: p + 1.0, params)
    state = step.TrainState(jnp.int32(4), params, optimizer.init(params), ema)
    update = jax.jit(step.make_update(networks, settings, optimizer))
    good, told = update(state, frozen, batch, jax.random.key(0))
    assert told["skipped"] == 0 and told["largest_weight"] == max(jnp.abs(p).max() for p in jax.tree.leaves(params))
    assert all((a != b).any() for a, b in zip(jax.tree.leaves(good.ema), jax.tree.leaves(ema), strict=True))
    text = batch.condition["text"].at[1, 2, 3].set(jnp.nan)
    bad, told = update(state, frozen, batch._replace(condition=batch.condition | {"text": text}), jax.random.key(0))
    assert told["skipped"] == 1 and jnp.isnan(told["loss"])
    assert_same_bits(bad, state.replace(step=jnp.int32(5)))


# --- what is kept -----------------------------------------------------------------------------------------------------


def test_inputs_come_back_as_they_were(tmp_path):
    workdir = storage.path(tmp_path)
    text = np.arange(6).reshape(2, 3).astype(ml_dtypes.bfloat16)
    examples = Examples(["a cat", "Zürich"], {"text": text, "latents": np.ones((2, 1), np.float32)})
    for number in range(1, 15):
        nonfinite.keep(workdir, number, 7, examples)
    assert sorted(int(path.stem) for path in (tmp_path / "nonfinite").iterdir()) == list(range(5, 15)), "the newest ten"
    seed, found = nonfinite.read(workdir, 9)
    assert seed == 7 and found.prompts == examples.prompts
    for name, array in examples.arrays.items():
        assert found.arrays[name].dtype == array.dtype and found.arrays[name].tobytes() == array.tobytes()
    with pytest.raises(UserError, match=r"--replay=3: there is no .*3\.npz; there are 10\.npz, "):
        nonfinite.read(workdir, 3)
    (tmp_path / "nonfinite" / "9.npz").write_bytes(b"PK")
    with pytest.raises(UserError, match=r"--replay=9: .*9\.npz cannot be read"):
        nonfinite.read(workdir, 9)


def test_a_row_ends_with_a_good_update(tmp_path):
    row, examples = (
        nonfinite.Row(storage.path(tmp_path), 0, 2, errands.Errands(storage.path(tmp_path)), total=3),
        Examples(["a"], {}),
    )
    values = {"loss": np.nan, "grad_norm": 1.0, "skipped": 1.0}
    assert "update 5 is skipped: loss not finite; its inputs are kept in" in row.note(5, values, examples, "before 5")
    assert values == {"grad_norm": 1.0, "skipped": 4} and not row.is_over
    assert row.note(6, values := {"loss": 1.0, "skipped": 0.0}, examples, "before 6") == "" and values["skipped"] == 4
    for number in (7, 8):
        words = row.note(number, {"loss": 1.0, "skipped": 1.0}, examples, f"before {number}")
        assert "it would have left weights that are not finite" in words
    assert row.is_over and row.before == "before 7" and row.steps == [7, 8]


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory):
    """The workdir of a run of four updates that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    train.train(recipe(steps=4), workdir)
    return workdir


@pytest.fixture
def poison(monkeypatch):
    """A function that makes text features of some updates NaN; without any, of none."""
    made = conditions.Conditioner.batch

    def poison(*steps):
        def batch(self, examples, step):
            found = made(self, examples, step)
            if step not in steps:
                return found
            broken = jax.jit(lambda x: x * np.float32(np.nan))(found.condition["text"])
            return found._replace(condition=found.condition | {"text": broken})

        monkeypatch.setattr(conditions.Conditioner, "batch", batch)

    return poison


def test_one_bad_update_is_skipped_counted_and_can_be_seen_again(recipe, poison, tmp_path, capsys):
    poison(3)
    config = recipe(steps=4, checkpoint__every=1)
    assert train.train(config, tmp_path) is None
    assert "update 3 is skipped: grad_norm, loss, denoise/" in capsys.readouterr().err
    assert checkpoint.steps(tmp_path) == [1, 2, 4], "none is written within a row"
    assert [record["skipped"] for record in metrics.read(tmp_path)] == [0, 0, 1, 1]
    assert "loss" not in metrics.read(tmp_path)[2] and "loss" in metrics.read(tmp_path)[3]
    assert all(np.isfinite(array).all() for array in arrays(tmp_path, 4)[0].values())
    assert len(np.load(tmp_path / "nonfinite" / "3.npz")["prompts"]) == 2
    nonfinite.replay(config, tmp_path, 3)
    told = capsys.readouterr().out
    assert "update 3 again, with the weights of update 2" in told and "NOT FINITE  text features (text)" in told
    assert "finite      text features (pooled)" in told and "NOT FINITE  reward clip (denoise)" in told
    assert "NOT FINITE  gradient of double_blocks.0." in told and "weights" not in told.split("\n", 1)[1]
    poison()
    nonfinite.replay(config, tmp_path, 3)
    assert "NOT FINITE" not in capsys.readouterr().out


def test_a_row_ends_the_run_which_goes_on_from_the_last_good_moment(whole, recipe, poison, tmp_path):
    poison(3, 4)
    with pytest.raises(UserError) as error:
        train.train(recipe(steps=9, checkpoint__every=100, optim__patience=2), tmp_path)
    words = str(error.value)
    assert words.startswith(
        "update 3: 2 updates in a row were not finite and changed nothing; the first that was not: "
    )
    assert "text features (text). --replay=3 shows" in words and words.endswith("newest checkpoint is of update 2")
    assert checkpoint.steps(tmp_path) == [2], "of the moment before the row, though none was due"
    poison()
    train.train(recipe(steps=4), tmp_path)
    (ours, run), (others, other_run) = arrays(tmp_path, 4), arrays(whole, 4)
    assert run.pop("skipped") == 2 and other_run.pop("skipped") == 0
    assert_same((ours, run), (others, other_run))


def break_weight(models, target, part, name):
    """Copies the models; one weight of one of them becomes NaN."""
    shutil.copytree(models, target)
    network, config = folder.read_config(target / part)
    params = engine.flatten(jax.tree.map(np.array, folder.load(target / part)[2]))
    params[name].reshape(-1)[0] = np.nan
    folder.save(target / part, network, config, engine.unflatten(params, folder.abstract(network, config)[1]))
    return target


@pytest.mark.parametrize(
    ("part", "first", "network"),
    [
        ("pipeline/vae", "decoded image (denoise)", "autoencoder"),
        ("pipeline/text_encoder_2", "text features (text)", "text encoders"),
        ("clip", "reward clip (denoise)", "reward clip"),
        ("pipeline/transformer", "latents of the rollout", "transformer"),
    ],
)
def test_one_weight_that_is_no_number_is_found(models, compiled, tmp_path, part, first, network):
    wanted = {
        "autoencoder": "decoder",
        "text encoders": "blocks",
        "reward clip": "vision",
        "transformer": "single_blocks",
    }
    names = folder.shapes(*folder.read_config(models / part))
    name = next(name for name in sorted(names) if name.startswith(wanted[network]) and name.endswith("kernel"))
    broken = break_weight(models, tmp_path / "models", part, name)
    with pytest.raises(UserError) as error:
        train.train(tiny.config(broken, steps=4, optim__patience=2, compilation_cache=compiled), tmp_path / "run")
    words = str(error.value)
    assert f"the first that was not: {first}; weights that are not: " in words and f" of the {network}" in words
    assert "bring back a copy of these weights, or convert them again" in words and "learning rate" not in words
    assert words.endswith("the newest checkpoint is of update 0") and "\n" not in words
    assert checkpoint.steps(tmp_path / "run") == [], "weights that are no numbers are never saved"


def test_a_rate_that_breaks_weights_is_changed_on_purpose_and_back(whole, recipe, tmp_path):
    workdir = pathlib.Path(shutil.copytree(whole, tmp_path / "run"))
    shutil.rmtree(workdir / "checkpoints" / "4")
    wild = recipe(steps=4, optim__learning_rate=1e38, optim__patience=2)
    with pytest.raises(UserError, match=r"another config: optim\.learning_rate is 0\.001 there, .*--change=KEY"):
        train.train(wild, workdir)
    with pytest.raises(UserError, match=r"learning_rate=5e\+37 --change=optim.learning_rate; .* is of update 2"):
        train.train(wild, workdir, ("optim.learning_rate",))
    train.train(recipe(steps=4), workdir, ("optim",))
    assert_same(arrays(whole, 4), arrays(workdir, 4))
    assert numbers(whole) == numbers(workdir)
    lines = [json.loads(line) for line in (workdir / "changes.jsonl").read_text().splitlines()]
    assert [(line["key"], line["from"], line["to"], line["after_update"]) for line in lines] == [
        ("optim.learning_rate", 1e-3, 1e38, 2),
        ("optim.learning_rate", 1e38, 1e-3, 2),
        ("optim.patience", 2, 3, 2),  # of the group that was named
    ]


def test_the_flags(tmp_path):
    file = tmp_path / "recipe.py"
    file.write_text("from srpo_jax.config import default\nget_config = default\n")
    words = [f"--config={file}", "--workdir=w", "--change=optim.learning_rate", "--change=--config.align", "--replay=7"]
    found = main.parse(words)
    assert found.changes == ("optim.learning_rate", "align") and found.replay == 7
    with pytest.raises(UserError, match=r"config\.optim\.learning_rat is unknown; do you mean config\.optim\.learning"):
        main.parse([*words[:2], "--change=optim.learning_rat"])
