"""The collectives of a compiled program, read from its HLO text, with how often each one runs.

XLA's own ``cost_analysis`` counts the body of a loop once, and says nothing of communication. Here computations are
walked from the entry, and a loop's body counts as often as the loop turns: by ``known_trip_count`` where the compiler
noted it (CPU, GPU), else from the loop's counter (TPU): its start, its step, and the constant that it is compared with.

Between TPU slices there are none: libtpu writes what goes there as a transfer to the host and back, to be summed or
passed on by a runtime of its own (Megascale). That is a collective of one chip of every slice here.

A gather that libtpu fuses with the work beside it (async collective fusion) is written where it starts, in all that it
runs beside, be it in a loop, and where it ends: a chain, of one number. It counts where it starts.

Written against the text that jaxlib 0.10.2, its CUDA plugin and libtpu 0.0.42 print.
"""

import itertools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")


class Collective(NamedTuple):
    """One collective instruction.

    Attributes:
      kind: one of ``KINDS``.
      name: of the instruction.
      bytes: that a device puts in: of an all-gather its own part, of all others the whole operand.
      groups: devices that exchange with each other, by their place in the program's order of devices. Of a permutation,
        the pairs (from, to).
      runs: how often it runs in one call of the program.
    """

    kind: str
    name: str
    bytes: int
    groups: tuple[tuple[int, ...], ...]
    runs: int

    @property
    def traffic(self) -> float:
        """Bytes that a device must at least receive in one run: all algorithms that waste nothing agree on it.

        Of n devices, each gets the other n - 1 parts of a gather, sums its part of a reduce-scatter from n - 1 others,
        and does both in an all-reduce.
        """
        n = max(map(len, self.groups), default=1)
        if self.kind in ("collective-permute", "collective-broadcast"):
            return self.bytes if self.groups else 0.0
        factor = {"all-gather": n - 1, "all-reduce": 2 * (n - 1) / n}.get(self.kind, (n - 1) / n)
        return factor * self.bytes


class Collectives(NamedTuple):
    """``found`` in a program, and ``unknown``: names of loops around some of them whose length could not be read; what
    is inside counts once."""

    found: tuple[Collective, ...]
    unknown: tuple[str, ...]


def collectives(text: str, devices: int) -> Collectives:
    """Reads a program's text (``Compiled.as_text()``) for so many devices.

    Raises ValueError for text without an entry computation, and for replica groups that are not understood.
    """
    module = parse(text)
    found, unknown, chains = [], [], set()

    def walk(computation: str, runs: int) -> bool:
        """Notes what a computation holds; returns whether there was something."""
        before = len(found)
        body = module.computations[computation]
        for instruction in body.values():
            if is_collective(instruction):
                kind = instruction.opcode.removesuffix("-start")
                chain = _chain(instruction)
                if chain is None or chain not in chains:
                    found.append(_collective(kind, instruction, body, devices, runs))
                chains.add(chain)
            elif instruction.opcode == "send" and "_xla_megascale_transfer_type" in instruction.attributes:
                found.append(_between_slices(instruction, body, devices, runs))
            elif instruction.opcode == "while":
                turns = trip_count(module, body, instruction)
                inside = walk(instruction.called("body"), runs * (1 if turns is None else turns))
                if inside and turns is None:
                    unknown.append(instruction.name)
            elif instruction.opcode == "conditional":
                _dearest(found, [lambda branch=branch: walk(branch, runs) for branch in instruction.branches()])
            elif instruction.opcode == "fusion":
                start = len(found)
                walk(instruction.called("calls"), runs)
                found[start:] = [_scattered(item, instruction) for item in found[start:]]
            elif instruction.opcode in ("call", "call-start"):  # the latter on TPU v7's cores for collectives
                walk(instruction.called("to_apply"), runs)
            elif instruction.opcode == "async-start":
                walk(instruction.called("calls"), runs)
        return len(found) > before

    walk(module.entry, 1)
    return Collectives(tuple(found), tuple(unknown))


def is_collective(instruction: "Instruction") -> bool:
    """Whether an instruction is one of ``KINDS``, or where one starts."""
    return instruction.opcode.removesuffix("-start") in KINDS


def _dearest(found: list[Collective], branches: list) -> None:
    """Of a conditional's branches, keeps the one that moves most."""
    start, best = len(found), []
    for branch in branches:
        branch()
        taken, found[start:] = found[start:], []
        best = max(best, taken, key=lambda items: sum(item.traffic * item.runs for item in items))
    found.extend(best)


def _scattered(item: Collective, fusion: "Instruction") -> Collective:
    """TPU's fused reduce-scatter is an all-reduce of which the fusion lets out a part."""
    if item.kind == "all-reduce" and sum(sizes(fusion.type)) < item.bytes:
        return item._replace(kind="reduce-scatter")
    return item


# --- the text ---------------------------------------------------------------------------------------------------------


