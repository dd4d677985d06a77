r"""How much of an update on the CPU is in XLA's own matrix products and convolutions, beside the same in PyTorch.

    python tests/compare/kernels.py [--sizes=small] [--config.KEY=VALUE]

Every product and convolution of an update is run alone, with nothing before or behind it, as often as the update has
it. XLA's programs on these cores do the update in hardly less, where products are large: of small ones, as those of
--sizes=small, the start of each takes longer than in the update. Beside it stands what PyTorch's profiler counts for
the same operations of its update. Sizes, threads and weights are those of side_by_side.py.
"""

import dataclasses
import math
import statistics
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import side_by_side
import torch
from jax.interpreters.partial_eval import dce_jaxpr
from ml_collections import ConfigDict

from srpo_jax import command, errors, program
from srpo_jax.architectures import Architecture

PRODUCT, CONVOLUTION, WHOLE = "matrix products", "convolutions", "whole update"
KINDS = {"dot_general": PRODUCT, "conv_general_dilated": CONVOLUTION}
# The same in PyTorch, by the profiler's names; attention is two products with a softmax between them.
THEIRS = {
    PRODUCT: ("mm", "addmm", "bmm", "baddbmm", "_scaled_dot_product_flash_attention_for_cpu",
              "_scaled_dot_product_flash_attention_for_cpu_backward"),
    CONVOLUTION: ("mkldnn_convolution", "convolution_backward"),
}  # fmt: skip
TURNS = 5  # timed calls: the fastest of an operation counts, the median of an update


@dataclasses.dataclass(frozen=True)
class Operation:
    """A product or convolution: its kind, its operands' shapes and its parameters as JAX writes them."""

    kind: str
    shapes: tuple[tuple[int, ...], ...]
    written: str
    flops: float
    equation: Any = dataclasses.field(compare=False, hash=False)


def live(traced: Any) -> Any:
    """The program of ``jax.jit(...).trace(...)`` without what nobody reads: gradients of frozen kernels."""
    whole = traced.jaxpr.jaxpr
    return dce_jaxpr(whole, [True] * len(whole.outvars))[0]


def operations(jaxpr: Any, times: int = 1) -> Counter[Operation]:
    """How often each is run by a program, loops and branches counted; of branches, the one with most work."""
    found = Counter()
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name in KINDS:
            found[_operation(equation)] += times
        elif name == "cond":
            found += max((operations(branch.jaxpr, times) for branch in equation.params["branches"]), key=total)
        else:
            turns = times * (equation.params["length"] if name == "scan" else 1)
            for inner in _programs(equation.params):
                found += operations(inner, turns)
    return found


def total(found: Counter[Operation]) -> float:
    """FLOPs of all of them."""
    return sum(count * operation.flops for operation, count in found.items())


def _programs(params: dict[str, Any]) -> Iterator[Any]:
    """The programs that an equation calls."""
    for value in params.values():
        if isinstance(value, jax.extend.core.ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, jax.extend.core.Jaxpr):
            yield value


def _operation(equation: Any) -> Operation:
    left, right = (var.aval.shape for var in equation.invars)
    out, params = equation.outvars[0].aval.shape, equation.params
    if equation.primitive.name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        each = math.prod(left[axis] for axis in contracted)
    else:
        spec = params["dimension_numbers"].rhs_spec  # (output features, input features, *space)
        each = math.prod(right[axis] for axis in spec[1:])
    kind = KINDS[equation.primitive.name]
    return Operation(kind, (left, right), str(params), 2.0 * each * math.prod(out), equation)


def seconds(operation: Operation) -> float:
    """Of one run, alone in a program: the fastest, its start included."""
    generator, equation = np.random.default_rng(0), operation.equation
    operands = [jnp.asarray(generator.standard_normal(shape, np.float32)) for shape in operation.shapes]
    compiled = jax.jit(lambda *operands: equation.primitive.bind(*operands, **equation.params)).lower(*operands)
    call = compiled.compile(program.CPU_OPTIONS)
    taken = side_by_side.timed_in_turn({"alone": lambda: jax.block_until_ready(call(*operands))}, TURNS)
    return min(taken["alone"])


def torch_seconds(call: Any) -> dict[str, float]:
    """What PyTorch's profiler says one call spends in products and convolutions, by kind."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    spent = {event.key.removeprefix("aten::"): event.self_cpu_time_total / 1e6 for event in profile.key_averages()}
    return {kind: sum(spent.get(name, 0.0) for name in names) for kind, names in THEIRS.items()}


def measure(config: ConfigDict, architecture: Architecture) -> dict[str, dict[str, float]]:
    """Seconds of both, "ours" and "theirs", and "gflop": of each kind, and of the "whole update"."""
    sides = side_by_side.sides(config, architecture)
    baseline = sides.baseline()
    update = side_by_side.whole(sides.built)
    rows = {kind: {"gflop": 0.0, "ours": 0.0} for kind in THEIRS}
    for operation, count in operations(live(update.function.trace(*update.arguments))).items():
        rows[operation.kind]["gflop"] += count * operation.flops / 1e9
        rows[operation.kind]["ours"] += count * seconds(operation)
    _, call = side_by_side.ours_prepared(update)
    calls = {"ours": call, "theirs": lambda: baseline(sides.inputs)}
    taken = side_by_side.timed_in_turn(calls, TURNS)
    for kind, spent in torch_seconds(calls["theirs"]).items():
        rows[kind]["theirs"] = spent
    whole = {side: statistics.median(spent) for side, spent in taken.items()}
    return rows | {WHOLE: whole | {"gflop": sum(row["gflop"] for row in rows.values())}}


def describe(size: str, rows: dict[str, dict[str, float]]) -> str:
    """The table, and what the ratio of the two updates would be if ours were nothing but its products."""
    lines = [f"--- {size} ---", f"{'':<16} {'GFLOP':>8} {'ours':>8} {'GFLOP/s':>8} {'PyTorch':>8} {'GFLOP/s':>8}"]
    for kind, row in rows.items():
        line = f"{kind:<16} {row['gflop']:8.4g}"
        for side in ("ours", "theirs"):
            line += f" {row[side]:8.3f} {row['gflop'] / row[side]:8.0f}"
        lines.append(line)
    alone, whole = sum(rows[kind]["ours"] for kind in THEIRS), rows[WHOLE]
    lines.append(
        f"ours {whole['theirs'] / whole['ours']:.2f} times as fast; if products were all it does, "
        f"{whole['theirs'] / alone:.2f} times"
    )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line. Raises UserError."""
    parser = command.parser("kernels", __doc__)
    parser.prog = "python tests/compare/kernels.py"
    recipes, _ = side_by_side.parse(parser, arguments)
    for size, config in recipes.items():
        print(describe(size, measure(config, side_by_side.architecture(size))), flush=True)


if __name__ == "__main__":
    sys.exit(errors.run(main))
