"""Accelerators that are not there: their devices by name, for compiling ahead of time.

    v5p:2x2x2, v5e:8x8    a TPU slice, by type and shape in chips; a chip of tpu7x is two devices
    v5e:4x4*2             so many slices of one shape, which the data-centre network joins
    h100:8, h200:1        GPUs of one host
    h100:4x8              hosts x GPUs

The compilers are libtpu (for TPU) and jax's CUDA plugin; neither asks for a device.
"""

import importlib.util
import math
import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from srpo_jax.costs import hardware
from srpo_jax.costs.hardware import GIB
from srpo_jax.errors import UserError

GPUS_PER_HOST = 8
CHIPS_PER_HOST = 4  # of a TPU slice of several hosts
# Bytes/s of one GPU to other hosts: a 400 Gbit/s adapter for each GPU, as in a DGX H100. No data sheet of a GPU says.
GPU_NETWORK = 50e9

MIB, KIB = 2**20, 2**10


class Tpu(NamedTuple):
    """A type of TPU slice.

    Attributes:
      kind: ``device_kind``.
      axes: of the torus.
      ring: length by which an axis is closed: of v4, v5p and tpu7x, if all of the slice's are multiples of it; of v5e
        and v6e, an axis as long as this.
      memory: bytes of a device that libtpu gives to programs; it keeps the rest. From its messages (libtpu 0.0.42).
      host: bytes of memory of a host with 4 chips (cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus: machine
        types ct4p-hightpu-4t, ct5lp-hightpu-4t, ct5p-hightpu-4t, ct6e-standard-4t; cloud.google.com/tpu/docs/tpu7x).
      network: bytes/s of a device, each way, to other slices: the share that each of a pod's 256 chips has in its
        published data-centre network (cloud.google.com/tpu/docs/v6e: 6.4 Tbit/s of v5e, 25.6 of v6e), or a chip's own
        (cloud.google.com/tpu/docs/tpu7x: 50 Gbit/s of v5p, 100 of tpu7x). None is published of v4: taken for as slow as
        v5e's, the slowest that is.
      cores: devices of a chip.
    """

    kind: str
    axes: int
    ring: int
    memory: float
    host: float
    network: float
    cores: int = 1


TPUS = {
    "v4": Tpu("TPU v4", 3, 4, 30.75 * GIB, 407 * GIB, 6.4e12 / 8 / 256),
    "v5e": Tpu("TPU v5e", 2, 16, 15.75 * GIB, 192 * GIB, 6.4e12 / 8 / 256),
    "v5p": Tpu("TPU v5p", 3, 4, 95.74 * GIB, 448 * GIB, 50e9 / 8),
    "v6e": Tpu("TPU v6e", 2, 16, 31.25 * GIB, 720 * GIB, 25.6e12 / 8 / 256),
    "tpu7x": Tpu("TPU7x", 3, 4, 94.75 * GIB, 960 * GIB, 100e9 / 8 / 2, cores=2),
}

# The two devices of a tpu7x chip are joined as if by so many links to other chips (cloud.google.com/tpu/docs/tpu7x).
WITHIN_CHIP = 6

# Packages of the compilers, by platform: setup.py's extras.
INSTALL = {"tpu": "pip install -e '.[preflight-tpu]'", "gpu": "pip install -e '.[preflight-cuda]'"}


class Gpu(NamedTuple):
    """What XLA wants to know of a GPU: NVIDIA's data sheets, and its CUDA programming guide by compute capability.

    Attributes:
      kind: ``device_kind``.
      capability: compute capability.
      cores: streaming multiprocessors.
      lanes: float32 units in each.
      clock: GHz, boost.
      cache: bytes of L2.
      shared: bytes of shared memory in each multiprocessor.
      shared_block: bytes of it that a block can ask for.
      threads: that each multiprocessor holds.
    """

    kind: str
    capability: tuple[int, int]
    cores: int
    lanes: int
    clock: float
    cache: int
    shared: int
    shared_block: int
    threads: int = 2048


GPUS = {
    "a100-40gb": Gpu("NVIDIA A100-SXM4-40GB", (8, 0), 108, 64, 1.41, 40 * MIB, 164 * KIB, 163 * KIB),
    "a100": Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 108, 64, 1.41, 40 * MIB, 164 * KIB, 163 * KIB),
    "h100-pcie": Gpu("NVIDIA H100 PCIe", (9, 0), 114, 128, 1.755, 50 * MIB, 228 * KIB, 227 * KIB),
    "h100": Gpu("NVIDIA H100 80GB HBM3", (9, 0), 132, 128, 1.98, 50 * MIB, 228 * KIB, 227 * KIB),
    "h200": Gpu("NVIDIA H200", (9, 0), 132, 128, 1.98, 50 * MIB, 228 * KIB, 227 * KIB),
    "b200": Gpu("NVIDIA B200", (10, 0), 148, 128, 1.965, 126 * MIB, 228 * KIB, 227 * KIB),
    "rtx4090": Gpu("NVIDIA GeForce RTX 4090", (8, 9), 128, 128, 2.52, 72 * MIB, 100 * KIB, 99 * KIB, 1536),
}  # fmt: skip