class Instruction(NamedTuple):
    """A line: of a constant, ``operands`` is its value, of a parameter its number."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    root: bool

    def called(self, attribute: str) -> str:
        match = re.search(rf"\b{attribute}=%?([\w.-]+)", self.attributes)
        if match is None:
            raise ValueError(f"HLO: {self.opcode} {self.name} names no {attribute}")
        return match[1]

    def branches(self) -> list[str]:
        if match := re.search(r"branch_computations=\{([^}]*)\}", self.attributes):
            return re.findall(r"[\w.-]+", match[1])
        return [self.called("true_computation"), self.called("false_computation")]


Computation = dict[str, Instruction]


class Module(NamedTuple):
    entry: str
    computations: dict[str, Computation]


_HEAD = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{\s*$")
# The type holds no blank before a word and a bracket, so that the first such place is the opcode.
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.-]+) = (.*?) ([a-z][a-z0-9-]*)\((.*)$")


def parse(text: str) -> Module:
    """Reads a program's text. Raises ValueError for text without an entry computation."""
    computations, entry, current = {}, None, None
    for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
        if not line.startswith(" "):
            if match := _HEAD.match(line):
                current = computations[match[2]] = {}
                entry = match[2] if match[1] else entry
        elif current is not None and (match := _LINE.match(line)):
            root, name, kind, opcode, rest = match.groups()
            inside = _until_closed(rest)
            if opcode in ("constant", "parameter"):
                operands = (inside,)
            else:
                # An operand may be written with its type before it: its name comes last.
                operands = tuple(part.split()[-1].lstrip("%") for part in _split(inside))
            current[name] = Instruction(name, kind, opcode, operands, rest[len(inside) + 1 :], bool(root))
    if entry is None:
        raise ValueError("HLO: the text has no ENTRY computation")
    return Module(entry, computations)


def _until_closed(rest: str) -> str:
    depth = 1
    for place, letter in enumerate(rest):
        depth += (letter in "({[") - (letter in ")}]")
        if not depth:
            return rest[:place]
    return rest


def _split(text: str) -> Iterator[str]:
    """The parts between commas that stand in no bracket."""
    depth, start = 0, 0
    for place, letter in enumerate(text):
        depth += (letter in "({[") - (letter in ")}]")
        if letter == "," and not depth:
            yield text[start:place]
            start = place + 1
    if text[start:].strip():
        yield text[start:]


def sizes(kind: str, memory: bool = False) -> list[int]:
    """Bytes of every array in a type, padding apart; with ``memory``, 0 of those that lie in a TPU's vector memory."""
    found = []
    for name, dims, layout in re.findall(r"\b([a-z][a-z0-9]*)\[([\d,<=]*)\](\{[^}]*\})?", kind):
        digits = re.search(r"\d+", name)  # f32, bf16, s4, f8e4m3fn; pred; token, which is nothing
        bits = 8 if name == "pred" else int(digits[0]) if digits else 0
        there = not memory or re.search(r"S\([1-9]\)", layout) is None
        found.append(there * math.prod(int(size.lstrip("<=")) for size in dims.split(",") if size) * bits // 8)
    return found


def size(instruction: Instruction, memory: bool = False) -> int:
    """Bytes of an instruction's result, as ``sizes`` counts them."""
    return sum(sizes(instruction.type, memory))


# --- collectives ------------------------------------------------------------------------------------------------------


def _collective(kind: str, instruction: Instruction, body: Computation, devices: int, runs: int) -> Collective:
    size = sum(sum(sizes(body[name].type)) for name in instruction.operands)
    text = instruction.attributes
    if kind == "collective-permute":
        pairs = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", text)
        groups = tuple(tuple(map(int, pair)) for pair in re.findall(r"\{(\d+),(\d+)\}", pairs[1] if pairs else ""))
    else:
        groups = _groups(text, devices)
    return Collective(kind, instruction.name, size, groups, runs)


def _chain(instruction: Instruction) -> tuple[str, ...] | None:
    """What the parts of a fused asynchronous collective have in common; None for one that stands alone."""
    numbers = [re.search(rf'\b{name}="?(\d+)', instruction.attributes) for name in ("chain_id", "channel_id")]
    return None if numbers[0] is None else tuple(match and match[1] for match in numbers)


def _between_slices(instruction: Instruction, body: Computation, devices: int, runs: int) -> Collective:
    """Of ``{1,2}x{0:3}``, the slices and the numbers of chips in each, every chip with those of its number."""
    text = instruction.attributes
    kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', text)[1].lower().replace("_", "-")
    match = re.search(r'_xla_megascale_target="\{([\d,:]+)\}x\{([\d,:]+)\}"', text)
    if kind not in KINDS or match is None:
        raise ValueError(f"HLO: transfer between slices not understood: {text[:300]}")
    slices, chips = (_numbers(part) for part in match.groups())
    each = devices // len(slices)
    groups = tuple(tuple(each * place + chip for place in range(len(slices))) for chip in chips)
    return Collective(kind, instruction.name, sum(sizes(body[instruction.operands[0]].type)), groups, runs)


def _numbers(text: str) -> list[int]:
    """``0,2:4`` as 0, 2, 3, 4."""
    ends = [[int(end) for end in part.split(":")] for part in text.split(",")]
    return [number for end in ends for number in range(end[0], end[-1] + 1)]


def _groups(text: str, devices: int) -> tuple[tuple[int, ...], ...]:
    """Replica groups in the three ways that XLA writes them: a list, an iota that is reshaped, axes of a mesh."""
    if match := re.search(r"replica_groups=\{(\{[\d,{}]*\})?\}", text):
        groups = [tuple(map(int, group.split(","))) for group in re.findall(r"\{(\d[\d,]*)\}", match[0])]
        return tuple(groups) or (tuple(range(devices)),)
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        count, size = int(match[1]), int(match[2])
        dims = [int(dim) for dim in match[3].split(",")]
        order = [int(axis) for axis in match[4].split(",")] if match[4] else list(range(len(dims)))
        return _chunks(_iota(dims, order), count, size)
    order = r"(?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))?"  # of the mesh's devices, where it is not 0, 1, ...
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\]" + order + r" \{([^}]*)\}(.)", text):
        if match[5] != "," or "device_ids" in match[1]:
            raise ValueError(f"HLO: replica groups not understood: {match[0]}")
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", match[1])}
        groups = _mesh_groups(sizes, [part.strip() for part in match[4].split(",") if part.strip()])
        if not match[2]:
            return groups
        dims = [int(dim) for dim in match[2].split(",")]
        ids = _iota(dims, [int(axis) for axis in match[3].split(",")] if match[3] else list(range(len(dims))))
        return tuple(tuple(ids[place] for place in group) for group in groups)
    raise ValueError(f"HLO: replica groups not understood: {text[:200]}")


