"""Planning: the arithmetic on a real compiled update, what is refused; and, where libtpu is, slices of TPUs."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import plans, tiny

from srpo_jax import config as config_lib
from srpo_jax import errors, program, sharding
from srpo_jax.costs import advice, plan, topologies
from srpo_jax.models import attention

# Of tiny.FLUX (width 64, heads of 16): two streams of a double block with 74,720 each, two single blocks with 62,176,
# embedders of time and guidance with 20,608, of the pooled text with 5,248, img_in 4,160, txt_in 2,112, the final
# modulation 8,320 and layer 4,160.
PARAMETERS = 2 * 74_720 + 2 * 62_176 + 2 * 20_608 + 5_248 + 4_160 + 2_112 + 8_320 + 4_160
# Of its forward pass on 6 + 8 tokens: 12 widths squared a token in each of three blocks, their attention, modulations
# 18 widths squared, three vectors' second layers and the final ones, and the inputs' layers.
FORWARD = 3 * 12 * 2 * 64**2 * 14 + 3 * 4 * 14**2 * 64 + 18 * 2 * 64**2
FORWARD += (3 + 2) * 2 * 64**2 + 2 * 64 * 64 * 6 + 2 * 64 * (64 * 6 + 32 * 8 + 2 * 256 + 16)
# Of the two text encoders: tables, two blocks and a norm each.
CLIP_TEXT = (50 + 8) * 16 + 2 * (2 * 2 * 16 + 4 * (16 * 16 + 16) + 2 * 16 * 32 + 32 + 16) + 2 * 16
T5 = 60 * 32 + 32 * 4 + 2 * (2 * 32 + 4 * 32 * 32 + 3 * 32 * 48) + 32


def on_this_cpu(monkeypatch):
    """Targets have this machine's one device, whatever they are called."""
    monkeypatch.setattr(topologies, "devices", lambda target: jax.devices()[:1])


def test_check_on_a_compiled_update(monkeypatch, tmp_path):
    on_this_cpu(monkeypatch)
    config = tiny.config(tmp_path, data__batch_size=4, optim__accumulation=2)
    candidate = plan.prepare(config, plans.ARCHITECTURE, topologies.parse("h100:1"))
    report = json.loads(json.dumps(plan.check(candidate)))
    memory = report["memory"]
    assert memory["arguments"]["weights"] == 4 * PARAMETERS
    assert memory["arguments"]["optimizer"] == 8 * PARAMETERS + 4  # two moments, and a counter
    # Text, pooled text and three captions' ids of four samples, and the number of the update.
    assert memory["arguments"]["batch"] == 4 * 4 * (8 * 32 + 16 + 3 * 16) + 4
    assert memory["arguments"]["ema"] == memory["arguments"]["base"] == memory["host"] == 0
    assert memory["text_encoders"] == 4 * (CLIP_TEXT + T5)
    # The compiler's own figure: the program takes all but the autoencoder's encoder, which stays on the device.
    arguments = sum(memory["arguments"].values())
    encoder = sum(4 * leaf.size for leaf in jax.tree.leaves(candidate.built.frozen.autoencoder["encoder"]))
    assert memory["compiler_arguments"] == arguments - encoder
    assert memory["planned"] >= arguments + memory["temporaries"] > arguments
    assert memory["needed"] == memory["planned"] + memory["text_encoders"]
    assert memory["headroom"] == 80e9 - memory["needed"]
    assert report["fits"] and report["collectives"] == {} and report["loops_of_unknown_length"] == []
    assert report["model_flops"]["rollout"] == 4 * 2 * FORWARD
    assert report["model_flops"]["transformer"] == pytest.approx(4 * 2 * 3 * FORWARD, rel=0.02)
    assert report["hardware_flops"]["optimizer"] == 22 * PARAMETERS
    # At best: products at 989 TFLOP/s or what they read and write at 3,352 GB/s, then all else at that.
    products = sum(flops for name, flops in report["hardware_flops"].items() if name != "optimizer")
    moved = report["traffic"]
    # The optimiser alone reads and writes 32 bytes a weight.
    assert moved["between"] > 32 * PARAMETERS and moved["products"] > 4 * PARAMETERS
    seconds = [moved[name] / 3352e9 for name in ("products", "between")]
    assert report["seconds"]["best"] == pytest.approx(max(products / 989e12, seconds[0]) + seconds[1])
    assert report["seconds"]["expected"] == pytest.approx(max(products / 989e12 / 0.6, seconds[0]) + seconds[1])


def test_prompts_encoded_before(monkeypatch, tmp_path):
    """Sample grids need the text encoders too, but not beside the update; without grids nobody does."""
    on_this_cpu(monkeypatch)
    target = topologies.parse("h100:1")
    for every, found in ((10, {"text_encoder", "text_encoder_2"}), (0, set())):
        config = tiny.config(tmp_path, data__encode="stored", sample__every=every)
        candidate = plan.prepare(config, plans.ARCHITECTURE, target)
        assert set(candidate.encoders) == found
        assert plan._memory(candidate, None, ("planned", 5.0))["text_encoders"] == 0


