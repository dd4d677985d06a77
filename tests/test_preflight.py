"""Preflight's command line, its arithmetic on a real compiled update, its advice; and, where libtpu is, a TPU."""

import copy
import dataclasses
import json
import re
import types

import jax
import pytest
from helpers import tiny

from srpo_jax import architectures, errors, preflight, program, sharding
from srpo_jax.costs import flops, roofline, topologies
from srpo_jax.models import clip
from srpo_jax.models.t5 import T5Config

TOWERS = clip.ClipConfig(
    clip.ClipTextConfig(50, 32, 32, 1, 4, 16, "gelu", 49), clip.ClipVisionConfig(32, 32, 1, 4, 32, 16, "gelu"), 16
)
TEXT = architectures.TextArchitecture(
    clip.ClipTextConfig(50, 16, 32, 2, 2, 8, "quick_gelu", 49), T5Config(60, 32, 8, 48, 2, 4)
)
SIZES = program.Architecture(tiny.FLUX, tiny.VAE, {"clip": TOWERS}), TEXT
RECIPE = "--config=configs/flux_dev_hps.py"


@pytest.fixture
def case(tmp_path):
    """A tiny update on this machine's CPU, which stands in for an H100."""
    config = tiny.config(tmp_path, data__batch_size=4, optim__accumulation=2)
    built = program.build(config, sharding.make_mesh(config.mesh, jax.devices()[:1]), SIZES[0])
    return preflight.Case(config, *SIZES, topologies.parse("h100:1"), built)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    return preflight.check(case.__wrapped__(tmp_path_factory.mktemp("models")))


@pytest.fixture
def report(compiled):
    return copy.deepcopy(compiled)


def test_check_on_a_compiled_update(case, report):
    report = json.loads(json.dumps(report))
    memory = report["memory"]
    arguments = sum(memory["arguments"].values())
    # The program takes all but the autoencoder's encoder.
    encoder = roofline.shard_bytes(case.built.frozen.autoencoder["encoder"])
    assert memory["compiler_arguments"] == arguments - encoder
    weights = 4 * flops.parameters(tiny.FLUX)
    assert memory["arguments"]["weights"] == weights and 0 <= memory["arguments"]["optimizer"] - 2 * weights < 16
    assert memory["planned"] >= arguments + memory["temporaries"] > arguments
    encoders = sum(
        leaf.size * leaf.dtype.itemsize
        for network, sizes in (("clip_text", TEXT.clip), ("t5", TEXT.t5))
        for leaf in jax.tree.leaves(preflight.folder.abstract(network, sizes, case.built.computes.text)[1])
    )
    assert memory["text_encoders"] == encoders > 0
    assert memory["headroom"] == 80e9 - memory["planned"] - encoders
    assert report["fits"] and report["collectives"] == {} and report["loops_of_unknown_length"] == []
    work = flops.update(case.config, SIZES[0])
    assert report["hardware_flops"] == {name: part.hardware for name, part in work.items()}
    assert report["seconds"]["best"] == pytest.approx(
        sum(part.hardware for name, part in work.items() if name != "optimizer") / 989e12
        + roofline.optimizer_traffic(case.built.state.params, case.built.state.opt_state) / 3352e9
        + roofline.attention_traffic(case.config, tiny.FLUX) / 3352e9
    )
    text = preflight.describe(case, report)
    assert "1 x H100 SXM" in text and text.count("\n  fits\n") == 1
    assert "--config.model.attention=cudnn" in report["advice"][0]
    row = preflight.table([report]).splitlines()[-1]
    assert row.startswith("| h100:1 | ") and row.endswith(" fits |")


