"""What ``remat.transformer=auto`` stands for: bytes by hand, and what a little or much room leads to."""

import pytest
from helpers import plans, tiny

from srpo_jax import config as config_lib
from srpo_jax import sharding, validation
from srpo_jax.costs import keeping, plan
from srpo_jax.costs.hardware import GIB
from srpo_jax.errors import UserError

TOKENS, WIDTH, BLOCKS, HEADS = 6 + 8, 64, 1 + 2, 4  # of tiny.FLUX


def test_bytes_by_name(tmp_path):
    """Two samples at a time, in bfloat16; a double block has two products behind gates for each token, a single one."""
    candidate = plans.candidate(tmp_path)
    found = keeping.sizes(candidate.config, plans.ARCHITECTURE, candidate.built.mesh)
    each = 2 * 2 * BLOCKS * TOKENS * WIDTH
    sums = 2 * 2 * 2 * BLOCKS * TOKENS * HEADS
    assert found == {"out": each * 4 // 3, "attention": each + sums, "qkv": 3 * each, "mlp": 4 * each}
    assert list(found) == ["out", "attention", "qkv", "mlp"]
    candidate.config.optim.merge_terms = True
    assert keeping.sizes(candidate.config, plans.ARCHITECTURE, candidate.built.mesh)["mlp"] == 2 * 4 * each


@pytest.mark.parametrize(
    "room, remat",
    [
        (-GIB, "full"),
        (GIB, "full"),
        (GIB + 15000, "out"),
        (GIB + 28000, "out+attention"),
        (GIB + 90000, "out+attention+qkv"),
        (8 * GIB, "out+attention+qkv+mlp"),
    ],
)
def test_what_fits_is_kept(room, remat, tmp_path):
    candidate = plans.candidate(tmp_path)
    assert keeping.choose(candidate.config, plans.ARCHITECTURE, candidate.built.mesh, room) == remat


def test_a_plan_settles_it(tmp_path, monkeypatch):
    """It is checked with what was chosen; what then does not fit is given up, name by name."""
    checked = []

    def check(candidate):
        remat = candidate.built.computes.transformer.remat
        checked.append((candidate.config.remat.transformer, remat))
        return {"fits": remat in ("full", "out"), "memory": {"headroom": GIB + 90000}}

    monkeypatch.setattr(plan, "check", check)
    candidate, report = plan.settle(plans.candidate(tmp_path, remat__transformer="auto"))
    assert checked == [
        ("auto", "full"), *[(name, name) for name in ("out+attention+qkv", "out+attention", "out")],
    ]  # fmt: skip
    assert candidate.config.remat.transformer == "out" and report["fits"]


def test_a_run_settles_it(tmp_path, monkeypatch):
    """By the memory that its devices say they have; a CPU says none."""
    config = tiny.config(tmp_path, remat__transformer="auto")
    mesh = sharding.make_mesh(config.mesh)
    built, settled = keeping.build(config, mesh, plans.ARCHITECTURE)
    assert settled.remat.transformer == built.computes.transformer.remat == "none"
    assert config.remat.transformer == "auto"
    config.remat.transformer = "dots"
    assert keeping.build(config, mesh, plans.ARCHITECTURE)[1] is config


def test_names_that_are_refused():
    config = config_lib.default()
    for good in ("auto", "out", "attention+out", "none"):
        config.remat.transformer = good
        validation.validate(config, paths=False)
    for wrong in ("out+", "out+out", "heads", "out,attention"):
        config.remat.transformer = wrong
        with pytest.raises(UserError, match=r"choose one of none, dots, full, auto, or names of out, attention"):
            validation.validate(config, paths=False)
    config.remat.transformer, config.remat.reward = "full", "auto"
    with pytest.raises(UserError, match=r"config\.remat\.reward='auto'"):
        validation.validate(config, paths=False)
