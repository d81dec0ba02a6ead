"""Reading optimised HLO: the text in which XLA prints what a device will run.

A module is computations, a computation is instructions.  Types, operands and called computations
are taken apart; other attributes stay text, in which `Instruction.attribute` looks.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from math import prod

from moecc.errors import InputError

ITEMSIZE_BYTES = {
    "pred": 1, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "f8e4m3": 1, "f8e4m3b11fnuz": 1,
    "f8e4m3fnuz": 1, "f8e5m2fnuz": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2, "s32": 4, "u32": 4,
    "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16,
}  # fmt: skip
"""Bytes of an element; what is not listed (tokens, opaque values) has none."""

_SHAPE = re.compile(r"([a-z][a-z0-9]*)\[([^\]]*)\]")
_HEAD = re.compile(r"(ENTRY )?%?([^\s(]+) (?:\(.*)?\{\Z")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?(\S+) = ")
_NAME = re.compile(r"%([^\s,(){}]+)")
_CALLED = re.compile(r"(?:calls|to_apply|body|true_computation|false_computation)=%([^\s,)}]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_PARTITIONS = re.compile(r"num_partitions=(\d+)")


@dataclass(frozen=True, slots=True)
class HloShape:
    """The type of an array: its element type, as HLO spells it, and its sizes."""

    dtype: str
    sizes: tuple[int, ...]

    @property
    def elements(self) -> int:
        """The number of elements."""
        return prod(self.sizes)

    @property
    def size_bytes(self) -> int:
        """The bytes of the elements, padding of the layout left out."""
        return self.elements * ITEMSIZE_BYTES.get(self.dtype, 0)


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
      name: unique in its computation.
      opcode: ``dot``, ``all-gather-start``, ``fusion`` and so on.
      shapes: the type of the result; a tuple's leaves in order.
      operands: the names of the operands; of a constant, its text.
      attributes: what stands behind the operands, as text.
    """

    name: str
    opcode: str
    shapes: tuple[HloShape, ...]
    operands: tuple[str, ...]
    attributes: str

    @property
    def size_bytes(self) -> int:
        """The bytes of the result."""
        return sum(s.size_bytes for s in self.shapes)

    def attribute(self, name: str) -> str:
        """Return the text of the attribute `name` up to its end, or an empty string."""
        match = re.search(rf"(?:^|[ ,]){re.escape(name)}=", self.attributes)
        return _until_comma(self.attributes, match.end()) if match else ""

    def dimensions(self, name: str) -> tuple[int, ...]:
        """Return an attribute such as ``lhs_contracting_dims={1,2}`` as numbers."""
        return tuple(map(int, re.findall(r"\d+", self.attribute(name))))

    @property
    def called(self) -> tuple[str, ...]:
        """The computations that it runs; of a loop, the body; of a branch, all of them."""
        match = _BRANCHES.search(self.attributes)
        branches = _NAME.findall(match[1]) if match else []
        return (*_CALLED.findall(self.attributes), *branches)

    @property
    def source(self) -> str:
        """The ``op_name`` of the metadata: what the instruction was traced from."""
        match = re.search(r'op_name="([^"]*)"', self.attributes)
        return match[1] if match else ""


@dataclass
class Computation:
    """Instructions by name, in order; `root` is the one whose result is returned."""

    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)
    root: str = ""

    def __iter__(self) -> Iterator[Instruction]:
        return iter(self.instructions.values())

    @cached_property
    def parameters(self) -> dict[str, int]:
        """The number of each parameter, by name."""
        return {i.name: int(i.operands[0]) for i in self if i.opcode == "parameter"}

    def operand(self, instruction: Instruction, index: int) -> Instruction:
        """Return the instruction that makes operand `index`."""
        return self.instructions[instruction.operands[index]]


