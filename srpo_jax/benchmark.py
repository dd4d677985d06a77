r"""Times an update and each of its parts, with random weights, and says how far from the hardware's peak they are.

    python -m srpo_jax.benchmark                                        # two CPU cores, one minute
    python -m srpo_jax.benchmark --preset=wide --config.model.attention=cudnn
    python -m srpo_jax.benchmark --config=configs/flux_dev_hps.py --device-batch=1 --json=speed.json

PRESETS, sizes and recipe where there is no --config:

  small  a 5-million-parameter FLUX on 64x64 pictures, float32: any machine
  wide   FLUX.1-dev's widths, 4 + 8 of its 19 + 38 blocks, the released recipe: one 80 GB GPU
  full   FLUX.1-dev, the released recipe

The sizes of a recipe are those of the folders that it names, or FLUX.1-dev's published ones. Of the parts, "update" is
the whole, the only one that needs memory for the optimiser's state.

Utilisation (MFU) is of the model's FLOPs (srpo_jax/costs/flops.py): recomputation does not count as work. The peak is
the maker's figure for bfloat16; for a CPU it is the best float32 matrix product measured here, for another device
unknown.
"""

import argparse
import dataclasses
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from srpo_jax import architectures, command, errors, program, sharding
from srpo_jax import config as config_lib
from srpo_jax.costs import flops, hardware, parts
from srpo_jax.errors import UserError
from srpo_jax.models.autoencoder import AutoencoderConfig
from srpo_jax.models.clip import ClipConfig, ClipTextConfig, ClipVisionConfig
from srpo_jax.models.flux import FluxConfig
from srpo_jax.program import Architecture

UPDATE = "update"
GIB = 2.0**30
# The next call's arguments from (arguments, result), of programs that take the memory of what they are given.
AGAIN: dict[str, Callable[[tuple, tuple], tuple]] = {
    "optimizer": lambda values, result: (*result, values[2]),
    UPDATE: lambda values, result: (result[0], *values[1:]),
}

# --- what is measured -------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """What a preset stands for."""

    config: ConfigDict
    architecture: Architecture


def _small() -> Case:
    """The recipe and the sizes of the embedded world (configs/emoji.py, srpo_jax/emoji), without loops over blocks,
    which take a small model longer and compile faster."""
    c = config_lib.default()
    c.model.dtype = "float32"
    c.remat.transformer = c.remat.autoencoder = c.remat.reward = "none"
    c.data.text_length, c.data.height, c.data.width = 16, 64, 64
    c.rollout.steps, c.rollout.guidance, c.rollout.noise = 10, 2.5, "per_sample"
    c.reward.weights.hps, c.reward.weights.clip = 0.0, 1.0
    c.optim.merge_terms = True
    c.model.scan_unroll, c.rollout.unroll = 4, True
    return Case(
        c,
        Architecture(
            FluxConfig(
                in_channels=64, out_channels=64, num_layers=2, num_single_layers=4, attention_head_dim=32,
                num_attention_heads=6, joint_attention_dim=128, pooled_projection_dim=128, guidance_embeds=True,
                axes_dims_rope=(8, 12, 12),
            ),
            AutoencoderConfig(block_out_channels=(16, 32, 64, 128), layers_per_block=1, norm_num_groups=4),
            {
                "clip": ClipConfig(
                    ClipTextConfig(3240, 128, 512, 2, 4, 16, eos_token_id=3239),
                    ClipVisionConfig(160, 640, 5, 5, 64, 16),
                    projection_dim=64,
                )
            },
        ),
    )  # fmt: skip


def _full() -> Case:
    c = config_lib.default()
    return Case(c, architectures.published(c, "flux-dev")[0])


def _wide() -> Case:
    case = _full()
    return case._replace(architecture=shallow(case.architecture, (4, 8)))


PRESETS: dict[str, Callable[[], Case]] = {"small": _small, "wide": _wide, "full": _full}
# Samples a device takes at a time unless told otherwise: the small model needs some to have work.
DEVICE_BATCH = {"small": 8}


def shallow(architecture: Architecture, depth: tuple[int, int]) -> Architecture:
    """The same widths with ``depth`` = (double, single) blocks."""
    double, single = depth
    transformer = dataclasses.replace(architecture.transformer, num_layers=double, num_single_layers=single)
    return architecture._replace(transformer=transformer)


