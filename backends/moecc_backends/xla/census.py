"""Reading optimised HLO: the text in which XLA prints what a device will run.

A module is computations, a computation is instructions.  Types, operands and called computations
are taken apart; other attributes stay text, in which `Instruction.attribute` looks.
"""

from __future__ import annotations

import operator
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from math import prod
from typing import Any, cast

import numpy as np

from moecc.errors import InputError
from moecc_backends.xla.kernels.attention import score_pairs_of
from moecc_backends.xla.trace.values import Names, most_rounds

ITEMSIZE_BYTES = {
    "pred": 1, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "f8e4m3": 1, "f8e4m3b11fnuz": 1,
    "f8e4m3fnuz": 1, "f8e5m2fnuz": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2, "s32": 4, "u32": 4,
    "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16,
}  # fmt: skip
"""Bytes of an element; tokens and opaque values are not listed, and have none."""

_SHAPE = re.compile(r"([a-z][a-z0-9]*)\[([^\]]*)\]")
_HEAD = re.compile(r"(ENTRY )?%?([^\s(]+) (?:\(.*)?\{\Z")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?(\S+) = ")
_BRACKETS = re.compile(r'"(?:[^"\\]|\\.)*"|[(){}\[\],]')
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
    operands: Names
    attributes: str

    @property
    def size_bytes(self) -> int:
        """The bytes of the result."""
        return sum(s.size_bytes for s in self.shapes)

    def attribute(self, name: str) -> str:
        """Return the text of the attribute `name` up to its end, or an empty string."""
        match = re.search(rf"(?:^|[ ,]){re.escape(name)}=", self.attributes)
        return self.attributes[match.end() : _end_of(self.attributes, match.end())] if match else ""

    def dimensions(self, name: str) -> tuple[int, ...]:
        """Return an attribute such as ``lhs_contracting_dims={1,2}`` as numbers."""
        return tuple(map(int, re.findall(r"\d+", self.attribute(name))))

    @property
    def called(self) -> Names:
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


Number = int | list[Any] | None
"""An integer of a program, or a tuple of such; None for what is not known when compiling."""

_NUMBERS: dict[str, Callable[..., Number]] = {
    **dict.fromkeys(("copy", "bitcast", "convert", "opt-barrier"), lambda x: x),
    **dict.fromkeys(("parameter", "get-tuple-element", "fusion", "call"), lambda *values: None),
    "tuple": lambda *values: list(values),
    "add": operator.add, "subtract": operator.sub, "multiply": operator.mul,
    "LT": operator.lt, "LE": operator.le, "GT": operator.gt, "GE": operator.ge, "NE": operator.ne,
}  # fmt: skip
"""What instructions make of numbers, by opcode, and comparisons by their direction."""

_MOST_TURNS = 1 << 20


@dataclass
class Module:
    """A compiled program as one device runs it.

    Attributes:
      computations: the computations by name.
      entry: the name of the one that runs first.
      partitions: how many devices run it together.
    """

    computations: dict[str, Computation]
    entry: str
    partitions: int

    def trip_count(self, where: Computation, loop: Instruction) -> int | None:
        """Return how often a ``while`` of the computation `where` runs its body.

        That is what XLA has noted, or else how often the counter that it carries passes the
        condition; None where neither is known when compiling.
        """
        noted = _TRIPS.search(loop.attributes)
        if noted:
            return int(noted[1])
        condition, body = (
            self.computations[loop.attribute(n).lstrip("%")] for n in ("condition", "body")
        )
        carried = self._number(where, loop.operands[0])
        for turn in range(_MOST_TURNS):
            is_passed = self._number(condition, condition.root, [carried])
            if not is_passed:
                return None if is_passed is None else turn
            carried = self._number(body, body.root, [carried])
        return None

    def _number(self, where: Computation, name: str, arguments: Sequence[Number] = ()) -> Number:
        """Return what an instruction of `where` makes of the arguments of that computation."""

        @cache
        def number(name: str) -> Number:
            instruction = where.instructions[name]
            opcode, operands, shapes = instruction.opcode, instruction.operands, instruction.shapes
            if opcode == "constant":
                return int(operands[0]) if operands[0].lstrip("-").isdigit() else None
            operation = instruction.attribute("direction") or opcode
            # Arrays are not followed.
            if operation not in _NUMBERS or (len(shapes) == 1 and shapes[0].sizes):
                return None
            try:
                if opcode == "parameter":
                    return arguments[int(operands[0])]
                values: list[Any] = [*map(number, operands)]
                if opcode == "get-tuple-element":
                    return cast("Number", values[0][int(instruction.attribute("index"))])
                if opcode in ("fusion", "call"):
                    called = self.computations[instruction.called[0]]
                    return self._number(called, called.root, values)
                return _NUMBERS[operation](*values)
            except (IndexError, TypeError):
                return None  # one of them is not known

        return number(name)


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
    """Yield lines; an instruction that spans several, as kernels do, becomes one."""
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
    end = _end_of(line, start) + 1 if line[start] == "(" else line.index(" ", start)
    opened = line.index("(", end)
    closed = _end_of(line, opened)
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


def _operands(text: str) -> Names:
    if "%" in text or not text:
        return tuple(_NAME.findall(text))
    # Before it is optimised, a program is printed without the signs.
    return tuple(part.split()[-1] for part in text.split(","))


