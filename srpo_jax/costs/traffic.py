"""What a compiled program moves through a device's memory, read from its HLO text, loops as often as they turn.

Counted is what every instruction reads and writes: of a fusion, its operands and results, of what it slices the slice,
of what it changes in place the change; of a conditional, the branch that moves most. What lies in a TPU's vector memory
(a layout with ``S(1)``) is not in the device's. Kernels count their operands and results once, though attention reads
keys and values again for every block of queries.

Two sums: of instructions that multiply matrices, which read and write beside the products; and of all others, with
nothing to hide behind. What collectives bring is neither, see ``hlo.collectives``.

Written against the text that jaxlib 0.10.2 and libtpu 0.0.42 print.
"""

from typing import NamedTuple

from srpo_jax.costs import hlo
from srpo_jax.costs.hlo import Computation, Instruction, Module

PRODUCTS = ("dot", "convolution")
SLICES = ("dynamic-slice", "slice", "gather")
VIEWS = ("bitcast", "copy")
# Where nothing is read or written: names, views, and the ends of what was counted where it started.
FREE = (
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"),
    *("opt-barrier", "add-dependency", "domain", "iota", "copy-done", "async-done", "async-update", "slice-done"),
    *("call-done", "send", "send-done", "recv", "recv-done", *(f"{kind}-done" for kind in hlo.KINDS)),
)


class Traffic(NamedTuple):
    """Bytes that a device reads and writes in one call: of ``products`` and kernels, and ``between`` them."""

    products: float
    between: float


def of(text: str) -> Traffic:
    """Reads a program's text (``Compiled.as_text()``). Raises ValueError as ``hlo.parse`` does."""
    module = hlo.parse(text)

    def run(name: str) -> Traffic:
        """Of a computation, once."""
        body, products, between = module.computations[name], 0.0, 0.0
        for instruction in body.values():
            turns, inner = 1, None
            if instruction.opcode == "while":
                # Of a loop whose length is unknown, as in ``hlo.collectives``, one turn.
                turns, inner = hlo.trip_count(module, body, instruction), run(instruction.called("body"))
                turns = 1 if turns is None else turns
            elif instruction.opcode == "conditional":
                inner = max(map(run, instruction.branches()), key=sum)
            elif instruction.opcode in ("call", "call-start"):
                inner = run(instruction.called("to_apply"))
            elif instruction.opcode not in FREE and not _gathers(module, instruction):
                moved = _bytes(module, body, instruction)
                inner = Traffic(moved, 0.0) if _multiplies(module, instruction) else Traffic(0.0, moved)
            if inner is not None:
                products, between = products + turns * inner.products, between + turns * inner.between
        return Traffic(products, between)

    return run(module.entry)


def _inside(module: Module, instruction: Instruction) -> list[Instruction]:
    """What a fusion, or a fusion in it, computes; of another instruction, itself."""
    if instruction.opcode != "fusion":
        return [instruction]
    body = module.computations[instruction.called("calls")]
    return [inner for each in body.values() for inner in _inside(module, each)]


def _multiplies(module: Module, instruction: Instruction) -> bool:
    """Whether it is a product, a kernel, or a fusion around one."""
    kernel = instruction.opcode == "custom-call"
    return kernel or any(inner.opcode in PRODUCTS for inner in _inside(module, instruction))


def _gathers(module: Module, instruction: Instruction) -> bool:
    """Whether it is a collective, or a fusion around nothing but the start or the end of one."""
    inside = _inside(module, instruction)
    return any(map(hlo.is_collective, inside)) and not any(inner.opcode in PRODUCTS for inner in inside)


def _bytes(module: Module, body: Computation, instruction: Instruction) -> float:
    """What one run of an instruction reads and writes."""
    if instruction.opcode in ("copy-start", "slice-start"):
        # A result, its source, and a number to wait for.
        return sum(size for size in hlo.sizes(instruction.type, memory=True)[:2])
    operands = [body[name] for name in instruction.operands if name in body]
    reads = [hlo.size(operand, memory=True) for operand in operands]
    writes = hlo.sizes(instruction.type, memory=True)
    if instruction.opcode == "fusion":
        fused = module.computations[instruction.called("calls")]
        reads = [min(size, _read(module, fused, place)) for place, size in enumerate(reads)]
        root = next(inner for inner in fused.values() if inner.root)
        outs = root.operands if root.opcode == "tuple" else (root.name,)
        if len(outs) == len(writes):
            writes = [min(size, _written(fused, name)) for name, size in zip(outs, writes, strict=True)]
    elif instruction.opcode in SLICES:
        reads = [sum(writes)]
    elif instruction.opcode == "dynamic-update-slice":
        reads, writes = reads[1:2], reads[1:2]
    return sum(reads) + sum(writes)


def _read(module: Module, fused: Computation, place: int) -> float:
    """Bytes that a fused computation reads of its parameter of that number: of what is only sliced, the slices."""
    names = [each.name for each in fused.values() if each.opcode == "parameter" and each.operands == (str(place),)]
    return _used(module, fused, names[0]) if names else float("inf")


def _used(module: Module, fused: Computation, name: str) -> float:
    if fused[name].root:
        return float("inf")
    total = 0.0
    for user in fused.values():
        if name not in user.operands or user.opcode == "parameter":
            continue
        if user.opcode in SLICES:
            total += hlo.size(user)
        elif _is_view(module, user):  # made no further than it is used
            total += _used(module, fused, user.name)
        elif user.opcode == "fusion":
            inner = module.computations[user.called("calls")]
            total += sum(_read(module, inner, i) for i, operand in enumerate(user.operands) if operand == name)
        elif user.opcode != "dynamic-update-slice" or user.operands[0] != name:
            return float("inf")
    return total


def _is_view(module: Module, instruction: Instruction) -> bool:
    """Whether it is its operand in another shape or layout, or a fusion that makes nothing but that of it."""
    if instruction.opcode != "fusion":
        return instruction.opcode in VIEWS
    inside = _inside(module, instruction)
    return len(instruction.operands) == 1 and all(inner.opcode in (*VIEWS, "parameter") for inner in inside)


def _written(fused: Computation, name: str) -> float:
    """Bytes that a fused computation writes of a result: of one that it changes in place, the change."""
    made = fused[name]
    while made.opcode == "bitcast":
        made = fused[made.operands[0]]
    return hlo.size(fused[made.operands[1]]) if made.opcode == "dynamic-update-slice" else float("inf")
