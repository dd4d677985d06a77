"""The devices' figures by name."""

import pytest

from srpo_jax.costs import hardware, topologies


@pytest.mark.parametrize(
    "kind, memory, bandwidth, flops",
    [
        ("NVIDIA A100-PCIE-40GB", 40, 1555, 312),
        ("NVIDIA A100-SXM4-40GB", 40, 1555, 312),
        ("NVIDIA A100 80GB PCIe", 80, 1935, 312),
        ("NVIDIA A100-SXM4-80GB", 80, 2039, 312),
        ("NVIDIA H100 PCIe", 80, 2000, 756),
        ("NVIDIA H100 NVL", 94, 3900, 835),
        ("NVIDIA H100 80GB HBM3", 80, 3352, 989),
        ("NVIDIA H200", 141, 4800, 989),
        ("NVIDIA H200 NVL", 141, 4800, 835),
        ("NVIDIA H20", 96, 4000, 148),
        ("NVIDIA GH200 480GB", 96, 4000, 989),
        ("NVIDIA GH200 144G HBM3e", 144, 4900, 989),
        ("NVIDIA L40S", 48, 864, 362),
        ("NVIDIA B200", 180, 7700, 2250),
    ],
)
def test_gpus(kind, memory, bandwidth, flops):
    """As their data sheets have them: GB, GB/s, TFLOP/s."""
    chip = hardware.find(kind)
    assert (chip.memory, chip.bandwidth, chip.flops) == (memory * 1e9, bandwidth * 1e9, flops * 1e12)


def test_tpus():
    assert hardware.find("TPU v5 lite").name == "TPU v5e" and hardware.find("TPU v5p").name == "TPU v5p"
    assert hardware.find("TPU v5").name == "TPU v5p" and hardware.find("TPU v6 lite").flops == 918e12


@pytest.mark.parametrize(
    "kind",
    [
        "Tesla K80", "NVIDIA A100-SXM-64GB", "NVIDIA A100-SXM4-80GB MIG 3g.40gb", "NVIDIA H100", "NVIDIA H20-3e",
        "NVIDIA H100 64GB HBM2", "NVIDIA GH200", "NVIDIA L40", "TPU v4 lite", "TPU v7", "",
    ],
)  # fmt: skip
def test_variants_that_are_not_known_have_no_figures(kind):
    assert hardware.find(kind) is None


def test_names():
    """Two devices of one short name have the same figures, and everything that is planned for has some."""
    named = {}
    for chip in hardware.CHIPS.values():
        assert named.setdefault(chip.name, chip) == chip
    kinds = [tpu.kind for tpu in topologies.TPUS.values()] + [gpu.kind for gpu in topologies.GPUS.values()]
    assert all(kind in hardware.CHIPS for kind in kinds)


def test_a_measured_peak():
    assert hardware.measured_flops(64, runs=1) > 0