def test_a_program_that_does_not_fit(case, monkeypatch):
    """What libtpu says is read, and becomes advice."""
    message = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 39.95G of 15.75G hbm. Exceeded by 24.2G."

    def fail(built):
        raise jax.errors.JaxRuntimeError(message)

    monkeypatch.setattr(program.Program, "lower", fail)
    case = case._replace(target=topologies.parse("v5e:1x1"))
    case.config.optim.ema_decay = 0.9
    report = preflight.check(case)
    assert not report["fits"] and not report["compiled"]
    assert report["memory"]["planned"] == pytest.approx(39.95 * 2**30)
    assert report["memory"]["headroom"] == pytest.approx(15.75 * 2**30 - report["memory"]["needed"])
    keys = [re.match(r"--config\.([\w.]+)=|more devices", line)[0] for line in report["advice"]]
    assert keys == [
        "--config.model.attention=", "--config.remat.transformer=", "--config.remat.autoencoder=",
        "--config.remat.reward=", "--config.optim.accumulation=",
        "--config.data.encode=", "--config.optim.weights=", "--config.optim.ema_decay=", "more devices",
        "--config.lora.rank=",
    ]  # fmt: skip
    assert report["advice"][-2].endswith("at least 4 of this kind") and "=4: one sample" in report["advice"][4]
    assert "does not fit; try" in preflight.describe(case, report)
    other = "the total memory required for HLO temporaries (768.00G) exceeds available HBM (30.75G)."
    message = f"RESOURCE_EXHAUSTED: Ran out of memory on HBM, {other}"
    report = preflight.check(case)
    expected = 768 * 2**30 + sum(report["memory"]["arguments"].values())
    assert report["memory"]["planned"] == pytest.approx(expected)
    monkeypatch.setattr(program.Program, "lower", lambda built: cudnn_is_missing())
    with pytest.raises(errors.UserError, match=r"v5e:1x1: cuDNN not found. pip install -e '.\[preflight"):
        preflight.check(case)
    monkeypatch.setattr(program.Program, "lower", fail)
    message = "INTERNAL: something else"
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        preflight.check(case)


def cudnn_is_missing():
    raise RuntimeError("cuDNN not found.")


def test_advice_names_keys_that_exist(case, report):
    """Every key that advice can name is one of the config, and not set to what it is."""
    case.config.model.attention = "cudnn"
    for network in ("transformer", "autoencoder", "reward"):
        case.config.remat[network] = "dots"
    case.config.optim.merge_terms, case.config.optim.ema_decay = True, 0.5
    assert preflight.advise(case, report) == []
    report["fits"], report["memory"]["headroom"] = False, -1.0
    report["memory"]["arguments"]["optimizer"] = 2 * 2**30
    lines = preflight.advise(case, report)
    flat = preflight.config_lib.flatten(preflight.config_lib.default())
    named = [found for line in lines for found in re.findall(r"config\.([\w.]+)", line)]
    assert len(named) == 11 and {name.rstrip(".") for name in named} <= set(flat)


def test_a_case_that_just_fits(case, report):
    assert len(preflight.advise(case, report)) == 1
    report["memory"]["headroom"] = 0.4 * 2**30
    assert any(line.startswith("little room") for line in preflight.advise(case, report))


def test_a_run_that_waits_for_others(case, report):
    report["seconds"]["bound"] = "interconnect"
    assert "config.rollout.gather=True" in preflight.advise(case, report)[-2]
    assert "smaller config.optim.accumulation" in preflight.advise(case, report)[-1]
    case.config.optim.accumulation = 1
    assert "accumulation" not in preflight.advise(case, report)[-1]
    report["memory"]["headroom"] = preflight.rollout_bytes(case.built)  # and nothing beside it
    assert not any("gather" in line for line in preflight.advise(case, report))


def test_bytes_of_weights_as_rollouts_use_them(case):
    """Kernels of the blocks, but for modulations, in a byte with 8-bit rollouts; the rest as before."""
    built = case.built
    whole = preflight.rollout_bytes(built)
    params = jax.tree_util.tree_leaves_with_path(built.state.params)
    eight = [leaf for path, leaf in params if path[-1].key == "kernel" and path[0].key.endswith("_blocks")
             and not path[-2].key.endswith("mod")]  # fmt: skip
    assert 0 < sum(leaf.size for leaf in eight) < sum(leaf.size for _, leaf in params)
    itemsize = jax.numpy.dtype(built.computes.transformer.dtype).itemsize
    settings = dataclasses.replace(built.settings, rollout_dtype="int8")
    less = whole - preflight.rollout_bytes(dataclasses.replace(built, settings=settings))
    scales = 4 * sum(leaf.size // leaf.shape[1] for leaf in eight)
    assert less == (itemsize - 1) * sum(leaf.size for leaf in eight) - scales


def test_no_host_of_gpus_that_are_not_there():
    config = preflight.config_lib.default()
    config.optim.offload = True
    with pytest.raises(errors.UserError, match="h100:1: GPUs that are not there have no host"):
        preflight.prepare(config, None, topologies.parse("h100:1"))


def test_a_gpu_that_jax_would_not_fill(case, report):
    report["memory"]["needed"] = 0.8 * report["memory"]["capacity"]
    assert any("XLA_PYTHON_CLIENT_MEM_FRACTION" in line for line in preflight.advise(case, report))


@pytest.mark.parametrize("name", list(topologies.GPUS))
def test_target_config(name):
    """Every GPU has figures, and its text names them in fields of the proto."""
    target = topologies.parse(f"{name}:1")
    text = topologies.target_config(topologies.GPUS[name])
    fields = dict(re.findall(r"(\w+): (\S+)", text))
    assert int(fields["device_memory_size"]) == target.chip.memory
    assert int(fields["memory_bandwidth"]) == target.chip.bandwidth
    # Units x 2 FLOPs x clock is the data sheet's float32 peak: 19.5, 51, 67, 82.6 TFLOP/s.
    peak = 2 * int(fields["core_count"]) * int(fields["fpus_per_core"]) * float(fields["clock_rate_ghz"]) / 1e3
    sheet = {"a100": 19.5, "a100-40gb": 19.5, "h100-pcie": 51.2, "rtx4090": 82.6}
    assert peak == pytest.approx(sheet.get(name, 66.9), rel=0.01)


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "--topology is missing"),
        (["--topology=v9:2x2"], "known are TPU slices"),
        (["--topology=v5e:2x2x2"], "a v5e slice has 2 axes, as v5e:2x2"),
        (["--topology=v5p:2x0x2"], "a v5p slice has 3 axes"),
        (["--topology=h100:12"], "give a number of GPUs up to 8"),
        (["--topology=h100:8", "--size=720"], "--size=720: write HEIGHTxWIDTH"),
        (["--topology=h100:8", "--size=720x700"], "config.data.width=700: must be a positive multiple of 16"),
        (["--topology=h100:8", "--depth=3"], "--depth=3: give two numbers"),
        (["--topology=h100:8", "--config.rollout.stepz=3"], "do you mean config.rollout.steps"),
        (["--topology=h100:8", "now"], "'now' is not understood"),
    ],
)
def test_what_is_refused(words, message):
    with pytest.raises(errors.UserError, match=message):
        preflight.parse([RECIPE, *words])


