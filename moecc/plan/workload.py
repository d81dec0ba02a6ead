"""What a step computes, read from the graph once: its layers, their products and residuals.

Equal layers are one `Part` with a count, so that a plan of a deep model costs no more than that of
a shallow one.  Sizes are global; a layout divides them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod

from moecc.errors import InputError
from moecc.families.experts import choices_kept, expert_layers
from moecc.ir.graph import Graph, Node, Value
from moecc.ir.mesh import mesh_of
from moecc.ir.table.placing import placing
from moecc.plan.batches import Batch
from moecc.plan.residuals import Residuals, residuals
from moecc.plan.shapes import Shape, Shapes

_LAYER = re.compile(r"^(.*?\.?layers\.)(\d+)(?:\.(.*))?$")

HEADS = ("head", "kv_head")


@dataclass(frozen=True)
class Weight:
    """A parameter: its name, its shape, and whether it is a part of experts."""

    name: str
    shape: Shape
    of_experts: bool

    @property
    def elements(self) -> int:
        """How many elements it has."""
        return int(self.shape.elements)


@dataclass(frozen=True)
class Step:
    """An operation that moves or multiplies something.

    Attributes:
      op: its name in the table of operations.
      operands: the shapes of its operands.
      results: the shapes of its results.
      over: of a contraction, the axes that it sums over.
      weights: the parameters among the operands, by position.
      again: whether full rematerialisation computes it twice.
      saved_again: whether rematerialisation that saves attention and combine does.
      exact_rows: by how much less rows there would be if a capacity did not pad them.
      axes: those of all operands, each once.
    """

    op: str
    operands: tuple[Shape, ...]
    results: tuple[Shape, ...]
    over: tuple[str, ...]
    weights: tuple[Weight | None, ...]
    again: bool
    saved_again: bool
    exact_rows: float
    axes: Shape

    @cached_property
    def flops(self) -> float:
        """Two for each multiplication of a contraction, of all devices together."""
        return 2.0 * self.axes.elements if self.op == "contract" else 0.0

    @property
    def has_rows(self) -> bool:
        """Whether it works on the rows of experts."""
        return any(name == "slot" for shape in self.operands for name, _ in shape)


@dataclass(frozen=True)
class Part:
    """A run of equal sublayers.

    Attributes:
      name: ``layers.ffn``, ``encoder.layers.attention``, ``head``.
      count: how many there are.
      steps: the operations of one.
      weights: the parameters of one that no earlier part has.
      looked_up: those whose rows are looked up, and of which no earlier part did so.
      multiplied: the others, in the same way: a tied parameter has a gradient of either kind.
      top_k: of experts: choices a token, 0 in a dense part.
      in_layer: whether it is a part of a layer, which rematerialisation computes again.
    """

    name: str
    count: int
    steps: tuple[Step, ...]
    weights: tuple[Weight, ...]
    looked_up: tuple[Weight, ...] = ()
    multiplied: tuple[Weight, ...] = ()
    top_k: int = 0
    in_layer: bool = True

    @property
    def is_sparse(self) -> bool:
        """Whether tokens are sent to experts here."""
        return any(step.op == "dispatch" for step in self.steps)


@dataclass(frozen=True)
class Layer:
    """Equal units of rematerialisation: layers, or runs of layers that a stack repeats.

    Attributes:
      name: ``layers``, ``encoder.layers``.
      count: how many there are.
      residuals: what the backward pass of one keeps.
      inputs: the shapes of what one takes from the layer before.
    """

    name: str
    count: int
    residuals: Residuals
    inputs: tuple[Shape, ...]


@dataclass(frozen=True)
class Workload:
    """A model and a batch.

    Attributes:
      batch: the batch.
      parts: the sublayers and what stands before and after them.
      layers: the units of rematerialisation.
      weights: all parameters; of equal ones the first, with their number.
      experts: how many experts a layer has at most, 0 in a dense model.
      dropless: whether the experts take every token.
      tensor_sizes: the axes that ``model`` has to divide: heads and neurons.
    """

    batch: Batch
    parts: tuple[Part, ...]
    layers: tuple[Layer, ...]
    weights: tuple[tuple[Weight, int], ...]
    experts: int
    dropless: bool
    tensor_sizes: dict[str, int]

    def __repr__(self) -> str:
        return f"Workload({self.parameters} parameters, {self.batch})"

    @cached_property
    def logits(self) -> tuple[Shape, ...]:
        """The shapes of values over the vocabulary."""
        found = (s for p in self.parts for step in p.steps for s in step.results)
        return tuple(dict.fromkeys(s for s in found if "vocab" in s.names))

    @property
    def model_flops(self) -> float:
        """FLOPs of the forward pass that the model asks for: without the padding of a capacity."""
        return sum(p.count * s.flops * s.exact_rows for p in self.parts for s in p.steps)

    @property
    def parameters(self) -> int:
        """How many parameters there are."""
        return sum(count * weight.elements for weight, count in self.weights)


def workload(graph: Graph, batch: Batch) -> Workload:
    """Read from `graph` what a step of `batch` computes.

    Raises:
      InputError: its layers are rolled, or it lies on a mesh.
    """
    _check_plain(graph)
    layers = expert_layers(graph)
    reader = _Reader(graph, batch)
    return Workload(
        batch=batch,
        parts=tuple(reader.parts()),
        layers=tuple(reader.layers()),
        weights=tuple(reader.weights()),
        experts=max((layer.experts for layer in layers), default=0),
        dropless=all(layer.slots == "ragged" for layer in layers),
        tensor_sizes=_tensor_sizes(graph),
    )


def _check_plain(graph: Graph) -> None:
    if any(node.body is not None for node in graph):
        raise InputError(
            "rolled layers cannot be planned", where=graph.name, hint="-p unroll-layers undoes it"
        )
    if mesh_of(graph) is not None:
        raise InputError(
            "the graph lies on a mesh already", where=graph.name, hint="-p strip-sharding"
        )


def _tensor_sizes(graph: Graph) -> dict[str, int]:
    """Return for heads and neurons the size that the ``model`` axis has to divide."""
    found: dict[str, int] = {}
    for value in (v for node in graph for v in node.results):
        for axis in value.type:
            if axis.name in (*HEADS, "mlp") and isinstance(axis.size, int):
                found[axis.name] = min(axis.size, found.get(axis.name, axis.size))
    return found


def _units(graph: Graph, shape: Callable[[Value], Shape]) -> dict[str, str]:
    """Return for each location the unit of rematerialisation that it belongs to.

    A unit is a layer, or the shortest run of layers that the stack repeats: what ``roll-layers``
    makes one body of.
    """
    layers: dict[str, dict[int, list[Node]]] = {}
    found: dict[str, str] = {}
    for node in graph:
        match = _LAYER.match(node.loc)
        found[node.loc] = f"{match[1]}{match[2]}" if match else node.loc
        if match:
            layers.setdefault(match[1], {}).setdefault(int(match[2]), []).append(node)
    for stack, numbered in layers.items():
        looks = [
            tuple((n.op.name, *map(shape, n.results)) for n in numbered[i])
            for i in sorted(numbered)
        ]
        period = _period(looks)
        for loc in found:
            match = _LAYER.match(loc)
            if match and match[1] == stack:
                found[loc] = f"{stack}{int(match[2]) // period}"
    return found


def _period(items: Sequence[object]) -> int:
    """Return the length of the shortest run that `items` repeat, 1 where they repeat none."""
    count = len(items)
    for length in range(1, count // 2 + 1):
        if count % length == 0 and all(items[i] == items[i % length] for i in range(count)):
            return length
    return 1


class _Reader:
    """Reads shapes and groups nodes; holds what the graph's values look like."""

    def __init__(self, graph: Graph, batch: Batch) -> None:
        self.graph = graph
        self.batch = batch
        self.seen: set[object] = set()
        self.shapes = Shapes()
        self.units: dict[str, list[Node]] = {}
        self.unit_of = _units(graph, self.shape)
        for node in graph:
            self.units.setdefault(self.unit_of[node.loc], []).append(node)
        self.residuals = {unit: residuals(nodes, self.shape) for unit, nodes in self.units.items()}

    def shape(self, value: Value) -> Shape:
        """Return the global shape of a value."""
        rows = any(a.name == "slot" for a in value.type)
        of_experts = rows or self.of_experts(value)
        return self.shapes.of(tuple(self._axes(value, of_experts)))

    def _axes(self, value: Value, of_experts: bool) -> Iterator[tuple[str, float]]:
        for axis in value.type:
            if axis.name == "group":
                continue
            if axis.name == "slot":
                yield "slot", self._slots(value)
            elif axis.name == "expert" and not of_experts:
                yield "choices", self._size(axis.size)
            else:
                yield axis.name, self._size(axis.size)

    def _size(self, size: object) -> float:
        return float(size) if isinstance(size, int) else float(self.batch.size(str(size)))

    def _slots(self, value: Value) -> float:
        """Return the mean rows of an expert, all groups together."""
        place = next(iter(value.type.extents)).value
        node = placing(place)
        tokens = prod(self._size(place.type[n].size) for n in node.attrs["tokens"])
        return tokens * choices_kept(value) / self._size(value.type["expert"].size)

    def of_experts(self, value: Value) -> bool:
        """Whether a parameter has a part for each expert, which meets rows."""
        return (
            value.is_param
            and "expert" in value.type
            and any("slot" in v.type for node in value.users for v in node.operands)
        )

    def weight(self, value: Value) -> Weight:
        """Return the parameter `value`."""
        return Weight(value.name, self.shape(value), self.of_experts(value))

    def weights(self) -> Iterator[tuple[Weight, int]]:
        """Yield the parameters, equal ones as one with their number."""
        counts: dict[object, list[Weight]] = {}
        for value in self.graph.params.values():
            weight = self.weight(value)
            counts.setdefault((weight.shape, weight.of_experts), []).append(weight)
        yield from ((found[0], len(found)) for found in counts.values())

    def layers(self) -> Iterator[Layer]:
        """Yield the layers, equal ones as one."""
        found: dict[object, Layer] = {}
        for unit, nodes in self.units.items():
            match = _LAYER.match(unit)
            if match is None:
                continue
            kept = self.residuals[unit]
            layer = Layer(match[1].rstrip("."), 1, kept, tuple(self._inputs(nodes)))
            key = (layer.name, kept.key, layer.inputs)
            old = found.get(key)
            found[key] = layer if old is None else replace(old, count=old.count + 1)
        yield from found.values()

    def _inputs(self, nodes: list[Node]) -> Iterator[Shape]:
        """Yield what a layer takes from others, once: floating-point values of tokens."""
        own = {v for node in nodes for v in node.results}
        seen: set[Value] = set()
        for value in (v for node in nodes for v in node.operands):
            if value in own or value in seen or value.is_param:
                continue
            seen.add(value)
            carried = value.node is not None and "layers." in value.node.loc
            first = value.node is not None and value.node.op.name == "embedding"
            if value.type.dtype.is_float and "batch" in value.type and (carried or first):
                yield self.shape(value)

    def parts(self) -> Iterator[Part]:
        """Yield the parts, equal ones as one."""
        found: dict[object, Part] = {}
        for loc, nodes in self._sublayers():
            part = self._part(loc, nodes)
            anonymous = tuple(
                tuple(replace(w, name="") for w in group)
                for group in (part.weights, part.looked_up, part.multiplied)
            )
            steps = tuple(
                replace(s, weights=tuple(w and replace(w, name="") for w in s.weights))
                for s in part.steps
            )
            key = (part.name, steps, anonymous)
            old = found.get(key)
            found[key] = part if old is None else replace(old, count=old.count + 1)
        yield from found.values()

    def _sublayers(self) -> Iterable[tuple[str, list[Node]]]:
        found: dict[str, list[Node]] = {}
        for node in self.graph:
            found.setdefault(node.loc, []).append(node)
        return found.items()

    def _part(self, loc: str, nodes: list[Node]) -> Part:
        match = _LAYER.match(loc)
        name = f"{match[1]}{match[3] or ''}".rstrip(".") if match else loc or "model"
        unit = self.residuals[self.unit_of[loc]]
        uses = [(v, n.op.name == "embedding") for n in nodes for v in n.operands if v.is_param]
        weights = tuple(self._new((v, v.name) for v, _ in uses))
        looked_up, multiplied = (
            tuple(self._new((v, (v.name, kind)) for v, kind in uses if kind is wanted))
            for wanted in (True, False)
        )
        steps = tuple(self._step(node, unit) for node in nodes)
        top_k = max((n.attrs["top_k"] for n in nodes if n.op.name == "route"), default=0)
        return Part(
            name, 1, steps, weights, looked_up, multiplied, top_k, in_layer=match is not None
        )

    def _new(self, keyed: Iterable[tuple[Value, object]]) -> Iterator[Weight]:
        """Yield the parameters whose keys are met for the first time."""
        for value, key in keyed:
            if key not in self.seen:
                self.seen.add(key)
                yield self.weight(value)

    def _step(self, node: Node, unit: Residuals) -> Step:
        rows = next((v for v in (*node.operands, *node.results) if "slot" in v.type), None)
        exact = 1.0
        if rows is not None:
            exact = choices_kept(rows, bounded=False) / choices_kept(rows)
        operands = tuple(map(self.shape, node.operands))
        axes = {name: size for s in operands for name, size in s}
        return Step(
            op=node.op.name,
            operands=operands,
            results=tuple(map(self.shape, node.results)),
            over=tuple(node.attrs.get("over", ())) if node.op.name == "contract" else (),
            weights=tuple(self.weight(v) if v.is_param else None for v in node.operands),
            again=node in unit.again,
            saved_again=node in unit.saved_again,
            exact_rows=exact,
            axes=self.shapes.of(tuple(axes.items())),
        )
