r"""Says whether a recipe fits an accelerator that is not there, and how long an update will take.

    python -m srpo_jax.preflight --config=configs/flux_dev_hps.py --topology=v5p:2x2x2 --config.model.attention=splash
    python -m srpo_jax.preflight --config=configs/flux_dev_hps.py --topology=h100:8,h200:8 --device-batch=1 \
        --config.model.attention=cudnn --json=fits.json

Compiles the training update itself, ahead of time: rollout, autoencoder, reward, gradient and optimiser. That takes two
CPU minutes and 4 GB of memory, no weights and no accelerator. Sizes are those of the folders that the recipe names, or
FLUX.1-dev's published ones. The compilers are extra packages: pip install -e '.[preflight-tpu]' (libtpu) and
pip install -e '.[preflight-cuda]' (jax's CUDA plugin, cuDNN), in the versions that belong to jax.

Memory is what the compiler plans for each device, and the text encoders, where they stay beside the update. The time is
a roofline (srpo_jax/costs/roofline.py): "at best" with every published peak reached, "expected" with matrix products
at 60 % of theirs. Exit codes: 0 all fit, 2 something does not, 1 a mistake.
"""

import argparse
import dataclasses
import json
import math
import re
import sys
import time
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from srpo_jax import architectures, benchmark, command, errors, program, sharding
from srpo_jax import config as config_lib
from srpo_jax.algorithm import step
from srpo_jax.architectures import TextArchitecture
from srpo_jax.costs import flops, hlo, roofline, topologies
from srpo_jax.costs.topologies import Target
from srpo_jax.errors import UserError
from srpo_jax.models.compute import join, path_name
from srpo_jax.models.flux import is_modulation
from srpo_jax.program import Architecture, Program
from srpo_jax.weights import folder

GIB = 2.0**30
FUSED = {"tpu": "splash", "gpu": "cudnn"}  # attention backend of a platform
# The training run's compiler optimises more than this one, and may plan this much more memory.
MARGIN = 0.5 * GIB
# JAX takes this share of a GPU's memory unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise.
GPU_DEFAULT_SHARE = 0.75


class Case(NamedTuple):
    """One thing to find out: a validated config, sizes and a target, and the update that they make."""

    config: ConfigDict
    architecture: Architecture
    text: TextArchitecture
    target: Target
    built: Program

    @property
    def name(self) -> str:
        """For a reader."""
        return f"{self.target.name}, {self.config.data.height}x{self.config.data.width}"


def prepare(
    config: ConfigDict, sizes: tuple[Architecture, TextArchitecture], target: Target, device_batch: int | None = None
) -> Case:
    """Builds the update for a target. Raises UserError for what does not fit together; nothing is compiled yet."""
    if config.optim.offload and target.platform == "gpu":
        raise UserError(
            f"--topology={target.name}: GPUs that are not there have no host, whose memory config.optim.offload=True "
            "needs; plan without it, less the bytes of the optimizer"
        )
    mesh = sharding.make_mesh(config.mesh, topologies.devices(target))
    if device_batch is not None:
        config = config.copy_and_resolve_references()
        at_once = device_batch * sharding.batch_parts(mesh)
        if config.data.batch_size % at_once:
            raise UserError(
                f"--device-batch={device_batch}: {target.name} takes {at_once} samples at a time, which do not divide "
                f"config.data.batch_size={config.data.batch_size}; with config.mesh.tensor=N, N devices share a sample"
            )
        config.optim.accumulation = config.data.batch_size // at_once
    return Case(config, *sizes, target, program.build(config, mesh, sizes[0]))


# --- one case ---------------------------------------------------------------------------------------------------------


