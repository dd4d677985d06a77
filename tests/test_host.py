"""The machine's memory as a process may use it, and the limit of what GPUs pin of it."""

import subprocess
import sys

import pytest

from srpo_jax import host

GIB = 2**30


def machine(root, gib, groups="", limits=()):
    """A machine's /proc and /sys: its memory, the lines of the process's control groups, and {file: bytes}."""
    files = {"proc/meminfo": f"MemTotal: {gib * 2**20} kB\nMemFree: 1 kB\n", "proc/self/cgroup": groups, **dict(limits)}
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("groups", "limits", "gib"),
    [
        ("", {}, 512),
        ("0::/\n", {"sys/fs/cgroup/memory.max": "max\n"}, 512),
        # A job's group bounds the step's within it, which has no limit of its own.
        (
            "0::/slurm/job_7/step_0\n",
            {
                "sys/fs/cgroup/slurm/job_7/memory.max": f"{128 * GIB}\n",
                "sys/fs/cgroup/slurm/job_7/step_0/memory.max": "max\n",
            },
            128,
        ),
        # A container sees its group at the root, whatever the machine calls it.
        (
            "4:memory:/docker/abc\n2:cpu:/\n",
            {"sys/fs/cgroup/memory/memory.limit_in_bytes": f"{200 * GIB}\n"},
            200,
        ),
        ("4:memory:/\n", {"sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n"}, 512),
    ],
)
def test_memory_is_the_machines_or_the_control_groups(tmp_path, groups, limits, gib):
    assert host.memory(machine(tmp_path, 512, groups, limits)) == gib * GIB


def test_this_machine_has_memory(tmp_path):
    assert host.memory() > GIB
    assert host.memory(tmp_path) == 0  # nothing says


@pytest.mark.parametrize(
    ("before", "size", "after"),
    [
        ({}, 1024 * GIB, {host.PINNED_LIMIT: "819"}),
        ({host.PINNED_LIMIT: "100"}, 1024 * GIB, {host.PINNED_LIMIT: "100"}),
        ({}, 64 * GIB, {}),  # XLA's own limit is more
        ({}, 0, {}),
    ],
)
def test_gpus_may_pin_a_share_unless_the_user_says_how_much(before, size, after):
    host.raise_pinned_limit(before, size)
    assert before == after


def test_a_command_sets_the_limit_before_a_backend_starts():
    code = f"""
import os
from srpo_jax import errors, host
host.memory = lambda: {1024 * GIB}
def main():
    from jax._src import xla_bridge
    print(os.environ[host.PINNED_LIMIT], xla_bridge.backends_are_initialized())
errors.run(main)
"""
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert child.stdout.split() == ["819", "False"]