@pytest.mark.parametrize("topology, remedy", [("v5e:2x2", ".[preflight-tpu]"), ("h100:8", ".[preflight-cuda]")])
def test_a_missing_compiler(monkeypatch, topology, remedy):
    monkeypatch.setattr(topologies.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(errors.UserError) as caught:
        preflight.parse([RECIPE, f"--topology={topology}"])
    assert f"pip install -e '{remedy}'" in str(caught.value)


def test_what_cannot_be_built(monkeypatch):
    """A batch that the devices do not divide is refused before anything is compiled."""
    monkeypatch.setattr(topologies, "devices", lambda target: jax.devices()[:1] * target.count)
    monkeypatch.setattr(sharding, "make_mesh", lambda sizes, devices: FakeMesh(len(devices)))
    with pytest.raises(errors.UserError, match="h100:8x8 takes 64 samples at a time, which do not divide"):
        preflight.parse([RECIPE, "--topology=h100:8x8", "--device-batch=1"])


class FakeMesh:
    def __init__(self, count):
        self.shape = {"data": 1, "fsdp": count, "tensor": 1}


def test_the_command(monkeypatch, capsys, tmp_path, case, report):
    monkeypatch.setattr(topologies, "prepare", lambda: None)
    with pytest.raises(SystemExit, match="0"):
        preflight.main(["--help"])
    shown = capsys.readouterr().out
    assert preflight.__doc__.strip() in shown and "--device-batch" in shown
    out = tmp_path / "new" / "fits.json"
    monkeypatch.setattr(preflight, "parse", lambda arguments: ([case, case], types.SimpleNamespace(json=out)))
    monkeypatch.setattr(preflight, "check", lambda case: report)
    preflight.main()
    assert [report["fits"] for report in json.loads(out.read_text())] == [True, True]
    assert capsys.readouterr().out.count("\n| h100:1 |") == 2
    report["fits"] = False
    with pytest.raises(SystemExit) as caught:
        preflight.main()
    assert caught.value.code == 2


@pytest.mark.parametrize("name", ["v5e:2x2", "h100:2"])
def test_ahead_of_time(name, tmp_path):
    """The tiny update, compiled for a machine that is not there."""
    target = topologies.parse(name)
    if not topologies.installed(target.platform):
        pytest.skip(f"the compiler is missing: {topologies.INSTALL[target.platform]}")
    topologies.prepare()
    config = tiny.config(tmp_path, data__batch_size=8)
    case = preflight.prepare(config, SIZES, target, device_batch=1)
    assert case.config.optim.accumulation == 8 // target.count and config.optim.accumulation == 1
    report = preflight.check(case)
    assert report["fits"] and report["loops_of_unknown_length"] == []
    assert report["memory"]["arguments"]["weights"] < 4 * flops.parameters(tiny.FLUX)
    # Weights are gathered for every block of every step, and gradients summed.
    assert report["collectives"]["all-gather"]["runs"] > config.rollout.steps * tiny.FLUX.num_single_layers
    assert report["seconds"]["interconnect"]
