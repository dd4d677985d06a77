"""What an update takes on devices that are there: it and its parts, compiled and timed on random numbers."""

import dataclasses
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from srpo_jax import config as config_lib
from srpo_jax import sharding
from srpo_jax.costs import flops, hardware, keeping, parts, work
from srpo_jax.costs.hardware import GIB
from srpo_jax.errors import UserError
from srpo_jax.program import Architecture
from srpo_jax.weights import folder

UPDATE = "update"
# The next call's arguments from (arguments, result), of programs that take the memory of what they are given.
AGAIN: dict[str, Callable[[tuple, tuple], tuple]] = {
    "optimizer": lambda values, result: (*result, values[2]),
    UPDATE: lambda values, result: (result[0], *values[1:]),
}


class Timing(NamedTuple):
    """Of one program.

    Attributes:
      compile: seconds.
      runs: seconds of each timed call.
      memory: bytes on a device by kind, as the compiler plans them: arguments, results, temporaries, and results that
        take the memory of arguments.
    """

    compile: float
    runs: list[float]
    memory: dict[str, int]

    @property
    def seconds(self) -> float:
        """The median of the runs."""
        return statistics.median(self.runs)


def clock(
    function: Any,
    arguments: tuple[Any, ...],
    runs: int,
    repeat: Callable | None = None,
    trace: pathlib.Path | None = None,
) -> Timing:
    """Compiles a jitted function for abstract arguments, fills these with numbers, and times calls.

    Args:
      function, arguments: as in ``parts.Part``.
      runs: timed calls, after one that is not.
      repeat: makes the next call's arguments from (arguments, result), where a call takes the memory of the last.
    """
    started = time.perf_counter()
    compiled = function.lower(*arguments).compile()
    compile_seconds = time.perf_counter() - started
    plan = compiled.memory_analysis()
    memory = {} if plan is None else {
        "arguments": plan.argument_size_in_bytes,
        "results": plan.output_size_in_bytes,
        "temporaries": plan.temp_size_in_bytes,
        "aliased": plan.alias_size_in_bytes,
    }  # fmt: skip
    _check_fits(memory)
    values, taken = parts.fill(arguments), []
    for run in range(runs + 1):
        jax.block_until_ready(values)
        started = time.perf_counter()
        result = jax.block_until_ready(compiled(*values))
        if run:
            taken.append(time.perf_counter() - started)
        if repeat is not None:
            values = repeat(values, result)
        del result
    if trace is not None:
        with jax.profiler.trace(trace):
            jax.block_until_ready(compiled(*values))
    return Timing(compile_seconds, taken, memory)


def planned_bytes(memory: dict[str, int]) -> int:
    """The memory of a device that a program takes in all, of ``Timing.memory``."""
    return memory["arguments"] + memory["results"] - memory["aliased"] + memory["temporaries"]


def _check_fits(memory: dict[str, int]) -> None:
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    if memory and limit and planned_bytes(memory) > limit:
        raise UserError(
            f"the program needs {planned_bytes(memory) / GIB:.1f} GiB, {memory['temporaries'] / GIB:.1f} of them "
            f"temporaries, and the device offers {limit / GIB:.1f}: try a smaller --device-batch, optim.weights and "
            "optim.moments of fewer bits, or lora.rank"
        )


def peak(devices: list[jax.Device]) -> tuple[float | None, str]:
    """(FLOP/s of all devices together at best, where the figure is from); None for a device that is not known."""
    kind = devices[0].device_kind
    if devices[0].platform == "cpu":
        return hardware.measured_flops(), "float32 matrix product, measured"
    chip = hardware.find(kind)
    if chip is None:
        return None, f"unknown for {kind}"
    return chip.flops * len(devices), f"{len(devices)} x {chip.name}, bfloat16, dense, by its maker"


