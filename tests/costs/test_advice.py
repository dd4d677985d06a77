"""Advice: the keys that it names, and when."""

import dataclasses
import re

import jax
import pytest
from helpers import plans

from srpo_jax import config as config_lib
from srpo_jax.costs import advice, topologies


@pytest.fixture
def candidate(tmp_path):
    return plans.candidate(tmp_path)


@pytest.fixture
def report(candidate):
    return plans.report(candidate)


def test_advice_names_keys_that_exist(candidate, report):
    """Every key that advice can name is one of the config, and not set to what it is."""
    candidate.config.model.attention = "cudnn"
    for network in ("transformer", "autoencoder", "reward"):
        candidate.config.remat[network] = "dots"
    candidate.config.optim.merge_terms, candidate.config.optim.ema_decay = True, 0.5
    assert advice.advise(candidate, report) == []
    report["fits"], report["memory"]["headroom"] = False, -1.0
    report["memory"]["arguments"]["optimizer"] = 2 * 2**30
    lines = advice.advise(candidate, report)
    flat = config_lib.flatten(config_lib.default())
    named = [found for line in lines for found in re.findall(r"config\.([\w.]+)", line)]
    assert len(named) == 11 and {name.rstrip(".") for name in named} <= set(flat)


def test_a_candidate_that_just_fits(candidate, report):
    assert len(advice.advise(candidate, report)) == 1
    candidate.config.model.dtype = "float32"  # which cuDNN's attention does not take
    assert advice.advise(candidate, report) == []
    report["memory"]["headroom"] = 0.4 * 2**30
    assert any(line.startswith("little room") for line in advice.advise(candidate, report))


def test_room_for_what_blocks_keep(candidate, report):
    candidate.config.remat.transformer = "full"
    assert "--config.remat.transformer=out+attention+qkv+mlp: keep" in advice.advise(candidate, report)[-1]
    report["memory"]["headroom"] = 2**30
    assert not any("remat" in line for line in advice.advise(candidate, report))


def test_a_run_that_waits_for_others(candidate, report):
    report["seconds"]["bound"] = "interconnect"
    assert "config.rollout.gather=True" in advice.advise(candidate, report)[-2]
    assert "smaller config.optim.accumulation" in advice.advise(candidate, report)[-1]
    candidate.config.optim.accumulation = 1
    assert "accumulation" not in advice.advise(candidate, report)[-1]
    report["memory"]["headroom"] = advice.rollout_bytes(candidate.built)  # and nothing beside it
    assert not any("gather" in line for line in advice.advise(candidate, report))


def test_bytes_of_weights_as_rollouts_use_them(candidate):
    """Kernels of the blocks, but for modulations, in a byte with 8-bit rollouts; the rest as before."""
    built = candidate.built
    whole = advice.rollout_bytes(built)
    params = jax.tree_util.tree_leaves_with_path(built.state.params)
    eight = [leaf for path, leaf in params if path[-1].key == "kernel" and path[0].key.endswith("_blocks")
             and not path[-2].key.endswith("mod")]  # fmt: skip
    assert 0 < sum(leaf.size for leaf in eight) < sum(leaf.size for _, leaf in params)
    itemsize = jax.numpy.dtype(built.computes.transformer.dtype).itemsize
    settings = dataclasses.replace(built.settings, rollout_dtype="int8")
    less = whole - advice.rollout_bytes(dataclasses.replace(built, settings=settings))
    scales = 4 * sum(leaf.size // leaf.shape[1] for leaf in eight)
    assert less == (itemsize - 1) * sum(leaf.size for leaf in eight) - scales


def test_a_gpu_that_jax_would_not_fill(candidate, report):
    report["memory"]["needed"] = 0.8 * report["memory"]["capacity"]
    assert any("XLA_PYTHON_CLIENT_MEM_FRACTION" in line for line in advice.advise(candidate, report))


def test_several_slices(candidate, report):
    """What goes between slices stays the axis data; what they lack, they lack each."""
    target = topologies.parse("v5e:4x4*2")
    candidate = candidate._replace(target=target, built=dataclasses.replace(candidate.built, mesh=Slices()))
    report["fits"], report["devices"] = False, 32
    report["memory"] |= {"needed": 20 * 2**30, "capacity": 15 * 2**30, "headroom": -5 * 2**30}
    lines = advice.advise(candidate, report)
    assert "more devices along config.mesh.fsdp: at least 32 of this kind in each slice" in lines
    assert not any("mesh.data" in line for line in lines)
    Slices.shape["data"] = 4
    assert any(line.startswith("--config.mesh.data=2 ") for line in advice.advise(candidate, report))


class Slices:
    shape = {"data": 2, "fsdp": 16, "tensor": 1}
