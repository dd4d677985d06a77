"""The peaks of devices: makers' figures by the name that JAX gives a device, and a measured one for a CPU."""

import time
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Chip(NamedTuple):
    """One device as JAX counts them (a TPU v4 or v5p chip is one device, a TPU7x chip two; dense figures,
    without sparsity).

    Attributes:
      name: short.
      flops: peak of bfloat16 matrix products with float32 sums, FLOP/s.
      memory: bytes.
      bandwidth: of that memory, bytes/s.
      link: bytes/s that one link to other devices carries each way. A TPU has one to each neighbour in its torus; a GPU
        is counted with one, to the switch between those of its host.
    """

    name: str
    flops: float
    memory: float
    bandwidth: float
    link: float


GIB, GB = 2.0**30, 1e9

# By ``jax.Device.device_kind``, which is the whole name of one variant: cards of one family differ in memory, speed and
# links. Figures: cloud.google.com/tpu/docs (system architecture pages; a TPU's link is the published sum of both
# directions by 2 and by its 6 links, or 4 of v5e and v6e) and NVIDIA's data sheets (half of NVLink's two directions, or
# of PCIe's where NVLink joins no more than a pair or four).
CHIPS: dict[str, Chip] = {
    "TPU v4": Chip("TPU v4", 275e12, 32 * GIB, 1228e9, 50e9),
    "TPU v5 lite": Chip("TPU v5e", 197e12, 16 * GIB, 819e9, 50e9),
    "TPU v5e": Chip("TPU v5e", 197e12, 16 * GIB, 819e9, 50e9),
    "TPU v5": Chip("TPU v5p", 459e12, 95 * GIB, 2765e9, 100e9),
    "TPU v5p": Chip("TPU v5p", 459e12, 95 * GIB, 2765e9, 100e9),
    "TPU v6 lite": Chip("TPU v6e", 918e12, 32 * GIB, 1640e9, 100e9),
    "TPU v6e": Chip("TPU v6e", 918e12, 32 * GIB, 1640e9, 100e9),
    "TPU7x": Chip("TPU7x core", 2307e12 / 2, 96 * GIB, 7380e9 / 2, 50e9),  # half of a chip, and of its links
    "NVIDIA A100-PCIE-40GB": Chip("A100 PCIe 40 GB", 312e12, 40 * GB, 1555e9, 32e9),
    "NVIDIA A100-SXM4-40GB": Chip("A100 40 GB", 312e12, 40 * GB, 1555e9, 300e9),
    "NVIDIA A100 80GB PCIe": Chip("A100 PCIe 80 GB", 312e12, 80 * GB, 1935e9, 32e9),
    "NVIDIA A100-SXM4-80GB": Chip("A100 80 GB", 312e12, 80 * GB, 2039e9, 300e9),
    "NVIDIA H100 PCIe": Chip("H100 PCIe", 756e12, 80 * GB, 2000e9, 64e9),
    "NVIDIA H100 NVL": Chip("H100 NVL", 835e12, 94 * GB, 3900e9, 64e9),
    "NVIDIA H100 80GB HBM3": Chip("H100 SXM", 989e12, 80 * GB, 3352e9, 450e9),
    "NVIDIA H200": Chip("H200", 989e12, 141 * GB, 4800e9, 450e9),
    "NVIDIA H200 NVL": Chip("H200 NVL", 835e12, 141 * GB, 4800e9, 64e9),
    "NVIDIA H20": Chip("H20", 148e12, 96 * GB, 4000e9, 450e9),
    "NVIDIA GH200 480GB": Chip("GH200 96 GB", 989e12, 96 * GB, 4000e9, 450e9),  # 480 GB are the processor's
    "NVIDIA GH200 144G HBM3e": Chip("GH200 144 GB", 989e12, 144 * GB, 4900e9, 450e9),
    "NVIDIA L40S": Chip("L40S", 362e12, 48 * GB, 864e9, 32e9),
    "NVIDIA GeForce RTX 4090": Chip("RTX 4090", 165e12, 24 * GB, 1008e9, 32e9),
    "NVIDIA B200": Chip("B200", 2250e12, 180 * GB, 7700e9, 900e9),
}


def find(kind: str) -> Chip | None:
    """The chip of a ``device_kind``. None for one that is not in the table, however near its name is to one that is:
    an A100 has 40 GB or 80, a slice of one (MIG) less, and a wrong peak is worse than none."""
    return CHIPS.get(kind)


def measured_flops(side: int = 1536, runs: int = 5) -> float:
    """The best float32 matrix product of the default device, FLOP/s: a CPU's peak, which no data sheet gives.

    It is of all cores that the process may use.
    """
    a = jax.random.normal(jax.random.key(0), (side, side))
    product = jax.jit(jnp.matmul)
    product(a, a).block_until_ready()
    best = float("inf")
    for _ in range(runs):
        started = time.perf_counter()
        product(a, a).block_until_ready()
        best = min(best, time.perf_counter() - started)
    return 2 * side**3 / best