def check(case: Case) -> dict[str, Any]:
    """Compiles a case and returns all there is to know, for JSON; see ``describe`` for its meaning."""
    config, target, built = case.config, case.target, case.built
    devices = list(built.mesh.devices.flat)
    work = flops.update(config, case.architecture)
    started = time.perf_counter()
    try:
        compiled, refused = built.lower().compile(), None
    except jax.errors.JaxRuntimeError as error:
        compiled, refused = None, _refused(f"{error}")
        if refused is None:
            raise
    except RuntimeError as error:  # of jax.nn, where the backend "cudnn" finds no library
        raise UserError(f"{target.name}: {error} {topologies.INSTALL[target.platform]}") from error
    seconds = time.perf_counter() - started
    memory = _memory(case, compiled, refused)
    found = hlo.Collectives((), ()) if compiled is None else hlo.collectives(compiled.as_text(), len(devices))
    moved = roofline.optimizer_traffic(built.state.params, built.state.opt_state)
    away = roofline.shard_bytes(built.state.opt_state, host=True)
    time_of = roofline.estimate(config, case.architecture.transformer, work, moved, away, found.found, target, devices)
    report = {
        "topology": target.name,
        "device": target.chip.name,
        "devices": len(devices),
        "mesh": dict(built.mesh.shape),
        "jax": jax.__version__,
        "config": config_lib.flatten(config),
        "architecture": dataclasses.asdict(case.architecture.transformer),
        "compile_seconds": seconds,
        "compiled": compiled is not None,
        "memory": memory,
        "model_flops": {name: part.model for name, part in work.items()},
        "hardware_flops": {name: part.hardware for name, part in work.items()},
        "collectives": _traffic(found.found),
        "loops_of_unknown_length": list(found.unknown),
        "seconds": {
            **time_of._asdict(),
            "best": time_of.best,
            "expected": time_of.expected,
            "bound": time_of.bound,
        },
        "fits": compiled is not None and memory["headroom"] >= 0,
    }
    return report | {"advice": advise(case, report)}


def _refused(message: str) -> tuple[str, float] | None:
    """What libtpu says of a program that does not fit: ("planned" or "temporaries", their bytes); None of another."""
    unit = {"K": 2.0**10, "M": 2.0**20, "G": GIB, "T": 2.0**40}
    for what, pattern in (
        ("planned", r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm"),
        ("temporaries", r"required for HLO temporaries \(([\d.]+)([KMGT])\)"),
    ):
        if match := re.search(pattern, message):
            return what, float(match[1]) * unit[match[2]]
    return None


def _memory(case: Case, compiled: Any, refused: tuple[str, float] | None) -> dict[str, Any]:
    """Bytes on a device: the arguments by what they are, the compiler's plan, and what is left."""
    state, built = case.built.state, case.built
    memory = {
        "arguments": {
            "weights": roofline.shard_bytes(state.params),
            "optimizer": roofline.shard_bytes(state.opt_state),
            "ema": roofline.shard_bytes(state.ema),
            "base": roofline.shard_bytes(built.frozen.base),
            "frozen": roofline.shard_bytes(built.frozen._replace(base=None)),
            "batch": roofline.shard_bytes((built.batch, state.rollout, state.step)),
        },
        "text_encoders": encoder_bytes(case) if case.config.data.encode == "online" else 0,
        "host": roofline.shard_bytes(state.opt_state, host=True),
        "capacity": case.target.memory,
    }
    if compiled is None:
        what, size = refused
        memory["planned"] = size + (sum(memory["arguments"].values()) if what == "temporaries" else 0)
    else:
        plan = compiled.memory_analysis()
        memory["temporaries"] = plan.temp_size_in_bytes
        memory["code"] = plan.generated_code_size_in_bytes
        memory["compiler_peak"] = plan.peak_memory_in_bytes
        memory["compiler_arguments"] = plan.argument_size_in_bytes
        # What a program does not read is no argument of its own, and stays on the device: the autoencoder's encoder.
        held = max(plan.argument_size_in_bytes, sum(memory["arguments"].values()))
        results = plan.output_size_in_bytes - plan.alias_size_in_bytes  # what does not take an argument's place
        memory["planned"] = held + results + plan.temp_size_in_bytes + plan.generated_code_size_in_bytes
    memory["needed"] = memory["planned"] + memory["text_encoders"]
    memory["headroom"] = memory["capacity"] - memory["needed"]
    return memory


def encoder_bytes(case: Case) -> int:
    """Bytes of FLUX's text encoders on each device."""
    total, compute = 0, case.built.computes.text
    for network, sizes in (("clip_text", case.text.clip), ("t5", case.text.t5)):
        params = folder.abstract(network, sizes, compute)[1]
        places = sharding.of_tree(case.built.mesh, network, params)
        total += roofline.shard_bytes(
            jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), params, places)
        )
    return total


