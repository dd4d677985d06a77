"""The methods from the outside: recipes, what a sample costs, and what a configuration may not ask of them."""

import pathlib
import re
import runpy

import numpy as np
import pytest

from srpo_jax import architectures, validation
from srpo_jax import config as config_lib
from srpo_jax.algorithm import methods
from srpo_jax.algorithm.settings import Settings
from srpo_jax.costs import work
from srpo_jax.errors import UserError
from srpo_jax.families.flux import FLUX

RECIPES = pathlib.Path(__file__).parents[1] / "configs"
# (rollout's steps, passes with a gradient, gradients of decoder and rewards) of a sample, 25 steps, released constants.
COSTS = {
    "srpo": (25, 2, 2), "refl": (19, 1, 1), "draft_lv": (25, 3, 3), "drtune": (20.5, 3, 1), "leapalign": (25, 2, 1),
    "flowbp_sparse": (25, 3, 1), "flowbp_bridge": (25, 5, 1), "flowbp_lagrange": (25, 4, 1), "draft_k": (25, 1, 1),
}  # fmt: skip


def recipe(method):
    name = "hps" if method == "srpo" else method
    return runpy.run_path(str(RECIPES / f"flux_dev_{name}.py"))["get_config"]()


@pytest.mark.parametrize("method", list(COSTS))
def test_recipes(method):
    """Every recipe is whole but for its paths, and asks of a sample what the papers' tables say."""
    config = recipe(method)
    validation.validate(config, paths=False)
    assert config.method == method and config.reward.models.hps.weight == 1
    settings = Settings.from_config(config, FLUX)
    assert methods.cost(settings) == COSTS[method]
    assert settings.shift == pytest.approx({"srpo": 3.0, "leapalign": 2.224}.get(method, 1.878), abs=1e-3)


def test_what_all_recipes_of_the_relatives_share():
    differ = set()
    flat = {method: config_lib.flatten(recipe(method)) for method in COSTS if method not in ("srpo", "draft_k")}
    for one in flat.values():
        differ |= {key for key, value in one.items() if value != flat["refl"][key]}
    assert differ <= {
        "method", "data.batch_size", "data.height", "data.width", "align.guidance", "rollout.guidance",
        "sample.guidance", "refl.late_steps",
    }  # fmt: skip


def test_the_transformer_runs_as_often_as_a_method_says():
    """In forward passes: a gradient with recomputed blocks is four."""
    config = config_lib.default()
    architecture = architectures.published(config, "flux-dev")
    once = architecture.family.forward(architecture.transformer, *work.tokens(config, architecture.family)).total
    srpo = work.sample(config, architecture)
    for method, (steps, passes, pictures) in COSTS.items():
        config.method, config.refl.late_steps = method, 11
        parts = work.sample(config, architecture)
        assert parts["rollout"].model == pytest.approx(steps * once, rel=1e-3)
        assert parts["transformer"].model == pytest.approx(3 * passes * once, rel=2e-3)
        assert parts["transformer"].hardware == pytest.approx(4 * passes * once, rel=2e-2)
        for part in ("autoencoder", "reward"):
            assert parts[part].model == pytest.approx(srpo[part].model * pictures / 2)


def test_a_cut_rollout_with_a_cache():
    config = config_lib.default()
    config.method, config.refl.late_steps, config.rollout.cache = "refl", 11, 5
    assert work.rollout_steps(config, FLUX) == pytest.approx((19 / 5, 19 * 4 / 5))


def test_shift_by_size():
    config = config_lib.default()
    config.rollout.shift = 0.0
    validation.validate(config, paths=False)
    for size, shift in ((512, 1.878), (720, 2.224), (1024, 3.158)):
        config.data.height = config.data.width = size
        assert Settings.from_config(config, FLUX).shift == pytest.approx(shift, abs=1e-3)
    config.data.height = config.data.width = 720
    np.testing.assert_allclose(
        Settings.from_config(config, FLUX).grid.sigmas[[0, -1]],
        [2.224 * 0.9 / (1 + 1.224 * 0.9), 2.224 * 0.5 / (1 + 1.224 * 0.5)],
        atol=1e-3,
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rollout.draws": "each"}, "rollout.draws='each': choose one of shared, per_sample"),
        ({"rollout.shift": -1.0}, "rollout.shift=-1.0: must not be negative"),
        ({"reward.target": "other"}, "reward.target='other': choose one of caption, relative"),
        ({"leapalign.tau": 0.0}, "leapalign.tau=0.0: must be greater than 0"),
        ({"draft_k.last_steps": -1}, "draft_k.last_steps=-1: must not be negative"),
        ({"method": "draft_k", "draft_k.last_steps": 26}, "draft_k.last_steps=26: must not exceed rollout.steps=25"),
        ({"method": "drtune", "drtune.passes": 17}, "drtune.passes=17: must not exceed 16"),
        ({"method": "drtune", "drtune.late_steps": 26}, "drtune.late_steps=26: must not exceed rollout.steps=25"),
        ({"method": "flowbp_sparse", "flowbp_sparse.passes": 26}, "flowbp_sparse.passes=26: must not exceed"),
        ({"method": "flowbp_bridge", "flowbp_bridge.passes": 1}, "flowbp_bridge.passes=1: must be at least 2"),
        ({"method": "flowbp_lagrange", "flowbp_lagrange.anchor": 1.5}, "flowbp_lagrange.anchor=1.5: must be from 0"),
        ({"method": "flowbp_lagrange", "flowbp_lagrange.concentration": (1.0, 2.0)}, "must be three numbers greater"),
        ({"method": "flowbp_lagrange", "rollout.steps": 2}, "rollout.steps=2: must be at least 3"),
        ({"method": "leapalign", "rollout.steps": 1}, "rollout.steps=1: must be at least 2"),
        ({"method": "leapalign", "rollout.solver": "ab2"}, "rollout.solver='ab2': method=leapalign follows the steps"),
        ({"method": "leapalign", "optim.merge_terms": True}, "optim.merge_terms=True: the passes of method=leapalign"),
        ({"method": "leapalign", "rollout.reuse": 2}, "rollout.reuse=2: method=leapalign needs a rollout at every"),
        ({"method": "leapalign", "data.images": "stored"}, "method='leapalign': takes states of a rollout"),
    ],
)  # fmt: skip
def test_what_methods_do_not_take(changes, message):
    config = config_lib.default()
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=re.escape(message)) as error:
        validation.validate(config, paths=False)
    assert "\n" not in str(error.value)
