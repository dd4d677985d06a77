"""The loop of the small world's trainers: where it goes on, what it tells, what it refuses to save."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from srpo_jax.emoji import train_autoencoder, train_clip, train_flow, training
from srpo_jax.errors import UserError

TRANSFORMATION = optax.adam(0.1)


def loss(params, target, key):
    value = jnp.mean(jnp.square(params["w"] - target + 0.1 * jax.random.normal(key, params["w"].shape)))
    return value, {"loss": value}


@functools.partial(jax.jit, donate_argnums=0)
def update(state, target, key):
    params, opt_state, values = training.descend(loss, TRANSFORMATION, state["params"], state["opt_state"], target, key)
    return {"params": params, "opt_state": opt_state}, values


def fresh(size=3):
    params = {"w": jnp.arange(1.0, size + 1)}
    return {"params": params, "opt_state": TRANSFORMATION.init(params)}


def inputs(step):
    return float(step), training.step_key(7, step)


def saved(folder):
    return sorted(int(path.name) for path in folder.iterdir())


def test_broken_off_run_goes_on_where_it_was(tmp_path, capsys):
    start, seen = fresh(), []

    def recorded(step):
        seen.append(step)
        if step == breaks_at:
            raise KeyboardInterrupt
        return inputs(step)

    breaks_at = None
    whole = training.fit("toy", tmp_path / "whole", start, update, recorded, 7, every=3, keep=2)
    assert seen == [*range(7)] and saved(tmp_path / "whole") == [6, 7]
    assert "resumed" not in capsys.readouterr().out

    seen, breaks_at = [], 5
    with pytest.raises(KeyboardInterrupt):
        training.fit("toy", tmp_path / "broken", start, update, recorded, 7, every=3)
    seen, breaks_at = [], None
    resumed = training.fit("toy", tmp_path / "broken", start, update, recorded, 7, every=3)
    assert seen == [3, 4, 5, 6] and saved(tmp_path / "broken") == [7]
    assert "toy: resumed at step 3\n" in capsys.readouterr().out
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)
    np.testing.assert_array_equal(start["params"]["w"], [1, 2, 3])  # the caller's, although updates donate theirs
    assert np.abs(whole["params"]["w"] - start["params"]["w"]).min() > 0.1


def test_figures_are_made_before_the_checkpoint_that_ends_the_run(tmp_path):
    """A run that is broken off while it draws or exports does so again."""
    shown = []

    def show(state):
        shown.append(state["params"]["w"].tolist())
        if len(shown) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        training.fit("toy", tmp_path, fresh(), update, inputs, 4, every=3, show=show)
    final = training.fit("toy", tmp_path, fresh(), update, inputs, 4, every=3, show=show)
    assert len(shown) == 3 and shown[1] == shown[2] == final["params"]["w"].tolist()
    training.fit("toy", tmp_path, fresh(), update, inputs, 4, every=3, show=show)
    assert len(shown) == 3


def count(state, step):
    """Not an update but a value that is known: the step's own number."""
    return state, {"loss": jnp.float32(step)}


def test_lines_tell_means_since_the_last_one(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(training, "REPORT_EVERY", 2)
    training.fit("toy", tmp_path, fresh(), count, lambda step: (step,), 5)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("; ")[0] for line in lines] == [
        "toy 2/5: loss 0.5000",
        "toy 4/5: loss 2.5000",
        "toy 5/5: loss 4.0000",
    ]
    assert lines[-1].endswith(" steps/s, 0.0 min left")


def test_time_between_checkpoints(tmp_path):
    for minutes, expected in ((60, [3]), (0, [1, 2, 3])):
        folder = tmp_path / str(minutes)
        training.fit("toy", folder, fresh(), count, lambda step: (step,), 3, minutes=minutes, keep=9)
        assert saved(folder) == expected


def test_what_is_not_finite_is_neither_shown_nor_saved(tmp_path):
    shown = []

    def poisoned(step):
        target, key = inputs(step)
        return (np.nan if step == 3 else target), key

    with pytest.raises(UserError, match=f"toy: loss not finite at step 4; lower the learning rate .* in {tmp_path}"):
        training.fit("toy", tmp_path, fresh(), update, poisoned, 9, every=2, show=shown.append)
    assert saved(tmp_path) == [2] and len(shown) == 1


def test_checkpoint_of_another_network_is_refused(tmp_path):
    training.fit("toy", tmp_path, fresh(), update, inputs, 1)
    for other in (fresh(4), {"params": fresh()["params"]}):
        with pytest.raises(UserError, match=f"{tmp_path / '1'} is a checkpoint of another network; .* --workdir"):
            training.fit("toy", tmp_path, other, update, inputs, 2)
    assert saved(tmp_path) == [1]


def test_rates_of_the_optimiser():
    """A gradient that stays as it is moves Adam's weights by the rate at every step."""
    transformation = training.clipped_adamw(0.1, 2, 5, optax.linear_schedule(0.1, 0.0, 4), eps=0.0, weight_decay=0.0)
    params, rates = {"w": jnp.float32(0.0)}, []
    state = transformation.init(params)
    for _ in range(10):
        changes, state = transformation.update({"w": jnp.float32(3.0)}, state, params)
        rates.append(-float(changes["w"]))
    np.testing.assert_allclose(rates, [0, 0.05, 0.1, 0.1, 0.1, 0.1, 0.075, 0.05, 0.025, 0], atol=1e-6)
    [first_moment] = jax.tree.leaves(optax.tree_utils.tree_get(state, "mu"))
    assert float(first_moment) == pytest.approx(1 - 0.9**10)  # of a gradient that was cut to a norm of 1


@pytest.mark.parametrize(
    "main, flags",
    [
        (train_autoencoder.main, []),
        (train_flow.main, ["--vae=vae"]),
        (train_clip.main, ["--role=judge"]),
    ],
)
def test_no_trainer_takes_no_steps(main, flags, tmp_path):
    with pytest.raises(UserError, match="--steps=0"):
        main([f"--workdir={tmp_path / 'run'}", *flags, "--steps=0"])
    assert not list(tmp_path.iterdir())