class Target(NamedTuple):
    """Devices to compile for.

    Attributes:
      name: as given.
      platform: "tpu" or "gpu".
      chip: its figures.
      shape: chips along each axis of a TPU slice's torus, or (hosts, GPUs of each).
      generation: key of ``TPUS`` or ``GPUS``.
      slices: of that shape, of a TPU.
    """

    name: str
    platform: str
    chip: hardware.Chip
    shape: tuple[int, ...]
    generation: str
    slices: int = 1

    @property
    def count(self) -> int:
        """Devices."""
        return math.prod(self.shape) * self.slices * self._cores

    @property
    def _cores(self) -> int:
        return TPUS[self.generation].cores if self.platform == "tpu" else 1

    @property
    def hosts(self) -> int:
        """Processes of a job: one on each host."""
        return self.shape[0] if self.platform == "gpu" else math.ceil(self.count / self._cores / CHIPS_PER_HOST)

    @property
    def host_memory(self) -> float | None:
        """Bytes of one host's memory; None where it is the buyer's choice. Fewer chips have a part of a host."""
        if self.platform == "gpu":
            return None
        chips = self.count // self._cores
        return TPUS[self.generation].host * min(chips, CHIPS_PER_HOST) / CHIPS_PER_HOST

    @property
    def network(self) -> float:
        """Bytes/s of a device, each way, to other slices or hosts."""
        return TPUS[self.generation].network if self.platform == "tpu" else GPU_NETWORK

    @property
    def memory(self) -> float:
        """Bytes of a device that a program may take.

        Of a GPU, what its data sheet says: drivers show 6 % more, which goes to CUDA's context and to NCCL.
        """
        return TPUS[self.generation].memory if self.platform == "tpu" else self.chip.memory


