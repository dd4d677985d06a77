"""A plan for people: a report as text, and several as a table."""

from typing import Any

from srpo_jax.costs import host_memory
from srpo_jax.costs.hardware import GIB
from srpo_jax.costs.plan import Candidate
from srpo_jax.weights import folder


def describe(candidate: Candidate, report: dict[str, Any]) -> str:
    """A report as text."""
    config, memory, seconds = candidate.config, report["memory"], report["seconds"]
    mesh = ", ".join(f"{axis} {size}" for axis, size in report["mesh"].items())
    family, sizes = candidate.architecture.family, candidate.architecture.transformer
    samples = config.data.batch_size // config.optim.accumulation
    lines = [
        f"{candidate.name}: {report['devices']} x {report['device']}, mesh {mesh}",
        f"  transformer   {folder.parameters(family.network, sizes) / 1e9:.3g} billion parameters, "
        f"{' + '.join(map(str, report['blocks']))} blocks, attention {config.model.attention}, "
        f"remat {config.remat.transformer}",
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
    save = host_memory.HostMemory(**report["host_memory"])
    lines += [f"  {line}" for line in host_memory.describe(save, candidate.target.host_memory)]
    model, hardware = (sum(report[name].values()) for name in ("model_flops", "hardware_flops"))
    lines.append(f"  TFLOP         {model / 1e12:.4g} of the model, {hardware / 1e12:.4g} of the hardware, an update")
    width = max(18, *map(len, report["collectives"])) if report["collectives"] else 0
    for kind, row in report["collectives"].items():
        lines.append(f"  {kind:<{width}} {row['bytes'] / 1e9:9.2f} GB a device in {row['runs']} runs")
    if report["loops_of_unknown_length"]:
        lines.append(f"  counted once, for their length is unknown: {', '.join(report['loops_of_unknown_length'])}")
    sums = {name: sum(seconds[name].values()) for name in ("compute", "memory", "interconnect")}
    parts = ", ".join(f"{name} {total:.3g}" for name, total in sums.items())
    if seconds["products"] > sums["compute"]:
        parts += f", products' own memory {seconds['products']:.3g}"
    if report["compiled"]:
        lines.append(f"  seconds       {seconds['best']:.3g} at best ({parts}), {seconds['expected']:.3g} expected")
        mfu = model / report["devices"] / candidate.target.chip.flops / seconds["expected"]
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