def benchmark(
    config: ConfigDict,
    architecture: Architecture,
    runs: int,
    wanted: tuple[str, ...],
    say: Callable[[str], None] = print,
    trace: pathlib.Path | None = None,
) -> dict[str, Any]:
    """Measures the ``wanted`` parts of an update of a validated config and returns all there is to know, for JSON.

    ``trace`` is a folder for profiles, one folder a part.
    """
    mesh = sharding.make_mesh(config.mesh)
    built, config = keeping.build(config, mesh, architecture)
    best, source = peak(list(mesh.devices.flat))
    device = mesh.devices.flat[0]
    say(f"{mesh.devices.size} x {device.device_kind}, peak {_tera(best)} ({source})")
    family, sizes = architecture.family, architecture.transformer
    say(
        f"{folder.parameters(family.network, sizes) / 1e6:.4g} million parameters in "
        f"{' + '.join(map(str, family.blocks(sizes)))} blocks; "
        f"batch {config.data.batch_size} in {config.optim.accumulation}, {config.data.height}x{config.data.width}, "
        f"{config.model.dtype}, attention {built.computes.transformer.attention}"
    )
    counted = work.update(config, architecture)
    found = {}
    say(f"{'part':<12} {'calls':>6} {'compile s':>10} {'s a call':>10} {'s':>9} {'TFLOP':>9} {'TFLOP/s':>9} {'MFU':>7}")

    def note(name: str, timing: Timing, calls: float, total: flops.Work) -> None:
        seconds = timing.seconds * calls
        speed = total.model / seconds
        found[name] = {
            "calls": calls,
            "compile_seconds": timing.compile,
            "call_seconds": timing.seconds,
            "runs": timing.runs,
            "seconds": seconds,
            "model_flops": total.model,
            "hardware_flops": total.hardware,
            "flops_per_second": speed,
            "mfu": None if best is None else speed / best,
            "memory": timing.memory,
        }
        mfu = "" if best is None else f"{speed / best:7.1%}"
        say(
            f"{name:<12} {calls:6.4g} {timing.compile:10.2f} {timing.seconds:10.4f} {seconds:9.4f} "
            f"{total.model / 1e12:9.4g} {speed / 1e12:9.4g} {mfu}"
        )

    def profile(name: str) -> pathlib.Path | None:
        return None if trace is None else trace / name

    for part in parts.take_apart(config, built):
        if part.name in wanted:
            timing = clock(part.function, part.arguments, runs, AGAIN.get(part.name), profile(part.name))
            note(part.name, timing, part.calls, counted[part.name])
    if UPDATE in wanted:
        # Updates between two rollouts are cheaper: time whole rounds of them.
        reuse = config.rollout.reuse
        arguments = built.state, built.frozen, built.batch
        timing = clock(built.update, arguments, runs * reuse, AGAIN[UPDATE], profile(UPDATE))
        rounds = [sum(timing.runs[start : start + reuse]) / reuse for start in range(0, runs * reuse, reuse)]
        note(UPDATE, timing._replace(runs=rounds), 1, sum(counted.values(), flops.Work(0.0, 0.0)))
    stats = device.memory_stats() or {}
    report = {
        "jax": jax.__version__,
        "device": device.device_kind,
        "devices": mesh.devices.size,
        "mesh": dict(mesh.shape),
        "peak_flops": best,
        "peak_source": source,
        "config": config_lib.flatten(config),
        "architecture": {
            "transformer": dataclasses.asdict(architecture.transformer),
            "autoencoder": dataclasses.asdict(architecture.autoencoder),
            "rewards": {name: dataclasses.asdict(sizes) for name, sizes in architecture.rewards.items()},
        },
        "parts": found,
        "memory_stats": {name: value for name, value in stats.items() if isinstance(value, int)},
    }
    if UPDATE in found:
        _summarise(report, config, say)
    return report


def _summarise(report: dict[str, Any], config: ConfigDict, say: Callable[[str], None]) -> None:
    """Adds, and says, what follows from the whole update: samples a second and memory."""
    update = report["parts"][UPDATE]
    apart = sum(part["seconds"] for name, part in report["parts"].items() if name != UPDATE)
    report["samples_per_second"] = config.data.batch_size / update["seconds"]
    share = apart / update["seconds"]
    say(f"{report['samples_per_second']:.4g} samples/s; the parts that were timed alone take {share:.2f} of the update")
    memory, stats = update["memory"], report["memory_stats"]
    if memory:
        total = planned_bytes(memory)
        report["planned_bytes"] = total
        temporaries = memory["temporaries"] / GIB
        say(f"memory of a device as planned: {total / GIB:.3g} GiB, of it {temporaries:.3g} temporaries")
    if "peak_bytes_in_use" in stats:
        say(f"memory of a device at most, of all that was measured: {stats['peak_bytes_in_use'] / GIB:.3g} GiB")


def _tera(value: float | None) -> str:
    return "unknown" if value is None else f"{value / 1e12:.4g} TFLOP/s"