def depth(words: list[str]) -> tuple[int, int]:
    """The numbers of blocks in a flag ``--depth=DOUBLE,SINGLE``. Raises UserError."""
    if len(words) != 2 or not all(word.isdigit() and int(word) for word in words):
        raise UserError(f"--depth={','.join(words)}: give two numbers of blocks, as --depth=4,8")
    return int(words[0]), int(words[1])


# --- measuring --------------------------------------------------------------------------------------------------------


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


def measure(
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
    built = program.build(config, mesh, architecture)
    best, source = peak(list(mesh.devices.flat))
    device = mesh.devices.flat[0]
    say(f"{mesh.devices.size} x {device.device_kind}, peak {_tera(best)} ({source})")
    sizes, millions = architecture.transformer, flops.parameters(architecture.transformer) / 1e6
    say(
        f"{millions:.4g} million parameters in {sizes.num_layers} + {sizes.num_single_layers} blocks; "
        f"batch {config.data.batch_size} in {config.optim.accumulation}, {config.data.height}x{config.data.width}, "
        f"{config.model.dtype}"
    )
    work = flops.update(config, architecture)
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
            timing = measure(part.function, part.arguments, runs, AGAIN.get(part.name), profile(part.name))
            note(part.name, timing, part.calls, work[part.name])
    if UPDATE in wanted:
        # Updates between two rollouts are cheaper: time whole rounds of them.
        reuse = config.rollout.reuse
        arguments = built.state, built.frozen, built.batch
        timing = measure(built.update, arguments, runs * reuse, AGAIN[UPDATE], profile(UPDATE))
        rounds = [sum(timing.runs[start : start + reuse]) / reuse for start in range(0, runs * reuse, reuse)]
        note(UPDATE, timing._replace(runs=rounds), 1, sum(work.values(), flops.Work(0.0, 0.0)))
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


# --- the command ------------------------------------------------------------------------------------------------------


def parse(arguments: list[str] | None) -> tuple[ConfigDict, Architecture, argparse.Namespace]:
    """Reads a command line: the config with its batch, the sizes, and the flags. Raises UserError."""
    parser, known = command.parser("benchmark", __doc__), [*flops.PARTS, UPDATE]
    words = "one of those above (default: small)"
    parser.add_argument("--preset", choices=sorted(PRESETS), default="small", help=words)
    words = "blocks of the transformer instead of all"
    parser.add_argument("--depth", type=command.words, metavar="DOUBLE,SINGLE", help=words)
    words = "samples that a device takes at a time; the batch is that many on every device (default: 1)"
    parser.add_argument("--device-batch", type=command.at_least(1), metavar="N", help=words)
    words = f"which parts are timed, of {', '.join(known)} (default: all)"
    parser.add_argument("--parts", type=command.words, default=known, metavar="PART,...", help=words)
    words = "timed calls of each after one to warm up; the median counts (default: 5)"
    parser.add_argument("--runs", type=command.at_least(1), default=5, metavar="N", help=words)
    parser.add_argument("--json", type=command.local, metavar="FILE", help="for everything measured")
    words = "for profiles of one more call of each part, for TensorBoard's profiler or Perfetto"
    parser.add_argument("--trace", type=command.local, metavar="FOLDER", help=words)
    config, values = command.parse_recipe(parser, arguments, lambda values: PRESETS[values.preset]().config)
    config_lib.validate(config, paths=False)
    if unknown := set(values.parts) - set(known):
        raise UserError(f"--parts: {unknown.pop()!r} is unknown; choose of {', '.join(known)}")
    if values.config is None:
        architecture = PRESETS[values.preset]().architecture
        if set(program.used_rewards(config)) != set(architecture.rewards):
            raise UserError(f"--preset={values.preset} has the sizes of {', '.join(architecture.rewards)} only: "
                            "give other rewards no weight, or use --config")  # fmt: skip
    elif config.model.path:
        architecture = program.read_architecture(config)
    else:
        architecture = architectures.published(config, "flux-dev")[0]
    if values.depth:
        architecture = shallow(architecture, depth(values.depth))
    mesh = sharding.make_mesh(config.mesh)
    each = values.device_batch or (DEVICE_BATCH.get(values.preset, 1) if values.config is None else 1)
    config.data.batch_size = each * sharding.batch_parts(mesh) * config.optim.accumulation
    return config, architecture, values


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line. Raises UserError."""
    config, architecture, values = parse(arguments)
    report = benchmark(config, architecture, values.runs, tuple(values.parts), trace=values.trace)
    if values.json:
        values.json.parent.mkdir(parents=True, exist_ok=True)
        values.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(errors.run(main))
