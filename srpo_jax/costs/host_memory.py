"""What a save takes of the memory of a process's host, and whether a host has it."""

import math
from typing import Any, NamedTuple

import jax

from srpo_jax import host

# Orbax copies what it saves to the host before it writes (an accelerator's arrays), and its writer holds so much of it
# again in chunks that are compressed: measured on a CPU, whose arrays are on the host already.
WRITTEN = 0.8
# A pool has gaps between the arrays that it holds.
POOL = 1.25


class HostMemory(NamedTuple):
    """Bytes of one process's host memory.

    Attributes:
      state: of the state that the process saves.
      offloaded: of it, what lives on the host all the time (``optim.offload``).
      copied: the copy that a save makes of it.
      written: what the writer holds.
      pinned: of ``offloaded`` and ``copied``, what GPUs have to pin.
    """

    state: int
    offloaded: int
    copied: int
    written: int
    pinned: int

    @property
    def needed(self) -> int:
        """At the most, while a checkpoint is saved; beside what a process takes anyway, some GB."""
        return self.offloaded + self.copied + self.written

    @property
    def pinned_limit(self) -> int:
        """GiB that ``XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB`` has to be at least; 0 where nothing is pinned."""
        return math.ceil(self.pinned / host.GIB)


def of_save(state: Any, processes: int, platform: str) -> HostMemory:
    """What a process needs to save its share of a state.

    Args:
      state: what a checkpoint holds, a tree of ``ShapeDtypeStruct`` with shardings. Every process saves an equal share.
      processes: of the job.
      platform: "tpu", "gpu" or "cpu".
    """
    leaves = jax.tree.leaves(state)
    sizes = [leaf.size * leaf.dtype.itemsize for leaf in leaves]
    away = [leaf.sharding.memory_kind == "pinned_host" for leaf in leaves]
    total = sum(sizes) // processes
    offloaded = sum(size for size, there in zip(sizes, away, strict=True) if there) // processes
    copied = 0 if platform == "cpu" else total
    return HostMemory(
        state=total,
        offloaded=offloaded,
        copied=copied,
        written=int(WRITTEN * total),
        pinned=offloaded + copied if platform == "gpu" else 0,
    )


def describe(memory: HostMemory, available: int | None = None, limit: int | None = None) -> list[str]:
    """Lines for a report: what a process needs, and what is missing.

    Args:
      memory: from ``of_save``.
      available: bytes that the host has for one process; None if it is not known.
      limit: GiB that the process may pin; None for what ``host.raise_pinned_limit`` would set of ``available``.
    """
    parts = [("offloaded", memory.offloaded), ("the copy", memory.copied), ("the writer", memory.written)]
    words = ", ".join(f"{name} {size / host.GIB:.1f}" for name, size in parts if size)
    pinned = f", {memory.pinned / host.GIB:.1f} of it pinned" if memory.pinned else ""
    lines = [f"a save takes {memory.needed / host.GIB:.1f} GiB of each process's host ({words}){pinned}"]
    if available is not None and memory.needed > available:
        missing = (memory.needed - available) / host.GIB
        lines.append(f"{missing:.1f} GiB of host memory are missing: use hosts with more of it, or more of them")
    if limit is None and available is not None:
        limit = max(host.DEFAULT_PINNED, int(available * host.PINNED_SHARE / host.GIB))
    if limit is not None and memory.pinned_limit > limit:
        lines.append(
            f"{memory.pinned_limit} GiB of it are pinned for GPUs, and {limit} may be: set "
            f"{host.PINNED_LIMIT}={math.ceil(POOL * memory.pinned_limit)}, or start one process for each GPU"
        )
    return lines