def _traffic(found: tuple[hlo.Collective, ...]) -> dict[str, dict[str, float]]:
    """By kind: how many instructions, how often they run, and the bytes that a device gets."""
    table = {}
    for item in found:
        row = table.setdefault(item.kind, {"instructions": 0, "runs": 0, "bytes": 0.0})
        row["instructions"] += 1
        row["runs"] += item.runs
        row["bytes"] += item.runs * item.traffic
    return table


# --- what to do about it ----------------------------------------------------------------------------------------------


def rollout_bytes(built: Program) -> int:
    """Bytes of the transformer as the steps of a rollout read it, all of it in one place: without the modulations."""
    params = join(built.state.params, built.frozen.base)
    weights = jax.eval_shape(lambda params: step.for_rollout(built.networks, built.settings, params)[1], params)
    leaves = jax.tree_util.tree_leaves_with_path(weights)
    return sum(leaf.size * leaf.dtype.itemsize for path, leaf in leaves if not is_modulation(path_name(path)))


def advise(case: Case, report: dict[str, Any]) -> list[str]:
    """What makes a case fit, the cheapest first; of one that fits, what makes it faster."""
    config, target, memory = case.config, case.target, report["memory"]
    fused, advice = FUSED[target.platform], []
    samples = config.data.batch_size // config.optim.accumulation // sharding.batch_parts(case.built.mesh)
    if config.model.attention != fused:
        advice.append(f"--config.model.attention={fused}: no attention matrix in memory, and faster")
    if report["fits"]:
        if memory["headroom"] < MARGIN:
            advice.append("little room: the training run's compiler optimises more, and may plan half a GiB more")
        if target.platform == "gpu" and memory["needed"] > GPU_DEFAULT_SHARE * memory["capacity"]:
            advice.append("XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 in the environment: JAX takes 75 % of a GPU by default")
        # Every pass gathers the weights anew.
        bound = report["seconds"]["bound"] == "interconnect"
        if bound and config.data.rollout == "online" and not config.rollout.gather:
            whole = rollout_bytes(case.built)
            if whole < memory["headroom"]:
                advice.append(f"--config.rollout.gather=True: hold all weights in a rollout ({whole / GIB:.1f} GiB), "
                              "and gather them once, not at each of its steps")  # fmt: skip
        if bound and config.optim.accumulation > 1:
            advice.append("a smaller config.optim.accumulation, if it fits: fewer passes gather the weights")
        return advice
    for network in ("transformer", "autoencoder", "reward"):
        if config.remat[network] != "full":
            advice.append(f"--config.remat.{network}=full: keep less for the backward pass")
    if config.optim.merge_terms:
        advice.append("--config.optim.merge_terms=False: the terms pass one after the other")
    if samples > 1:
        passes = config.optim.accumulation * samples
        advice.append(f"--config.optim.accumulation={passes}: one sample a device at a time, not {samples}")
    if memory["text_encoders"]:
        size = memory["text_encoders"] / GIB
        advice.append(f"--config.data.encode=stored: encode the prompts first ({size:.2f} GiB of text encoders)")
    if not config.lora.rank and config.optim.moments != "float8":
        advice.append("--config.optim.weights=bfloat16 --config.optim.moments=float8: weights and moments in 4 bytes a "
                      "parameter, not 12")  # fmt: skip
    if not config.optim.offload and target.platform == "tpu" and memory["arguments"]["optimizer"] > GIB:
        advice.append("--config.optim.offload=True: keep the moments in the hosts' memory "
                      f"({memory['arguments']['optimizer'] / GIB:.2f} GiB)")  # fmt: skip
    if config.optim.ema_decay:
        advice.append(f"--config.optim.ema_decay=0: no average of the weights ({memory['arguments']['ema'] / GIB:.2f} "
                      "GiB)")  # fmt: skip
    if case.built.mesh.shape["data"] > 1:
        advice.append("--config.mesh.data=1 --config.mesh.fsdp=-1: split weights and optimiser state, not copy them")
    if memory["headroom"] < 0:
        count = math.ceil(memory["needed"] / memory["capacity"] * report["devices"])
        advice.append(f"more devices along config.mesh.fsdp: at least {2 ** math.ceil(math.log2(count))} of this kind")
        if samples <= 1 and case.built.mesh.shape["tensor"] == 1 and report["devices"] > 1:
            advice.append("--config.mesh.tensor=2: two devices share a sample's activations (for the same batch)")
        if not config.lora.rank:
            advice.append("--config.lora.rank=16: train low-rank factors, with no gradient and moments of the rest")
        elif config.lora.quantize != "nf4":
            advice.append("--config.lora.quantize=nf4: the frozen transformer in 4 bits (int8: in 8)")
    return advice


