"""How long an update takes at best on a chip: arithmetic, memory and interconnect at their published peaks.

    compute        hardware FLOPs of every part (costs/flops.py: with what rematerialisation computes again) at the
                   peak of bfloat16 matrix products, those of 8-bit rollouts (rollout.dtype) too, shared by all devices
    products       what products and attention's kernels read and write, beside their arithmetic: the slower one counts
    memory         what no product hides, by the compiled program's text (costs/traffic.py): norms, activations, what is
                   laid out anew, the optimiser; and moments that stay in the hosts' memory (optim.offload), which come
                   and go through the device's link to its host
    interconnect   the collectives of the compiled program, each on the links between the devices of its groups; what
                   goes between TPU slices or hosts of GPUs, on their share of the data-centre network

Products and the rest follow each other, the interconnect may work beside both. So ``best`` is what no run of this
program beats. No product reaches a data sheet's peak either: ``expected`` takes a share of it.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from srpo_jax.costs import topologies
from srpo_jax.costs.flops import Work
from srpo_jax.costs.hlo import Collective
from srpo_jax.costs.topologies import Target
from srpo_jax.costs.traffic import Traffic

# The share of the peak that large products, with all that comes between them, are taken to reach: an assumption.
UTILISATION = 0.6

# Bytes/s each way between a device and its host: PCIe 4 x16; H100 and H200 have twice that, of TPUs none is published.
HOST_LINK = 32e9
HOST_MEMORY = "pinned_host"  # the kind of memory that such arrays lie in


class Estimate(NamedTuple):
    """Seconds of one update on every device at the published peaks: ``compute`` by part, ``products`` for what those
    read and write, ``memory`` by what for, ``interconnect`` by kind of collective."""

    compute: dict[str, float]
    products: float
    memory: dict[str, float]
    interconnect: dict[str, float]

    @property
    def best(self) -> float:
        """Everything at its peak, and all that can overlap does."""
        return self.seconds(1.0)

    @property
    def expected(self) -> float:
        """As ``best`` at ``UTILISATION`` of the peak of matrix products."""
        return self.seconds(UTILISATION)

    def seconds(self, utilisation: float) -> float:
        """Matrix products at this share of their peak."""
        busy = max(sum(self.compute.values()) / utilisation, self.products) + sum(self.memory.values())
        return max(busy, sum(self.interconnect.values()))

    @property
    def bound(self) -> str:
        """What takes longest at the peaks: "compute", "memory" or "interconnect"."""
        totals = {name: sum(getattr(self, name).values()) for name in ("compute", "memory", "interconnect")}
        totals["memory"] += self.products
        return max(totals, key=totals.get)


def estimate(
    parts: dict[str, Work],
    moved: Traffic,
    host_bytes: float,
    collectives: Sequence[Collective],
    target: Target,
    places: Sequence[tuple[int, ...]],
) -> Estimate:
    """Estimates an update.

    Args:
      parts: the work of the whole batch, by part (``work.update``).
      moved: by the compiled update (``traffic.of``).
      host_bytes: of the optimiser's state that lie in the host's memory, for a device.
      collectives: of the compiled update.
      target: what it was compiled for.
      places: of its devices, in the program's order (``topologies.place``); not read without collectives.
    """
    chip, count = target.chip, target.count
    # The optimiser's few FLOPs are not of matrix products.
    compute = {name: part.hardware / count / chip.flops for name, part in parts.items() if name != "optimizer"}
    memory = {"between": moved.between / chip.bandwidth}
    if host_bytes:
        memory["host"] = host_bytes / HOST_LINK  # in and out at once
    interconnect: dict[str, float] = {}
    for item in collectives:
        seconds = item.runs * duration(item, target, places)
        name = kind(item, target, places)
        interconnect[name] = interconnect.get(name, 0.0) + seconds
    return Estimate(compute, moved.products / chip.bandwidth, memory, interconnect)


def kind(item: Collective, target: Target, places: Sequence[tuple[int, ...]]) -> str:
    """What a collective is called: "all-reduce", or "all-reduce between slices" (GPUs: hosts) where it leaves one."""
    if all(len({places[member][0] for member in group}) == 1 for group in item.groups):
        return item.kind
    return f"{item.kind} between {'slices' if target.platform == 'tpu' else 'hosts'}"


def duration(item: Collective, target: Target, places: Sequence[tuple[int, ...]]) -> float:
    """Seconds of one run of a collective at the peak of what joins its devices.

    Devices of one TPU slice, or one host of GPUs, exchange over their links. What comes from other slices or hosts
    comes over the data-centre network, through each device's share of it (``Target.network``), and is passed on over
    the links: both work at a time, so that the slower one counts.

    A permutation goes around a ring: on one link each way, and XLA sends halves of the data both ways.
    """
    if not item.traffic:
        return 0.0
    if item.kind == "collective-permute":
        if any(places[one][0] != places[other][0] for one, other in item.groups):
            return item.bytes / target.network
        members = sorted({place for pair in item.groups for place in pair})
        rate = topologies.bandwidth(target, [places[member] for member in members])
        return item.bytes / (min(rate, 2 * target.chip.link) if target.platform == "tpu" else rate)
    return max(_exchange(item, target, [places[member] for member in group]) for group in item.groups)


def _exchange(item: Collective, target: Target, places: Sequence[tuple[int, ...]]) -> float:
    """Seconds of a group, whose devices lie at ``places``: the same number of them in every slice or host."""
    apart = len({place[0] for place in places})
    near = [place for place in places if place[0] == places[0][0]]
    width, count = len(near), len(places)
    # Bytes that a device gets from its own slice, and by the network: of what its slice lacks, it fetches its share.
    within, between = {
        "all-gather": ((count - apart) * item.bytes, (apart - 1) * item.bytes),
        "all-reduce": (2 * (width - 1) / width * item.bytes, 2 * (apart - 1) / apart * item.bytes / width),
        "reduce-scatter": ((width - 1) / width * item.bytes, (apart - 1) / apart * item.bytes / width),
        "all-to-all": ((width - 1) / count * item.bytes, (count - width) / count * item.bytes),
        "collective-broadcast": (item.bytes * (width > 1), item.bytes * (apart > 1)),
    }[item.kind]
    return max(within and within / topologies.bandwidth(target, near), between / target.network)


def shard_bytes(tree: Any, host: bool = False) -> int:
    """Bytes of a tree's arrays (``ShapeDtypeStruct`` with shardings) in each device's memory, or in its host's."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        if (leaf.sharding.memory_kind == HOST_MEMORY) == host:
            total += math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    return total
