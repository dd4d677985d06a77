"""The machine that a process runs on: its memory, and how much of it may be pinned for GPUs."""

import os
import pathlib
from collections.abc import MutableMapping

# What XLA's GPU client reads when it starts: GiB of pinned memory that a process may take, 64 by default. A save of one
# process with many GPUs, and optimiser state in the host's memory, need more. Nothing is taken before it is needed.
PINNED_LIMIT, DEFAULT_PINNED = "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", 64
# Pinned memory is never swapped: the rest stays for the processes themselves and for files being written.
PINNED_SHARE = 0.8
GIB = 2**30


def memory(root: str | os.PathLike = "/") -> int:
    """Bytes of memory that this process may use: the machine's, or less where its control group (a container, a SLURM
    job) is given less. 0 if nothing says. ``root`` is where /proc and /sys lie."""
    root = pathlib.Path(root)
    found = []
    for line in _read(root / "proc/meminfo").splitlines():
        if line.startswith("MemTotal:"):
            found.append(int(line.split()[1]) * 1024)
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            folder, file = root / "sys/fs/cgroup", "memory.max"  # version 2
        elif "memory" in controllers.split(","):
            folder, file = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes"
        else:
            continue
        # A group is bound by those above it too. In a container its path may be the machine's, not what is seen there.
        place = pathlib.PurePosixPath(path.strip("/"))
        limits = (_read(folder / part / file).strip() for part in (place, *place.parents))
        found += [int(limit) for limit in limits if limit.isdecimal()]
    return min(found, default=0)


def raise_pinned_limit(environment: MutableMapping[str, str], size: int) -> None:
    """Lets GPUs pin a share of ``size`` bytes of memory, to be called before JAX starts; a limit that the user set
    stays, and none is set below XLA's own."""
    limit = int(size * PINNED_SHARE / GIB)
    if limit > DEFAULT_PINNED:
        environment.setdefault(PINNED_LIMIT, str(limit))


def _read(file: pathlib.Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError:
        return ""