def test_a_program_that_does_not_fit(tmp_path, monkeypatch):
    """What libtpu says is read, and becomes advice."""
    message = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 39.95G of 15.75G hbm. Exceeded by 24.2G."

    def fail(built):
        raise jax.errors.JaxRuntimeError(message)

    on_this_cpu(monkeypatch)
    monkeypatch.setattr(program.Program, "lower", fail)
    config = tiny.config(tmp_path, data__batch_size=4, optim__accumulation=2)
    candidate = plan.prepare(config, plans.ARCHITECTURE, topologies.parse("v5e:1x1"))
    candidate.config.optim.ema_decay = 0.9
    report = plan.check(candidate)
    assert not report["fits"] and not report["compiled"]
    assert report["memory"]["planned"] == pytest.approx(39.95 * 2**30)
    assert report["memory"]["headroom"] == pytest.approx((15.75 - 39.95) * 2**30 - 4 * (CLIP_TEXT + T5))
    lines = advice.advise(candidate, report)
    keys = [re.match(r"--config\.([\w.]+)=|more devices", line)[0] for line in lines]
    assert keys == [
        "--config.model.attention=", "--config.remat.transformer=", "--config.remat.autoencoder=",
        "--config.remat.reward=", "--config.optim.accumulation=",
        "--config.data.encode=", "--config.optim.weights=", "--config.optim.ema_decay=", "more devices",
        "--config.lora.rank=",
    ]  # fmt: skip
    assert lines[-2].endswith("at least 4 of this kind") and "=4: one sample" in lines[4]
    other = "the total memory required for HLO temporaries (768.00G) exceeds available HBM (30.75G)."
    message = f"RESOURCE_EXHAUSTED: Ran out of memory on HBM, {other}"
    memory = plan.check(candidate)["memory"]
    # Arguments are more than weights and moments, and little more.
    assert 12 * PARAMETERS < memory["planned"] - 768 * 2**30 < 13 * PARAMETERS + 10**6
    monkeypatch.setattr(program.Program, "lower", lambda built: cudnn_is_missing())
    with pytest.raises(errors.UserError, match=r"v5e:1x1: cuDNN not found. pip install -e '.\[preflight"):
        plan.check(candidate)
    monkeypatch.setattr(program.Program, "lower", fail)
    message = "INTERNAL: something else"
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        plan.check(candidate)


def cudnn_is_missing():
    raise RuntimeError("cuDNN not found.")


def test_no_host_of_gpus_that_are_not_there():
    config = config_lib.default()
    config.optim.offload = True
    with pytest.raises(errors.UserError, match="h100:1: GPUs that are not there have no host"):
        plan.prepare(config, None, topologies.parse("h100:1"))


def test_text_encoders_that_the_mesh_does_not_fit(monkeypatch, tmp_path):
    """They are refused as the run would refuse them, before anything is compiled."""
    on_this_cpu(monkeypatch)

    def refuse(mesh, network, params):
        if network == "t5":
            raise errors.UserError("config.mesh.fsdp=3 does not divide the dimension 32 of t5.token_embedding")
        return place(mesh, network, params)

    place = sharding.of_tree
    monkeypatch.setattr(sharding, "of_tree", refuse)
    with pytest.raises(errors.UserError, match="t5.token_embedding"):
        plan.prepare(tiny.config(tmp_path), plans.ARCHITECTURE, topologies.parse("h100:1"))


def test_what_cannot_be_built(monkeypatch):
    """A batch that the devices do not divide is refused before anything is compiled."""
    monkeypatch.setattr(topologies, "devices", lambda target: jax.devices()[:1] * target.count)
    monkeypatch.setattr(sharding, "make_mesh", lambda sizes, devices: FakeMesh(len(devices)))
    with pytest.raises(errors.UserError, match="h100:8x8 takes 64 samples at a time, which do not divide"):
        plan.prepare(config_lib.default(), None, topologies.parse("h100:8x8"), device_batch=1)


class FakeMesh:
    def __init__(self, count):
        self.shape = {"data": 1, "fsdp": count, "tensor": 1}
        self.devices = np.array(jax.devices() * count)


@pytest.mark.parametrize("name", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_attention_of_several_samples_compiles(name, monkeypatch):
    """Forward and backward of two samples of FLUX's heads on one chip, with every block that lengths may choose: with
    one sample, kernels that are too large for the chip's vector memory compile too."""
    target = topologies.parse(name)
    if not topologies.installed(target.platform):
        pytest.skip(f"the compiler is missing: {topologies.INSTALL[target.platform]}")
    topologies.prepare()
    where = jax.sharding.SingleDeviceSharding(topologies.devices(target)[0])

    def total(query, key, value):
        return attention.attention(query, key, value, backend="splash").astype(jnp.float32).sum()

    for block, keys in attention.SPLASH_BLOCKS:
        monkeypatch.setattr(attention, "splash_blocks", lambda length: (length, block, keys))  # noqa: B023
        array = jax.ShapeDtypeStruct((2, 3 * block, 24, 128), jnp.bfloat16, sharding=where)
        jax.jit(jax.grad(total, (0, 1, 2))).lower(array, array, array).compile()


@pytest.mark.parametrize("name, data", [("v5e:2x2", 1), ("v5e:2x2*2", 2), ("h100:2", 1)])
def test_ahead_of_time(name, data, tmp_path):
    """The tiny update, compiled for a machine that is not there."""
    target = topologies.parse(name)
    if not topologies.installed(target.platform):
        pytest.skip(f"the compiler is missing: {topologies.INSTALL[target.platform]}")
    topologies.prepare()
    config = tiny.config(tmp_path, data__batch_size=8, mesh__data=data)
    candidate = plan.prepare(config, plans.ARCHITECTURE, target, device_batch=1)
    assert candidate.config.optim.accumulation == 8 // target.count and config.optim.accumulation == 1
    report = plan.check(candidate)
    assert report["fits"] and report["loops_of_unknown_length"] == []
    assert report["memory"]["arguments"]["weights"] < 4 * PARAMETERS
    # Weights are gathered for every block of every step, and gradients summed.
    assert report["collectives"]["all-gather"]["runs"] > config.rollout.steps * tiny.FLUX.num_single_layers
    assert report["seconds"]["interconnect"]
