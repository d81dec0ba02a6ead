"""Reading optimised HLO: the text in which XLA prints what a device will run.

A module is computations, a computation is instructions.  Types, operands and called computations
are taken apart; other attributes stay text, in which `Instruction.attribute` looks.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from math import prod

import numpy as np

from moecc.errors import InputError
from moecc_backends.xla.kernels.attention import score_pairs_of
from moecc_backends.xla.trace.values import most_rounds

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


# What a compiled program does on one device: its collectives and its multiplications.
#
# Both are counted from optimised HLO, bodies of loops as often as they run; ``cost_analysis``
# counts
# them once.  The bytes of a collective are those of its *full tensor*, the larger of what goes in
# and
# what comes out, as MaxText and the reports of XLA's profiler have them; what crosses a wire is
# less.

# The multiplications of a convolution in HLO, which is how a TPU spells a dot.
#
# A batch axis of a dot may come back as a spatial axis, with padding and dilation chosen such that
# each output meets one input: the product of all sizes would count what is multiplied with padding.

_FIELDS = ("size", "stride", "pad", "lhs_dilate", "rhs_dilate")


def convolution_flops(where: Computation, instruction: Instruction) -> int:
    """Return 2 · products of the convolution `instruction` in `where`, those with padding left out.

    With output features and batch from the result and input features from the kernel, grouped
    convolutions need no case of their own.
    """
    left, kernel = (where.operand(instruction, i).shapes[0].sizes for i in (0, 1))
    out = instruction.shapes[0].sizes
    labels = re.split(r"_|->", instruction.attribute("dim_labels"))
    left_at, kernel_at, out_at = ({c: i for i, c in enumerate(text)} for text in labels)
    window = _window(instruction.attribute("window"))
    spatial = sorted(c for c in out_at if c.isdigit())
    pairs = (
        _pairs(left[left_at[c]], kernel[kernel_at[c]], out[out_at[c]], *_along(window, int(c)))
        for c in spatial
    )
    features = kernel[kernel_at["i"]] * out[out_at["f"]] * out[out_at["b"]]
    return 2 * features * prod(pairs)


def _window(text: str) -> dict[str, list[str]]:
    entries = dict(re.findall(r"(\w+)=([\w\-]+)", text))
    return {name: entries[name].split("x") for name in _FIELDS if name in entries}


def _along(window: dict[str, list[str]], axis: int) -> tuple[int, int, int, int]:
    """Return stride, low padding, and the dilations of input and kernel along one axis."""

    def entry(name: str) -> int:
        return int(window[name][axis]) if name in window else 1

    low = int(window["pad"][axis].split("_")[0]) if "pad" in window else 0
    return entry("stride"), low, entry("lhs_dilate"), entry("rhs_dilate")


@cache
def _pairs(
    size: int, kernel: int, out: int, stride: int, low: int, lhs_dilate: int, rhs_dilate: int
) -> int:
    """Return how many pairs of output and kernel entries meet an input that is there."""
    at = np.arange(out)[:, None] * stride + np.arange(kernel)[None, :] * rhs_dilate - low
    is_there = (at >= 0) & (at <= (size - 1) * lhs_dilate) & (at % lhs_dilate == 0)
    return int(is_there.sum())


# Which collectives of a scheduled program have computation beside them.
#
# In the text of a compiled program the order of instructions is the order in which a device begins
# them. A collective that is one instruction is waited for. One that has a start and a done runs
# while what stands between them does; and a TPU writes some as a chain of fusions, of which those
# in the middle compute. Only products and kernels count: what else stands there is soon done.


def overlapped(
    where: Computation, chains: Mapping[str, str], multiplying: Collection[str]
) -> frozenset[str]:
    """Return the names of instructions whose collectives run beside a product.

    Args:
      where: a computation, in the order of its schedule.
      chains: of instructions that are parts of a collective, what its parts have in common.
      multiplying: the names of instructions that multiply, loops and calls included.
    """
    order = list(where)
    at = {instruction.name: number for number, instruction in enumerate(order)}
    busy = [instruction.name in multiplying for instruction in order]
    beside = {
        instruction.name
        for instruction in order
        if instruction.opcode.endswith("-start")
        and any(busy[at[instruction.name] + 1 : _end(order, at, instruction)])
    }
    for chain in set(chains.values()):
        parts = [name for name, of in chains.items() if of == chain]
        numbers = [at[name] for name in parts]
        if any(busy[min(numbers) : max(numbers) + 1]):
            beside.update(parts)
    return frozenset(beside)


def _end(order: list[Instruction], at: Mapping[str, int], start: Instruction) -> int:
    """Return the number of the instruction that waits for what `start` began.

    That is the end where nothing here does: another turn of a loop waits.
    """
    last, waits = start, True
    while waits:
        following = next(_waiting(order, at, last), None)
        if following is None:
            return len(order)
        last, waits = following, following.opcode.endswith("-update")
    return at[last.name]


def _waiting(
    order: list[Instruction], at: Mapping[str, int], begun: Instruction
) -> Iterator[Instruction]:
    for instruction in order[at[begun.name] + 1 :]:
        if instruction.opcode.endswith(("-done", "-update")) and begun.name in instruction.operands:
            yield instruction


# What kernels of Pallas multiply.

_PRODUCTS = {"splash_mha_fwd": 2, "splash_mha_dq": 3, "splash_mha_dkv": 4}
"""Products of the size of the scores of a kernel, by the beginning of its name: scores and values;
in a gradient scores and their gradient, and with these the gradient of queries or of keys, and with
the scores that of values."""

_FLOATS = ("bf16", "f32")
"""The types that these kernels compute in, as HLO spells them."""


def pallas_flops(where: Computation, instruction: Instruction) -> int | None:
    """Return the FLOPs of a kernel of attention; None of any other kernel.

    Two for each pair of a query and a key, entry of a head, and product.
    """
    products = next((n for name, n in _PRODUCTS.items() if name in instruction.source), None)
    pairs = score_pairs_of(instruction.source)
    if products is None or pairs is None:
        return None
    operands = (where.operand(instruction, i).shapes[0] for i in range(len(instruction.operands)))
    # Queries are the first numbers; the integers before say which blocks are skipped.  A batch of
    # one sequence has no axis.
    queries = next(shape.sizes for shape in operands if shape.dtype in _FLOATS)
    return 2 * products * pairs * prod(queries[:-2]) * queries[-1]


KINDS = (
    "all-gather", "all-reduce", "all-to-all", "reduce-scatter", "ragged-all-to-all",
    "collective-permute", "collective-broadcast",
)  # fmt: skip
"""The collectives, as HLO names them."""

_REDUCE_SCATTER = "all-reduce-scatter"
"""What a TPU calls a reduce-scatter: a fusion of an all-reduce and the slice that is kept."""

_MATMUL_TARGETS = ("__cublas$gemm", "__cublas$lt$matmul", "__cublas$lt$matmul$f8", "__triton_gemm")
_OPAQUE_TARGETS = ("tpu_custom_call", "__gpu$xla.gpu.triton", "mosaic", "__onednn", "__cudnn$fmha")
"""Targets that may multiply, in a way that HLO does not tell."""


@dataclass(frozen=True, slots=True)
class HloCollective:
    """One collective of the text.

    Attributes:
      kind: one of `KINDS`.
      size_bytes: of the full tensor, each time.
      group_size: how many devices take part in one exchange.
      times: how often it runs.
      dtype: the element type of what is moved.
      source: what it was traced from.
      worst_times: how often it runs at most, where a loop has one turn if a routing is balanced.
      chain: what its parts have in common, where a TPU computes between them; else empty.
      is_overlapped: whether the schedule has products between its start and its end.
    """

    kind: str
    size_bytes: int
    group_size: int
    times: int
    dtype: str
    source: str
    chain: str = ""
    worst_times: int = 1
    is_overlapped: bool = False

    @property
    def total_bytes(self) -> int:
        """The bytes of all its runs."""
        return self.size_bytes * self.times


@dataclass(frozen=True)
class Census:
    """What one device does.

    Attributes:
      collectives: every collective of the program, those within one device left out.
      flops: of all dots and convolutions, a multiplication and an addition each.
      unknown_loops: loops whose number of turns is not known when compiling; their bodies are
        counted once.  Rounds of an exchange are not among them: there is one if it is balanced.
      opaque: kernels that may multiply in a way that HLO does not tell, by name.
    """

    collectives: tuple[HloCollective, ...]
    flops: int
    unknown_loops: int = 0
    opaque: Counter[str] = field(default_factory=Counter)

    def by_kind(self) -> dict[str, dict[str, int]]:
        """Return for each kind the ``count`` in the text, ``runs`` and ``bytes``.

        Where rounds of an exchange may be more than one, ``worst_bytes`` are those of the worst
        routing.
        """
        totals: dict[str, dict[str, int]] = {}
        for collective in self.collectives:
            total = totals.setdefault(collective.kind, {"count": 0, "runs": 0, "bytes": 0})
            total["count"] += 1
            total["runs"] += collective.times
            total["bytes"] += collective.total_bytes
        for kind in {c.kind for c in self.collectives if c.worst_times != c.times}:
            worst = (c.size_bytes * c.worst_times for c in self.collectives if c.kind == kind)
            totals[kind]["worst_bytes"] = sum(worst)
        return dict(sorted(totals.items()))

    def overlap(self) -> dict[str, dict[str, int]]:
        """Return for each kind the bytes ``overlapped_bytes`` beside products, and the exposed."""
        totals: dict[str, dict[str, int]] = {}
        for collective in self.collectives:
            empty = {"overlapped_bytes": 0, "exposed_bytes": 0}
            key = "overlapped_bytes" if collective.is_overlapped else "exposed_bytes"
            totals.setdefault(collective.kind, empty)[key] += collective.total_bytes
        return dict(sorted(totals.items()))


def census(program: str | Module) -> Census:
    """Count what the optimised HLO `program` does on one device.

    Of a branch the arm with most multiplications counts, then with most bytes moved.

    Raises:
      InputError: the text is not an HLO module.
    """
    module = parse_hlo(program) if isinstance(program, str) else program
    return _Counter(module).of(module.entry)


class _Counter:
    """Counts computations, each once."""

    def __init__(self, module: Module) -> None:
        self._module = module
        self._done: dict[str, Census] = {}

    def of(self, name: str) -> Census:
        """Return the census of one run of the computation `name`."""
        if name not in self._done:
            where = self._module.computations[name]
            counted = {i.name: list(self._parts(where, i)) for i in where}
            parts = _scheduled(where, counted)
            opaque: Counter[str] = Counter()
            for part in parts:
                opaque.update(part.opaque)
            self._done[name] = Census(
                tuple(_once(collective for part in parts for collective in part.collectives)),
                sum(part.flops for part in parts),
                sum(part.unknown_loops for part in parts),
                opaque,
            )
        return self._done[name]

    def _parts(self, where: Computation, instruction: Instruction) -> Iterator[Census]:
        kind = instruction.opcode.removesuffix("-start")
        if kind in KINDS:
            moved = _collective(self._module, where, instruction, kind)
            if moved.group_size > 1:
                yield Census((moved,), 0)
        elif instruction.opcode in ("dot", "convolution", "custom-call"):
            yield _product(where, instruction)
        elif instruction.opcode == "while":
            times = self._module.trip_count(where, instruction)
            (body,) = (self.of(name) for name in instruction.called)
            rounds = most_rounds(instruction.source) if times is None else None
            turns = 1 if times is None else times
            most = rounds or turns
            yield Census(
                tuple(
                    replace(c, times=c.times * turns, worst_times=c.worst_times * most)
                    for c in body.collectives
                ),
                body.flops * turns,
                body.unknown_loops + (times is None and rounds is None),
                Counter({target: n * turns for target, n in body.opaque.items()}),
            )
        elif instruction.opcode == "conditional":
            yield max(map(self.of, instruction.called), key=_weight)
        elif instruction.opcode in ("fusion", "call", "async-start", "call-start"):
            yield from map(self._called, instruction.called)

    def _called(self, name: str) -> Census:
        """Return the census of a computation; on a TPU one may be a collective by itself."""
        counted = self.of(name)
        if not name.startswith(_REDUCE_SCATTER):
            return counted
        collectives = tuple(
            replace(c, kind="reduce-scatter") if c.kind == "all-reduce" else c
            for c in counted.collectives
        )
        return replace(counted, collectives=collectives)


def _scheduled(where: Computation, counted: dict[str, list[Census]]) -> list[Census]:
    """Return the parts of a computation, by instruction, its collectives marked as scheduled."""
    chains = {
        i.name: collective.chain
        for i in where
        if i.opcode == "fusion"
        for part in counted[i.name]
        for collective in part.collectives
        if collective.chain
    }
    multiplying = {n for n, parts in counted.items() if any(p.flops or p.opaque for p in parts)}
    beside = overlapped(where, chains, multiplying)
    return [
        replace(part, collectives=tuple(replace(c, is_overlapped=True) for c in part.collectives))
        if name in beside
        else part
        for name, parts in counted.items()
        for part in parts
    ]


def _once(collectives: Iterable[HloCollective]) -> Iterator[HloCollective]:
    """Yield collectives, of the parts of one only the first.

    A TPU that computes while it exchanges has a fusion for the beginning, one for each step and one
    for the end, and writes the whole collective into all of them.
    """
    seen: set[str] = set()
    for collective in collectives:
        if collective.chain not in seen:
            yield collective
        if collective.chain:
            seen.add(collective.chain)


def _weight(counted: Census) -> tuple[int, int]:
    return counted.flops, sum(collective.total_bytes for collective in counted.collectives)


# --- collectives


def _collective(
    module: Module, where: Computation, instruction: Instruction, kind: str
) -> HloCollective:
    shapes = [
        s for i in range(len(instruction.operands)) for s in where.operand(instruction, i).shapes
    ]
    if kind == "ragged-all-to-all":
        # Its other operands are the offsets and sizes of the rows.
        shapes = shapes[:2]
    in_bytes = sum(s.size_bytes for s in shapes)
    out_bytes = sum(s.size_bytes for s in instruction.shapes if s.sizes)
    if instruction.opcode.endswith("-start") and kind != "all-reduce":
        # The start of an exchange returns its operands beside its results.
        out_bytes -= in_bytes
    full = max(in_bytes, out_bytes)
    if kind == "ragged-all-to-all":
        full = max(s.size_bytes for s in shapes)
    dtype = shapes[0].dtype if shapes else instruction.shapes[0].dtype
    group = _group_size(module, instruction)
    chain = re.search(r'chain_id="(\d+)"', instruction.attributes)
    channel = re.search(r"channel_id=(\d+)", instruction.attributes)
    return HloCollective(
        kind,
        full,
        group,
        1,
        dtype,
        instruction.source,
        (f"{chain[1]}/{channel[1]}" if chain and channel else ""),
    )


def _group_size(module: Module, instruction: Instruction) -> int:
    """Return how many devices exchange; HLO lists them, strides over them, or names mesh axes."""
    text = instruction.attributes
    if "source_target_pairs={" in text:
        pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", text)
        return 2 if pairs is None or _moves(pairs[1]) else 1
    mesh = re.search(r"replica_groups=@?mesh\S*\[([^\]]*)\]\s*\{([^}]*)\}", text)
    if mesh is not None:
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh[1]))
        return prod(_mesh_axis(part, sizes) for part in mesh[2].split(",") if part.strip())
    strided = re.search(r"replica_groups=\[\d+,(\d+)\]", text)
    if strided is not None:
        return int(strided[1])
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", text)
    return len(listed[1].split(",")) if listed is not None else module.partitions


def _mesh_axis(text: str, sizes: dict[str, str]) -> int:
    """Return the devices along an axis, or along a part of it, ``'data':(2)4``."""
    part = re.search(r":\(\d+\)(\d+)", text)
    name = re.search(r"'([^']+)'", text)
    return int(part[1]) if part else int(sizes[name[1]]) if name else 1


def _moves(pairs: str) -> bool:
    return any(a != b for a, b in re.findall(r"\{(\d+),(\d+)", "{" + pairs))


# --- products


def _product(where: Computation, instruction: Instruction) -> Census:
    if instruction.opcode == "dot":
        return Census(
            (), _dot_flops(where, instruction, instruction.dimensions("lhs_contracting_dims"))
        )
    if instruction.opcode == "convolution":
        return Census((), convolution_flops(where, instruction))
    target = instruction.attribute("custom_call_target").strip('"')
    if target in _MATMUL_TARGETS:
        dims = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', instruction.attributes)
        along = tuple(map(int, re.findall(r"\d+", dims[1]))) if dims else ()
        return Census((), _dot_flops(where, instruction, along))
    kernel_flops = pallas_flops(where, instruction)
    if kernel_flops is not None:
        return Census((), kernel_flops)
    is_opaque = any(target.startswith(kind) for kind in _OPAQUE_TARGETS)
    return Census((), 0, 0, Counter({target: 1} if is_opaque else {}))


def _dot_flops(where: Computation, instruction: Instruction, along: tuple[int, ...]) -> int:
    """Return 2 · elements of the result · elements summed over."""
    left = where.operand(instruction, 0).shapes[0].sizes
    # A product of cuBLAS returns its workspace as well.
    return 2 * instruction.shapes[0].elements * prod(left[axis] for axis in along)
