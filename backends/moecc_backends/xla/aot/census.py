"""What a compiled program does on one device: its collectives and its multiplications.

Both are counted from optimised HLO, bodies of loops as often as they run; ``cost_analysis`` counts
them once.  The bytes of a collective are those of its *full tensor*, the larger of what goes in and
what comes out, as MaxText and the reports of XLA's profiler have them; what crosses a wire is less.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from math import prod

import numpy as np

from moecc_backends.xla.aot.hlo import Computation, Instruction, Module, parse_hlo
from moecc_backends.xla.kernels.attention import score_pairs_of
from moecc_backends.xla.trace.values import most_rounds

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
        replace(
            part, collectives=tuple(replace(c, is_overlapped=True) for c in part.collectives)
        ) if name in beside else part
        for name, parts in counted.items()
        for part in parts
    ]  # fmt: skip


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