def _mesh_groups(sizes: dict[str, int], axes: list[str]) -> tuple[tuple[int, ...], ...]:
    """Devices that differ in the named axes only; ``'x':(2)4`` is the part of length 4 behind a part of length 2."""
    dims, varying = [], []
    parts = {}
    for axis in axes:
        match = re.fullmatch(r"'(\w+)'(?::\((\d+)\)(\d+))?", axis)
        if match is None or match[1] not in sizes or match[1] in parts:
            raise ValueError(f"HLO: replica groups not understood: {axis}")
        before, length = (int(match[2]), int(match[3])) if match[2] else (1, sizes[match[1]])
        parts[match[1]] = before, length, sizes[match[1]] // (before * length)
    for name, size in sizes.items():
        split = parts.get(name, (size, 1, 1))
        dims += split
        varying += [False, True, False]
    fixed = [axis for axis, vary in enumerate(varying) if not vary]
    moving = [axis for axis, vary in enumerate(varying) if vary]
    size = math.prod(dims[axis] for axis in moving)
    return _chunks(_iota(dims, fixed + moving), math.prod(dims) // size, size)


def _iota(dims: list[int], order: list[int]) -> list[int]:
    """0, 1, ... in the shape ``dims``, its axes transposed to ``order``, flat."""
    strides = [math.prod(dims[axis + 1 :]) for axis in range(len(dims))]
    places = itertools.product(*(range(dims[axis]) for axis in order))
    return [sum(at * strides[axis] for at, axis in zip(place, order, strict=True)) for place in places]


def _chunks(ids: list[int], count: int, size: int) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(ids[group * size : (group + 1) * size]) for group in range(count))


# --- loops ------------------------------------------------------------------------------------------------------------


def trip_count(module: Module, body: Computation, loop: Instruction) -> int | None:
    """How often a loop turns, None if that cannot be read."""
    if match := re.search(r'"known_trip_count":\{"n":"?(\d+)"?\}', loop.attributes):
        return int(match[1])
    condition = module.computations[loop.called("condition")]
    root = next(instruction for instruction in condition.values() if instruction.root)
    if root.opcode != "compare" or "direction=LT" not in root.attributes:
        return None
    counter, limit = condition[root.operands[0]], _constant(condition, root.operands[1])
    if counter.opcode != "get-tuple-element" or limit is None:
        return None
    index = int(re.search(r"index=(\d+)", counter.attributes)[1])
    start = _start(body, loop, index)
    step = _step(module.computations[loop.called("body")], index)
    return None if start is None or not step else max(0, -(-(limit - start) // step))


def _constant(body: Computation, name: str) -> int | None:
    instruction = body.get(name)
    while instruction is not None and instruction.opcode in ("copy", "bitcast", "convert", "reshape"):
        instruction = body.get(instruction.operands[0])
    if instruction is None or instruction.opcode != "constant":
        return None
    return int(instruction.operands[0]) if re.fullmatch(r"-?\d+", instruction.operands[0]) else None


def _start(body: Computation, loop: Instruction, index: int) -> int | None:
    carried = body[loop.operands[0]]
    return _constant(body, carried.operands[index]) if carried.opcode == "tuple" else None


def _step(body: Computation, index: int) -> int | None:
    root = next(instruction for instruction in body.values() if instruction.root)
    if root.opcode != "tuple":
        return None
    added = body[root.operands[index]]
    while added.opcode in ("copy", "bitcast"):
        added = body[added.operands[0]]
    if added.opcode != "add":
        return None
    steps = [_constant(body, name) for name in added.operands]
    return next((step for step in steps if step is not None), None)
