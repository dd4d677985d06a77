"""What ``remat.transformer=auto`` stands for: bytes by hand, and what a little or much room leads to."""

import jax
import numpy as np
import pytest
from helpers import plans, tiny

from srpo_jax import config as config_lib
from srpo_jax import program, sharding, validation
from srpo_jax.costs import keeping, plan
from srpo_jax.costs.hardware import GIB
from srpo_jax.errors import UserError

TOKENS, WIDTH, BLOCKS, HEADS = 6 + 8, 64, 1 + 2, 4  # of tiny.FLUX


def on_an_accelerator(monkeypatch) -> None:
    """ "auto" stands for what it does on one."""

    def remat_of(config, part, mesh):
        return "full" if config.remat[part] == "auto" else config.remat[part]

    monkeypatch.setattr(program, "remat_of", remat_of)


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
    on_an_accelerator(monkeypatch)
    candidate, report = plan.settle(plans.candidate(tmp_path, remat__transformer="auto"))
    assert checked == [
        ("auto", "full"), *[(name, name) for name in ("out+attention+qkv", "out+attention", "out")],
    ]  # fmt: skip
    assert candidate.config.remat.transformer == "out" and report["fits"]


def test_a_plan_without_room_is_checked_once(tmp_path, monkeypatch):
    checked = []

    def check(candidate):
        checked.append(candidate.config.remat.transformer)
        return {"fits": False, "memory": {"headroom": 0}, "config": {"remat.transformer": "auto"}}

    monkeypatch.setattr(plan, "check", check)
    on_an_accelerator(monkeypatch)
    candidate, report = plan.settle(plans.candidate(tmp_path, remat__transformer="auto"))
    assert checked == ["auto"] and candidate.config.remat.transformer == "full"
    assert report["config"]["remat.transformer"] == "full" and not report["fits"]


def test_a_run_settles_it(tmp_path, monkeypatch):
    """By the memory that its devices say they have; a CPU says none."""
    config = tiny.config(tmp_path, remat__transformer="auto")
    mesh = sharding.make_mesh(config.mesh)
    built, settled = keeping.build(config, mesh, plans.ARCHITECTURE)
    assert settled.remat.transformer == built.computes.transformer.remat == "none"
    assert config.remat.transformer == "auto"
    config.remat.transformer, config.remat.reward = "dots", "auto"
    built, settled = keeping.build(config, mesh, plans.ARCHITECTURE)
    assert settled.remat.transformer == built.computes.transformer.remat == "dots"
    assert settled.remat.reward == built.computes.reward.remat == "none"


@pytest.mark.parametrize(
    "encode, more, grows, remat",
    [
        ("stored", 0, 0, "full"),
        ("stored", 1e9, 0, "out+attention+qkv+mlp"),
        ("stored", 5e6, 0, "out"),  # 3.7 MB
        ("stored", 9e6, 0, "out+attention"),  # 3 MB more
        ("stored", 9e6, 4e6, "out"),
        ("stored", 9e6, 1e7, "full"),
        ("online", 9e6, 0, "full"),
        ("online", 2.5e7, 0, "out+attention"),
    ],
)
def test_a_run_keeps_what_its_devices_have_room_for(encode, more, grows, remat, tmp_path, monkeypatch):
    """On devices that say how much memory they have: ``more`` bytes than the update and 16 MB of text encoders with
    online prompts take. What was chosen is planned again, with ``grows`` bytes a kept name more than it should."""
    on_an_accelerator(monkeypatch)
    config = tiny.config(tmp_path, remat__transformer="auto", data__batch_size=256, model__dtype="float32")
    config.data.encode = encode
    mesh, taken = sharding.make_mesh(config.mesh), 10**8

    class Uncompiled:
        def __init__(self, built):
            self.remat = built.computes.transformer.remat

        def compile(self):
            return self

    def planned(compiled, arguments):
        assert arguments > 0
        names = () if compiled.remat == "full" else compiled.remat.split("+")
        sizes = keeping.sizes(config, plans.ARCHITECTURE, mesh)
        return taken + sum(sizes[name] for name in names) + int(grows) * len(names)

    text = jax.ShapeDtypeStruct((4 * 10**6,), np.float32, sharding=sharding.replicated(mesh))
    monkeypatch.setattr(keeping, "MARGIN", 0.0)
    monkeypatch.setattr(keeping, "planned", planned)
    monkeypatch.setattr(keeping, "encoders", lambda *_: {"text": text})
    monkeypatch.setattr(keeping, "_memory", lambda mesh: taken + int(more))
    monkeypatch.setattr(program.Program, "lower", lambda built: Uncompiled(built))
    built, settled = keeping.build(config, mesh, plans.ARCHITECTURE)
    assert settled.remat.transformer == built.computes.transformer.remat == remat


def test_names_that_are_refused():
    config = config_lib.default()
    for good in ("auto", "out", "attention+out", "none"):
        config.remat.transformer = good
        validation.validate(config, paths=False)
    for wrong in ("out+", "out+out", "heads", "out,attention"):
        config.remat.transformer = wrong
        with pytest.raises(UserError, match=r"choose one of none, dots, full, auto, or names of out, attention"):
            validation.validate(config, paths=False)
    config.remat.transformer, config.remat.reward = "full", "out"
    with pytest.raises(UserError, match=r"config\.remat\.reward='out'"):
        validation.validate(config, paths=False)
