"""The layers of a graph by the locations of its nodes, and which of them repeat one another."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from moecc.ir.graph import Graph, Node, Value, setter_of
from moecc.ir.structure import attributes
from moecc.types.tensor import Axis, Extent, TensorType

_LAYER = re.compile(r"((?:.*?\.)?layers)\.(\d+)(?:\.|$)")


@dataclass
class Layer:
    """Consecutive nodes whose locations share a layer.

    Attributes:
      stack: the location before the number, ``encoder.layers``.
      name: the location up to the number, ``encoder.layers.3``.
      nodes: its nodes, in order.
    """

    stack: str
    name: str
    nodes: list[Node] = field(default_factory=list)


@dataclass(frozen=True)
class Repeated:
    """Layers each of which equals the one `period` before it.

    Attributes:
      start: the first of them.
      period: the layers of one repetition.
      runs: the number of repetitions.
    """

    start: int
    period: int
    runs: int

    @property
    def stop(self) -> int:
        """The first layer after them."""
        return self.start + self.period * self.runs


def stacks_of(graph: Graph) -> list[list[Layer]]:
    """Return the stacks of `graph`: layers that follow one another with nothing in between."""
    stacks: list[list[Layer]] = []
    last: Layer | None = None
    for node in graph:
        match = _LAYER.match(node.loc)
        if match is None:
            last = None
            continue
        name = match[0].rstrip(".")
        if last is None or last.stack != match[1]:
            stacks.append([])
        if last is None or last.name != name:
            last = Layer(match[1], name)
            stacks[-1].append(last)
        last.nodes.append(node)
    return stacks


def repetitions_in(layers: Sequence[Layer]) -> list[Repeated]:
    """Return the repetitions in `layers`: from each position the most, short periods first."""
    classes: dict[object, int] = {}
    keys = [classes.setdefault(key(layer.nodes), len(classes)) for layer in layers]
    found: list[Repeated] = []
    start = 0
    while start < len(keys):
        best = max(
            (_repeated(keys, start, p) for p in range(1, (len(keys) - start) // 2 + 1)),
            key=lambda r: (r.runs > 1, r.runs * r.period, -r.period),
            default=Repeated(start, 1, 1),
        )
        if best.runs > 1:
            found.append(best)
        start = best.stop if best.runs > 1 else start + 1
    return found


def _repeated(keys: Sequence[int], start: int, period: int) -> Repeated:
    stop = start + period
    while stop < len(keys) and keys[stop] == keys[stop - period]:
        stop += 1
    return Repeated(start, period, (stop - start) // period)


def key(nodes: Sequence[Node]) -> tuple[object, ...]:
    """Return what `nodes` compute, with operands from outside as unknowns."""
    numbers: dict[Value, int] = {}
    return tuple(line(node, numbers) for node in nodes)


def line(node: Node, numbers: dict[Value, int]) -> tuple[object, ...]:
    """Return what one node computes, with the values of its layer numbered; adds its own."""
    uses: list[int | TensorType] = [numbers.get(v, v.type) for v in node.operands]
    if node.op.commutative:
        # Which comes first says nothing, and other passes exchange them by other rules.
        uses.sort(key=_rank)
    for value in node.results:
        numbers[value] = len(numbers)
    types = tuple(_type_key(v.type, numbers) for v in node.results)
    return (node.op.name, tuple(uses), attributes(node.attrs), types)


def _rank(use: int | TensorType) -> tuple[int, str]:
    return (use, "") if isinstance(use, int) else (-1, str(use))


def _type_key(type: TensorType, numbers: dict[Value, int]) -> object:
    if not type.extents:
        return type
    return (type.dtype, tuple(_axis_key(a, numbers) for a in type.axes), type.unreduced)


def _axis_key(axis: Axis, numbers: dict[Value, int]) -> object:
    if not isinstance(axis.size, Extent):
        return axis
    return (axis.name, axis.mesh, axis.size.kind, numbers.get(setter_of(axis.size)))


def difference(layer: Layer, other: Layer) -> str:
    """Return the first difference of two layers that are not equal."""
    numbers: dict[Value, int] = {}
    others: dict[Value, int] = {}
    for a, b in zip(layer.nodes, other.nodes, strict=False):
        if line(a, numbers) != line(b, others):
            what = f"its {a.op.name} @{a.loc} uses other parts of its layer than in {other.name}"
            return next(_reasons(a, b), what)
    return f"it has {len(layer.nodes)} operations, and {other.name} has {len(other.nodes)}"


def _reasons(a: Node, b: Node) -> Iterator[str]:
    if a.op is not b.op:
        yield f"it has {a.op.name} @{a.loc} where {b.loc} has {b.op.name}"
        return
    values = [*zip(a.operands, b.operands, strict=False), *zip(a.results, b.results, strict=False)]
    differing = [(x, y) for x, y in values if x.type != y.type and not x.type.extents]
    # Another parameter says more of a layer than the attributes that follow from it.
    yield from (f"its {a.op.name} @{a.loc} has {x!r}, and {b.loc} {y!r}"
                for x, y in differing if x.is_param)  # fmt: skip
    for name, value in a.attrs.items():
        if value != b.attrs[name]:
            yield f"its {a.op.name} @{a.loc} has {name}={value}, and {b.loc} {name}={b.attrs[name]}"
    yield from (f"its {a.op.name} @{a.loc} has {x!r}, and {b.loc} {y!r}" for x, y in differing)