# --- for people -------------------------------------------------------------------------------------------------------


def describe(case: Case, report: dict[str, Any]) -> str:
    """A report as text."""
    config, memory, seconds = case.config, report["memory"], report["seconds"]
    mesh = ", ".join(f"{axis} {size}" for axis, size in report["mesh"].items())
    sizes = case.architecture.transformer
    samples = config.data.batch_size // config.optim.accumulation
    lines = [
        f"{case.name}: {report['devices']} x {report['device']}, mesh {mesh}",
        f"  transformer   {flops.parameters(sizes) / 1e9:.3g} billion parameters, {sizes.num_layers} + "
        f"{sizes.num_single_layers} blocks, attention {config.model.attention}, remat {config.remat.transformer}",
        f"  batch         {config.data.batch_size}, {samples} at a time",
        "  memory of a device, GiB",
    ]
    parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in memory["arguments"].items() if size)
    lines.append(f"    arguments   {sum(memory['arguments'].values()) / GIB:8.2f}  ({parts})")
    if report["compiled"]:
        lines.append(f"    temporaries {memory['temporaries'] / GIB:8.2f}")
        lines.append(f"    code        {memory['code'] / GIB:8.2f}")
    lines.append(f"    planned     {memory['planned'] / GIB:8.2f}")
    if memory["text_encoders"]:
        lines.append(f"    encoders    {memory['text_encoders'] / GIB:8.2f}  (text encoders, beside the update)")
    if memory["host"]:
        lines.append(f"    on the host {memory['host'] / GIB:8.2f}  (moments)")
    lines.append(f"    headroom    {memory['headroom'] / GIB:8.2f}  of {memory['capacity'] / GIB:.2f}")
    model, hardware = (sum(report[name].values()) for name in ("model_flops", "hardware_flops"))
    lines.append(f"  TFLOP         {model / 1e12:.4g} of the model, {hardware / 1e12:.4g} of the hardware, an update")
    for kind, row in report["collectives"].items():
        lines.append(f"  {kind:<18} {row['bytes'] / 1e9:9.2f} GB a device in {row['runs']} runs")
    if report["loops_of_unknown_length"]:
        lines.append(f"  counted once, for their length is unknown: {', '.join(report['loops_of_unknown_length'])}")
    parts = ", ".join(f"{name} {sum(seconds[name].values()):.3g}" for name in ("compute", "memory", "interconnect"))
    if report["compiled"]:
        lines.append(f"  seconds       {seconds['best']:.3g} at best ({parts}), {seconds['expected']:.3g} expected")
        mfu = model / report["devices"] / case.target.chip.flops / seconds["expected"]
        lines.append(f"                {config.steps} updates in {_clock(config.steps * seconds['expected'])}, "
                     f"MFU {mfu:.0%}")  # fmt: skip
    lines.append("  fits" if report["fits"] else "  does not fit" + ("; try" if report["advice"] else ""))
    lines += [f"    {line}" for line in report["advice"]]
    return "\n".join(lines)