def _shape(dtype: str, sizes: str) -> HloShape:
    return HloShape(dtype, tuple(int(s.lstrip("<=")) for s in sizes.split(",") if s))


def _end_of(text: str, start: int) -> int:
    """Return where the bracket that opens at `start` closes, or the next comma outside brackets."""
    depth = 0
    for match in _BRACKETS.finditer(text, start):
        if match[0] in "([{":
            depth += 1
        elif match[0] in ")]}":
            depth -= 1
        if depth <= 0 and match[0] in ")]},":
            return match.start()
    return len(text)


# What a compiled program does on one device: its collectives and its multiplications.
#
# Both are counted from optimised HLO, bodies of loops as often as they run; ``cost_analysis``
# counts them once.  The bytes of a collective are those of its *full tensor*, the larger of what
# goes in and what comes out, as MaxText and the reports of XLA's profiler have them; what crosses
# a wire is less.

# The multiplications of a convolution in HLO, which is how a TPU spells a dot.
#
# A batch axis of a dot may come back as a spatial axis, with padding and dilation chosen such that
# each output meets one input: the product of all sizes would count what is multiplied with padding.


def convolution_flops(where: Computation, instruction: Instruction) -> int:
    """Return 2 · products of the convolution `instruction` in `where`, those with padding left out.

    With output features and batch from the result and input features from the kernel, grouped
    convolutions need no case of their own.
    """
    left, kernel = (where.operand(instruction, i).shapes[0].sizes for i in (0, 1))
    out = instruction.shapes[0].sizes
    labels = re.split(r"_|->", instruction.attribute("dim_labels"))
    left_at, kernel_at, out_at = ({c: i for i, c in enumerate(text)} for text in labels)
    window = dict(re.findall(r"(\w+)=([\w\-]+)", instruction.attribute("window")))

    def along(name: str, axis: int, default: int = 1) -> int:
        if name not in window:
            return default
        return int(window[name].split("x")[axis].split("_")[0])

    pairs = (
        _pairs(
            left[left_at[c]],
            kernel[kernel_at[c]],
            out[out_at[c]],
            along("stride", int(c)),
            along("pad", int(c), 0),
            along("lhs_dilate", int(c)),
            along("rhs_dilate", int(c)),
        )
        for c in out_at
        if c.isdigit()
    )
    features = kernel[kernel_at["i"]] * out[out_at["f"]] * out[out_at["b"]]
    return 2 * features * prod(pairs)


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
        for number, instruction in enumerate(order)
        if instruction.opcode.endswith("-start")
        and any(busy[number + 1 : _waiting_for(order, number)])
    }
    for chain in set(chains.values()):
        numbers = [at[name] for name, of in chains.items() if of == chain]
        if any(busy[min(numbers) : max(numbers) + 1]):
            beside.update(order[number].name for number in numbers)
    return frozenset(beside)


def _waiting_for(order: list[Instruction], start: int) -> int:
    """Return the number of the instruction that waits for what instruction `start` began.

    That is the end where nothing here does: another turn of a loop waits.
    """
    begun = order[start].name
    for number, instruction in enumerate(order[start + 1 :], start + 1):
        if begun in instruction.operands:
            if instruction.opcode.endswith("-done"):
                return number
            if instruction.opcode.endswith("-update"):
                begun = instruction.name
    return len(order)


# What kernels of attention multiply.

_PRODUCTS = {
    "splash_mha_fwd": 2, "splash_mha_dq": 3, "splash_mha_dkv": 4,
    "dot_product_attention_fwd": 2, "dot_product_attention_bwd": 5,
}  # fmt: skip
"""Products of the size of the scores of a kernel, by the beginning of its name: scores and values;
in a gradient scores and their gradient, and with these the gradient of queries or of keys, and with
the scores that of values.  The gradient of cuDNN is one kernel."""

_FLOATS = ("bf16", "f32")
"""The types that these kernels compute in, as HLO spells them."""


def attention_flops(where: Computation, instruction: Instruction) -> int | None:
    """Return the FLOPs of a kernel of attention; None of any other kernel.

    Two for each pair of a query and a key, entry of a head, and product.
    """
    products = next((n for name, n in _PRODUCTS.items() if name in instruction.source), None)
    pairs = score_pairs_of(instruction.source)
    if products is None or pairs is None:
        return None
    if instruction.shapes and "dot_product_attention" in instruction.source:
        # Averages or the gradient of queries, ``[batch, head, seq, width]``.
        averages = instruction.shapes[0].sizes
        return 2 * products * pairs * prod(averages[:-2]) * averages[-1]
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
      size_bytes: bytes of the full tensor, each time.
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
    chain: str
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
      flops: the operations of all dots and convolutions, two for each multiplication.
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


# The collectives of a text.


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


# The products of a text.


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
    kernel_flops = attention_flops(where, instruction)
    if kernel_flops is not None:
        return Census((), kernel_flops)
    is_opaque = any(target.startswith(kind) for kind in _OPAQUE_TARGETS)
    return Census((), 0, 0, Counter({target: 1} if is_opaque else {}))


def _dot_flops(where: Computation, instruction: Instruction, along: tuple[int, ...]) -> int:
    """Return 2 · elements of the result · elements summed over."""
    left = where.operand(instruction, 0).shapes[0].sizes
    # A product of cuBLAS returns its workspace as well.
    return 2 * instruction.shapes[0].elements * prod(left[axis] for axis in along)