def parse(name: str) -> Target:
    """Reads a target's name. Raises UserError for one that is not understood."""
    match = re.fullmatch(r"([a-z0-9-]+):(\d+(?:x\d+)*)(?:\*(\d+))?", name.lower())
    generation, shape = (match[1], tuple(map(int, match[2].split("x")))) if match else (name, ())
    slices = int(match[3] or 1) if match else 1
    if generation in TPUS:
        kind, axes = TPUS[generation][:2]
        if len(shape) != axes or not all(shape):
            raise UserError(f"--topology={name}: a {generation} slice has {axes} axes, as "
                            f"{generation}:{'x'.join(['2'] * axes)}")  # fmt: skip
        if not slices:
            raise UserError(f"--topology={name}: 0 slices hold no chip; give a number from 1")
        return Target(name, "tpu", hardware.find(kind), shape, generation, slices)
    if generation in GPUS:
        if len(shape) == 1 and shape[0] > GPUS_PER_HOST and not shape[0] % GPUS_PER_HOST:
            shape = (shape[0] // GPUS_PER_HOST, GPUS_PER_HOST)
        elif len(shape) == 1 and shape[0] <= GPUS_PER_HOST:
            shape = (1, *shape)
        if len(shape) != 2 or not all(shape) or match[3]:
            raise UserError(f"--topology={name}: give a number of GPUs up to {GPUS_PER_HOST}, or hosts x GPUs, as "
                            f"{generation}:4x8")  # fmt: skip
        return Target(name, "gpu", hardware.find(GPUS[generation].kind), shape, generation)
    raise UserError(
        f"--topology={name}: known are TPU slices ({', '.join(TPUS)}, as v5p:2x2x2, or two of them as v5p:2x2x2*2) and "
        f"GPUs ({', '.join(GPUS)}, as h100:8)"
    )


# --- devices ----------------------------------------------------------------------------------------------------------


def prepare() -> None:
    """Sets up the process, before JAX starts: the host's CPU is the only device, and the compilers ask nobody.

    libtpu would otherwise look for the machine's metadata server and for other processes that hold the chips.
    """
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-1")  # any: what is compiled for is named later
    for name in ("TF_CPP_MIN_LOG_LEVEL", "TPU_MIN_LOG_LEVEL", "TPU_STDERR_LOG_LEVEL"):
        os.environ[name] = "3"  # whatever the import of JAX set it to; what matters comes as an exception
    jax.config.update("jax_platforms", "cpu")
    # The default takes four times as long, and half a GiB of temporaries more or less.
    jax.config.update("jax_optimization_level", "O0")


def installed(platform: str) -> bool:
    """Whether the compiler for "tpu" or "gpu" can be imported."""
    names = ("libtpu",) if platform == "tpu" else ("jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13")

    def there(name: str) -> bool:
        try:
            return importlib.util.find_spec(name) is not None
        except ModuleNotFoundError:  # of the package around it
            return False

    return any(map(there, names))


def devices(target: Target) -> Sequence[Any]:
    """Devices that programs can be compiled for, and not run on.

    Raises UserError where the compiler is missing or does not know the topology.
    """
    if not installed(target.platform):
        what = "libtpu" if target.platform == "tpu" else "jax's CUDA plugin"
        raise UserError(f"--topology={target.name} needs {what}: {INSTALL[target.platform]}")
    # The import is slow.
    from jax.experimental import topologies

    try:
        if target.platform == "tpu":
            found = topologies.get_topology_desc(f"{target.generation}:{_joined(target.shape)}", "tpu",
                                                 **_tpu_options(target))  # fmt: skip
        else:
            found = topologies.get_topology_desc(
                target.generation, "cuda", target_config=target_config(GPUS[target.generation]),
                topology=_joined((1, *target.shape)),
            )  # fmt: skip
    except Exception as error:  # whatever a plugin raises: it is C++ behind an interface
        raise UserError(f"--topology={target.name}: {' '.join(f'{error}'.split())}") from error
    return found.devices


def _joined(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _tpu_options(target: Target) -> dict[str, Any]:
    options = {} if target.slices == 1 else {"num_slices": target.slices}
    if target.generation == "v4":
        options["chip_config_name"] = "megacore"  # both cores of a chip are one device, as on Cloud TPU
    if math.prod(target.shape) == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    return options


def target_config(gpu: Gpu) -> str:
    """A GPU as the text of XLA's ``GpuTargetConfigProto`` (xla/stream_executor/device_description.proto)."""
    chip = hardware.find(gpu.kind)
    major, minor = gpu.capability
    accelerated = "ACCELERATED_FEATURES" if major >= 9 else "NONE"
    return f"""
gpu_device_info {{
  name: "{gpu.kind}"
  cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {accelerated} }}
  core_count: {gpu.cores}
  fpus_per_core: {gpu.lanes}
  clock_rate_ghz: {gpu.clock}
  l2_cache_size: {gpu.cache}
  memory_bandwidth: {chip.bandwidth:.0f}
  device_memory_size: {chip.memory:.0f}
  shared_memory_per_core: {gpu.shared}
  shared_memory_per_block_optin: {gpu.shared_block}
  shared_memory_per_block: {48 * KIB}
  registers_per_core_limit: {64 * KIB}
  registers_per_block_limit: {64 * KIB}
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: {gpu.threads}
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  block_dim_limit_x: {2**31 - 1}
  block_dim_limit_y: {2**16 - 1}
  block_dim_limit_z: {2**16 - 1}
  runtime_version: "12.8.0"
  driver_version: "12.8.0"
  dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{gpu.kind}"
"""


# --- between devices --------------------------------------------------------------------------------------------------


def bandwidth(target: Target, places: Sequence[tuple[int, ...]]) -> float:
    """Bytes/s that a device can get from others of its group in its slice or host, if all links work.

    Args:
      target: of which the devices are.
      places: of these devices, as ``place`` says; all in one slice or host.

    Of a TPU, one link for each axis along which the group extends; two if it goes all around a closed one; within a
    chip of two devices, ``WITHIN_CHIP``. Of a GPU, its link. Nothing of this goes to other slices or hosts: that is
    ``Target.network``.
    """
    if target.platform == "gpu":
        return target.chip.link
    tpu, links = TPUS[target.generation], 0
    cubes = tpu.axes == 2 or not any(size % tpu.ring for size in target.shape)
    for axis, size in enumerate(target.shape, 1):
        span = len({place[axis] for place in places})
        around = span == size and cubes and size % tpu.ring == 0
        links += 0 if span == 1 else 2 if around else 1
    return (links or WITHIN_CHIP * (len(set(places)) > 1)) * target.chip.link


def place(target: Target, device: Any) -> tuple[int, ...]:
    """Where a device of ``devices`` lies: (slice, place in its torus), of two on a chip with its number behind that; or
    (host, GPU)."""
    if target.platform == "tpu":
        core = (device.core_on_chip,) if TPUS[target.generation].cores > 1 else ()
        # Devices of a single slice have no such attribute.
        return getattr(device, "slice_index", 0), *device.coords[: len(target.shape)], *core
    return divmod(device.id, target.shape[1])