def _clock(seconds: float) -> str:
    return f"{seconds / 60:.3g} minutes" if seconds < 2 * 3600 else f"{seconds / 3600:.3g} hours"


def table(reports: list[dict[str, Any]]) -> str:
    """Reports as a Markdown table."""
    lines = [
        "| target | images | mesh (data, fsdp, tensor) | samples at a time | arguments, GiB | temporaries | needed "
        "| of | received, GB | s at best | s expected | |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for report in reports:
        memory, seconds, config = report["memory"], report["seconds"], report["config"]
        arguments = sum(memory["arguments"].values()) / GIB
        moved = sum(row["bytes"] for row in report["collectives"].values()) / 1e9
        compiled = [f"{memory['temporaries'] / GIB:.2f}"] if report["compiled"] else ["-"]
        times = [f"{moved:.0f}", f"{seconds['best']:.3g}", f"{seconds['expected']:.3g}"]
        cells = [
            report["topology"],
            f"{config['data.height']}x{config['data.width']}",
            ", ".join(map(str, report["mesh"].values())),
            str(config["data.batch_size"] // config["optim.accumulation"]),
            f"{arguments:.2f}",
            *compiled,
            f"{memory['needed'] / GIB:.2f}",
            f"{memory['capacity'] / GIB:.2f}",
            *(times if report["compiled"] else ["-"] * 3),
            "fits" if report["fits"] else "does not fit",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


# --- the command ------------------------------------------------------------------------------------------------------


def parse(arguments: list[str] | None) -> tuple[list[Case], argparse.Namespace]:
    """Reads a command line: the cases, and the flags. Raises UserError, also for a case that cannot be built."""
    parser = command.parser("preflight", __doc__)
    words = (
        "TPU slice by shape in chips (v4, v5e, v5p, v6e: v5e:4x4, v5p:2x2x2) or GPUs (a100, a100-40gb, h100, "
        "h100-pcie, h200, rtx4090: h100:8, h100:4x8 as hosts x GPUs); several with commas"
    )
    parser.add_argument("--topology", type=command.words, required=True, help=words)
    words = "of the images, HEIGHTxWIDTH, instead of the recipe's; several with commas"
    parser.add_argument("--size", type=command.words, help=words)
    words = "samples that a device takes at a time: sets optim.accumulation"
    parser.add_argument("--device-batch", type=command.at_least(1), metavar="N", help=words)
    words = "blocks of the transformer instead of all"
    parser.add_argument("--depth", type=command.words, metavar="DOUBLE,SINGLE", help=words)
    parser.add_argument("--json", type=command.local, metavar="FILE", help="for everything found, a list")
    config, values = command.parse_recipe(parser, arguments)
    targets = [topologies.parse(name) for name in values.topology]
    configs = []
    for size in values.size or [f"{config.data.height}x{config.data.width}"]:
        match = re.fullmatch(r"(\d+)x(\d+)", size)
        if match is None:
            raise UserError(f"--size={size}: write HEIGHTxWIDTH in pixels, as 720x720")
        sized = config.copy_and_resolve_references()
        sized.data.height, sized.data.width = int(match[1]), int(match[2])
        config_lib.validate(sized, paths=False)
        configs.append(sized)
    sizes = architectures.read(config) if config.model.path else architectures.published(config, "flux-dev")
    if values.depth:
        sizes = benchmark.shallow(sizes[0], benchmark.depth(values.depth)), sizes[1]
    cases = [prepare(sized, sizes, target, values.device_batch) for target in targets for sized in configs]
    return cases, values


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line. Raises UserError."""
    topologies.prepare()
    cases, values = parse(arguments)
    reports = []
    for case in cases:
        reports.append(check(case))
        print(describe(case, reports[-1]), flush=True)
    if len(reports) > 1:
        print("\n" + table(reports))
    if values.json:
        values.json.parent.mkdir(parents=True, exist_ok=True)
        values.json.write_text(json.dumps(reports, indent=2) + "\n", encoding="utf-8")
    if not all(report["fits"] for report in reports):
        sys.exit(2)


if __name__ == "__main__":
    sys.exit(errors.run(main))