@dataclass
class Module:
    """A compiled program as one device runs it.

    Attributes:
      computations: by name.
      entry: the name of the one that runs first.
      partitions: how many devices run it together.
    """

    computations: dict[str, Computation]
    entry: str
    partitions: int

    def trip_count(self, where: Computation, loop: Instruction) -> int | None:
        """Return how often a ``while`` of the computation `where` runs its body.

        That is what XLA has noted, or else the bound that its condition compares a counter with;
        None where neither is known when compiling.
        """
        noted = _TRIPS.search(loop.attributes)
        if noted:
            return int(noted[1])
        match = re.search(r"condition=%([^\s,)}]+)", loop.attributes)
        condition = self.computations[match[1]] if match else None
        if condition is None:
            return None
        bounds = self._compared(where, loop, condition)
        if bounds is None:
            return None
        return max(-((bounds[0] - bounds[1]) // self._stride(loop, condition)), 0)

    def _stride(self, loop: Instruction, condition: Computation) -> int:
        """Return by how much a turn of the body advances the counter: XLA unrolls some loops."""
        (name,) = re.findall(r"body=%([^\s,)}]+)", loop.attributes)
        body = self.computations[name]
        carried = body.instructions[body.root]
        counters = [i for i in condition if i.opcode == "get-tuple-element"]
        for index in (int(i.attribute("index")) for i in counters):
            if carried.opcode == "tuple" and index < len(carried.operands):
                stride = _added(body, carried.operands[index], index)
                if stride > 0:
                    return stride
        return 1

    def _compared(
        self, where: Computation, loop: Instruction, condition: Computation
    ) -> tuple[int, int] | None:
        """Return the first value of the counter, and the value at which the loop ends."""
        root, inner = condition.instructions[condition.root], condition
        outer: Instruction | None = None
        if root.opcode == "fusion" and root.called:
            outer, inner = root, self.computations[root.called[0]]
            root = inner.instructions[inner.root]
        direction = root.attribute("direction")
        if root.opcode != "compare" or direction not in ("LT", "LE"):
            return None
        numbers = []
        for name in root.operands:
            if outer is not None and name in inner.parameters:
                name = outer.operands[inner.parameters[name]]
                numbers.append(_number(where, loop, condition, name))
            else:
                numbers.append(_number(where, loop, inner, name))
        first, last = numbers
        if first is None or last is None:
            return None
        return first, last + (direction == "LE")


def parse_hlo(text: str) -> Module:
    """Return the module that `text` spells.

    Raises:
      InputError: it is not the text of an HLO module.
    """
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in _joined(text.splitlines()):
        if _ends(line):
            current = None
        elif current is None:
            head = _HEAD.match(line)
            if head is not None:
                current = computations[head[2]] = Computation(head[2])
                entry = head[2] if head[1] else entry
        else:
            _add(current, line)
    if not entry:
        raise InputError("not the text of an HLO module: there is no ENTRY computation")
    partitions = _PARTITIONS.search(text[: text.find("\n")])
    return Module(computations, entry, int(partitions[1]) if partitions else 1)


def _joined(lines: Iterable[str]) -> Iterator[str]:
    """Yield lines; those of an instruction that goes on, as what kernels say does, as one."""
    joined = ""
    for line in lines:
        if joined and not (_ends(line) or _INSTRUCTION.match(line)):
            joined += line
            continue
        if joined:
            yield joined
            joined = ""
        if _INSTRUCTION.match(line):
            joined = line
        else:
            yield line


def _ends(line: str) -> bool:
    """Whether a computation ends with the line."""
    return line.rstrip() == "}" or line.startswith("}, execution_thread")


def _add(computation: Computation, line: str) -> None:
    head = _INSTRUCTION.match(line)
    if head is None:
        return
    # The type of a tuple has spaces in it, any other has none.
    start = head.end()
    end = _closing(line, start) + 1 if line[start] == "(" else line.index(" ", start)
    opened = line.index("(", end)
    closed = _closing(line, opened)
    opcode, inside = line[end:opened].strip(), line[opened + 1 : closed]
    is_literal = opcode in ("constant", "parameter")
    computation.instructions[head[2]] = Instruction(
        head[2],
        opcode,
        tuple(_shape(*match) for match in _SHAPE.findall(line[start:end])),
        (inside,) if is_literal else _operands(inside),
        line[closed + 1 :],
    )
    if head[1]:
        computation.root = head[2]


def _operands(text: str) -> tuple[str, ...]:
    if "%" in text or not text:
        return tuple(_NAME.findall(text))
    # Before it is optimised, a program is printed without the signs.
    return tuple(part.split()[-1] for part in text.split(","))


def _shape(dtype: str, sizes: str) -> HloShape:
    return HloShape(dtype, tuple(int(s.lstrip("<=")) for s in sizes.split(",") if s))


def _closing(text: str, start: int) -> int:
    """Return where the bracket that opens at `start` closes; a string may hold others."""
    depth = 0
    for match in re.compile(r'"(?:[^"\\]|\\.)*"|[(){}\[\]]').finditer(text, start):
        bracket = match[0]
        if bracket in "([{":
            depth += 1
        elif bracket in ")]}":
            depth -= 1
            if depth == 0:
                return match.start()
    return len(text)


def _until_comma(text: str, start: int) -> str:
    """Return the text from `start` to the next comma outside brackets."""
    depth = 0
    for at in range(start, len(text)):
        if text[at] in "([{":
            depth += 1
        elif text[at] in ")]}":
            depth -= 1
        elif text[at] == "," and depth == 0:
            return text[start:at]
    return text[start:]


def _added(body: Computation, name: str, index: int) -> int:
    """Return what `name` adds to the carried value `index` in all, or 0 if it is no such sum."""
    total, instruction = 0, body.instructions[name]
    while instruction.opcode in ("add", "copy"):
        operands = [body.instructions[operand] for operand in instruction.operands]
        constants = [i for i in operands if i.opcode == "constant"]
        terms = [i for i in operands if i.opcode != "constant"]
        if len(terms) != 1 or not all(i.operands[0].isdigit() for i in constants):
            return 0
        total += sum(int(i.operands[0]) for i in constants)
        instruction = terms[0]
    is_counter = instruction.opcode == "get-tuple-element" and instruction.attribute(
        "index"
    ) == str(index)
    return total if is_counter and instruction.operands[0] in body.parameters else 0


def _number(where: Computation, loop: Instruction, inner: Computation, name: str) -> int | None:
    """Return the integer that `name` is when the loop begins: a constant, or carried from one."""
    instruction = inner.instructions[name]
    if instruction.opcode == "get-tuple-element" and instruction.operands[0] in inner.parameters:
        carried = where.operand(loop, 0)
        if carried.opcode != "tuple":
            return None
        instruction = where.operand(carried, int(instruction.attribute("index")))
    while (
        instruction.opcode in ("copy", "bitcast") and instruction.operands[0] in where.instructions
    ):
        instruction = where.instructions[instruction.operands[0]]
    if instruction.opcode != "constant" or not instruction.operands[0].lstrip("-").isdigit():
        return None
    return int(instruction.operands[0])
