"""The pass ``roll-layers``: fold equal layers into one repeated layer."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

from moecc.errors import InputError, Problem, nearest
from moecc.ir.graph import Graph, Node, Value, setter_of
from moecc.ir.mesh import mesh_of
from moecc.ir.ops.repetition import DEFAULT, KEPT
from moecc.ir.structure import attributes
from moecc.ir.unroll import unroll
from moecc.rewrite import P, fits
from moecc.rewrite.passes import EXACT, Context, Pass, PassResult, Remark
from moecc.rewrite.pattern import NearMiss
from moecc.support.ranges import joined
from moecc.types import Axis, Extent, TensorType
from moecc_passes.roll_layers.fold import Fold, wire

# The layers of a graph by the locations of its nodes, and which of them repeat one another.

_LAYER = re.compile(r"((?:.*?\.)?layers)\.(\d+)(?:\.|$)")


@dataclass
class LayerNodes:
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


def stacks_of(graph: Graph) -> list[list[LayerNodes]]:
    """Return the stacks of `graph`: layers that follow one another with nothing in between."""
    stacks: list[list[LayerNodes]] = []
    last: LayerNodes | None = None
    for node in graph:
        match = _LAYER.match(node.loc)
        if match is None:
            last = None
            continue
        name = match[0].rstrip(".")
        if last is None or last.stack != match[1]:
            stacks.append([])
        if last is None or last.name != name:
            last = LayerNodes(match[1], name)
            stacks[-1].append(last)
        last.nodes.append(node)
    return stacks


def repetitions_in(layers: Sequence[LayerNodes]) -> list[Repeated]:
    """Return the repetitions in `layers`: from each position the most, short periods first."""
    classes: dict[object, int] = {}
    keys = [classes.setdefault(key(layer.nodes), len(classes)) for layer in layers]
    repetitions: list[Repeated] = []
    start = 0
    while start < len(keys):
        best = max(
            _repetitions_at(keys, start),
            key=lambda r: (r.runs * r.period, -r.period),
            default=None,
        )
        if best is not None:
            repetitions.append(best)
        start = best.stop if best is not None else start + 1
    return repetitions


def _repetitions_at(keys: Sequence[int], start: int) -> Iterator[Repeated]:
    """Yield what is repeated from `start` on, at least twice, for each period.

    The lengths of common prefixes (Gusfield 1997, algorithm Z) take linear time for all periods.
    """
    if keys[start] not in keys[start + 1 :]:
        return
    size = len(keys) - start
    common, first, last = [0] * size, 0, 0  # keys[first:last] is a prefix, the last that ends there
    for period in range(1, size):
        length = min(last - period, common[period - first]) if period < last else 0
        while period + length < size and keys[start + length] == keys[start + period + length]:
            length += 1
        if period + length > last:
            first, last = period, period + length
        common[period] = length
        if length >= period:
            yield Repeated(start, period, length // period + 1)


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


def difference(layer: LayerNodes, reference: LayerNodes) -> str:
    """Return the first difference of two layers that are not equal."""
    numbers: dict[Value, int] = {}
    others: dict[Value, int] = {}
    for a, b in zip(layer.nodes, reference.nodes, strict=False):
        if line(a, numbers) != line(b, others):
            message = (
                f"its {a.op.name} @{a.loc} uses other parts of its layer than in {reference.name}"
            )
            return next(_reasons(a, b), message)
    return f"it has {len(layer.nodes)} operations, and {reference.name} has {len(reference.nodes)}"


def _reasons(a: Node, b: Node) -> Iterator[str]:
    if a.op is not b.op:
        yield f"it has {a.op.name} @{a.loc} where {b.loc} has {b.op.name}"
        return
    values = [*zip(a.operands, b.operands, strict=False), *zip(a.results, b.results, strict=False)]
    differing = [(x, y) for x, y in values if x.type != y.type and not x.type.extents]
    # Another parameter says more of a layer than the attributes that follow from it.
    yield from (
        f"its {a.op.name} @{a.loc} has {x!r}, and {b.loc} {y!r}" for x, y in differing if x.is_param
    )
    for name, value in a.attrs.items():
        if value != b.attrs[name]:
            yield f"its {a.op.name} @{a.loc} has {name}={value}, and {b.loc} {name}={b.attrs[name]}"
    yield from (f"its {a.op.name} @{a.loc} has {x!r}, and {b.loc} {y!r}" for x, y in differing)


# Hoist layer-invariant computations before the layers are compared.

POSITIONS = P.positions(P.any())


def data_dependent(graph: Graph) -> set[Value]:
    """Return the values that depend on data of the inputs, random keys excluded."""
    dependent = {v for v in graph.inputs.values() if v.type.dtype.kind != "key"}
    for node in graph:
        # Positions are known from the shape.
        if not fits(POSITIONS, node) and any(v in dependent for v in node.operands):
            dependent.update(node.results)
    return dependent


def hoist(layers: Sequence[LayerNodes], dependent: set[Value]) -> int:
    """Move computations shared by layers before the first layer; return how many nodes moved.

    They depend on no data: constants, tables of positions, functions of parameters alone.
    """
    home = {node: i for i, layer in enumerate(layers) for node in layer.nodes}
    free = [n for n in home if not any(v in dependent for v in (*n.operands, *n.results))]
    shared: set[Node] = set()
    for node in reversed(free):
        if node in shared or any(home.get(u, home[node]) != home[node] for u in _users(node)):
            shared.add(node)
            shared.update(v.node for v in node.operands if v.node in home)
    left = [[node for node in layer.nodes if node not in shared] for layer in layers]
    if not all(left):
        return 0
    moved = [node for node in free if node in shared]
    ahead = list(home)[: len(moved)] == moved
    for node in moved:
        node.move_before(left[0][0])
    for layer, nodes in zip(layers, left, strict=True):
        layer.nodes = nodes
    return 0 if ahead else len(moved)


def _users(node: Node) -> set[Node]:
    return {user for value in node.results for user in value.users}


NO_LAYERS = NearMiss(
    "roll-layers",
    "the graph",
    "no two layers follow one another: locations like layers.3.ffn mark layers",
)


@dataclass(frozen=True)
class RollLayersPass(Pass):
    """Fold equal layers into one layer that is repeated.

    Before::

        param %layers.0.w : f32[mlp=8, embed=8] = source("layers.0.w" : f32[mlp=8, embed=8]) @layers.0.ffn
        param %layers.1.w : f32[mlp=8, embed=8] = source("layers.1.w" : f32[mlp=8, embed=8]) @layers.1.ffn
        %a = contract %x, %layers.0.w {over=embed} : f32[batch=B, mlp=8] @layers.0.ffn
        %b = add %x, %a : …
        %c = contract %b, %layers.1.w {over=embed} : f32[batch=B, mlp=8] @layers.1.ffn
        %d = add %b, %c : …

    After::

        param %layers.{0..1}.w : f32[layer=2, mlp=8, embed=8] = stack(source("layers.0.w" : …), …, axis=layer)
        %b = scan %x, %layers.{0..1}.w {over=(layer=2), carries=1, stacked=1} : … @layers {
          input %x : f32[batch=B, embed=8]
          input %layers.{0..1}.w : f32[mlp=8, embed=8]
          %a = contract %x, %layers.{0..1}.w {over=embed} : f32[batch=B, mlp=8] @layers.{0..1}.ffn
          %b = add %x, %a : …
          output b = %b
        }

    The size of the program no longer grows with the depth of the model.  Locations mark layers:
    ``layers.3.ffn`` belongs to the layer ``layers.3``.  A pattern may repeat every few layers, as one
    sparse layer in four does; encoder and decoder are two stacks.  What layers share is computed
    once, before them.  What differs from layer to layer, such as a random key, is stacked; so is
    what is used of each layer, such as a loss.  ``unroll-layers`` is the inverse.
    """  # noqa: E501

    name = "roll-layers"
    summary = "fold equal layers into one layer that is repeated"
    must_match = True
    takes_rolled = True
    preserves = EXACT

    remat: Annotated[
        Literal["none", "block", "full", "save"],
        "values kept for the backward pass: all, the inputs of each block or layer, "
        "or named values",
    ] = "none"
    save: Annotated[
        tuple[str, ...], f"remat=save: names of {', '.join(KEPT)}; none: {', '.join(DEFAULT)}"
    ] = ()

    split: Annotated[
        str | None,
        "mesh axis that shards the values carried from layer to layer",
    ] = None

    def validate(self) -> list[Problem]:
        """Return which names are unknown or have no effect."""
        if self.save and self.remat != "save":
            return [
                Problem(
                    "names are saved under remat=save alone",
                    "save",
                    found=self.remat,
                    hint="remat=save",
                )
            ]
        return [
            Problem(
                f"nothing is called {name!r}", "save", ", ".join(KEPT), hint=nearest(name, KEPT)
            )
            for name in self.save
            if name not in KEPT
        ]

    def apply(self, graph: Graph, ctx: Context) -> PassResult:
        """Roll the layers that repeat; remark on them, and on why the rest was not rolled.

        Raises:
          InputError: `split` is not an axis of the graph's mesh.
        """
        if self.split is not None:
            mesh = mesh_of(graph)
            if mesh is None:
                raise InputError("the graph has no mesh", hint="annotate-sharding first")
            mesh.size((self.split,))
        stats = {"scans": 0, "layers-rolled": 0, "layers-left": 0, "hoisted": 0}
        dependent, told = data_dependent(graph), list[Remark]()
        for layers in stacks_of(graph):
            stats["hoisted"] += hoist(layers, dependent)
            repeated = repetitions_in(layers)
            unrolled = list(_left(layers, repeated))
            reasons = [self._roll(graph, layers, r, ctx) for r in repeated]
            done = [r for r, why in zip(repeated, reasons, strict=True) if why is None]
            unrolled = [*(why for why in reasons if why is not None), *unrolled]
            for remark in unrolled:
                ctx.remark(remark)
            told += unrolled
            rolled = sum(r.stop - r.start for r in done)
            stats["scans"] += len(done)
            stats["layers-rolled"] += rolled
            stats["layers-left"] += len(layers) - rolled
        changed = stats["scans"] + stats["hoisted"] > 0
        misses = [NearMiss(self.name, r.where, r.text) for r in told] or [NO_LAYERS]
        near = [] if stats["scans"] else misses
        return PassResult(changed, stats["scans"], stats, near_misses=near)

    def _roll(
        self, graph: Graph, layers: Sequence[LayerNodes], repeated: Repeated, ctx: Context
    ) -> Remark | None:
        """Roll layers that repeat, or return a remark on why they cannot be rolled."""
        some = layers[repeated.start : repeated.stop]
        blocks = [
            [node for layer in some[i : i + repeated.period] for node in layer.nodes]
            for i in range(0, len(some), repeated.period)
        ]
        name = joined([layer.name for layer in some]) or some[0].stack
        try:
            Fold(graph, wire(blocks), some[0].stack).run(self.remat, self.save, self.split)
        except InputError as error:
            return Remark(name, f"equal, but not rolled: {error.problems[0]}")
        each = f"{repeated.period} layers" if repeated.period > 1 else "one layer"
        ctx.remark(Remark(name, f"rolled: {each}, repeated {repeated.runs} times"))
        return None


def _left(layers: Sequence[LayerNodes], repeated: Sequence[Repeated]) -> Iterator[Remark]:
    """Yield how each layer that is not repeated differs from its neighbour."""
    inside = {i for r in repeated for i in range(r.start, r.stop)}
    for at, layer in enumerate(layers):
        near = [i for i in (at + 1, at - 1) if 0 <= i < len(layers)]
        if at not in inside and near:
            neighbour = next((layers[i] for i in near if i in inside), layers[near[0]])
            why = difference(layer, neighbour)
            yield Remark(layer.name, f"not rolled with {neighbour.name}: {why}")


# The pass ``unroll-layers``: unroll every repeated layer.


@dataclass(frozen=True)
class UnrollLayersPass(Pass):
    """Unroll every layer that ``roll-layers`` folded: its inverse.

    Before::

        param %layers.{0..1}.w : f32[layer=2, mlp=8, embed=8] = stack(source("layers.0.w" : …), …, axis=layer)
        %b = scan %x, %layers.{0..1}.w {over=(layer=2), carries=1, stacked=1} : … @layers {
          …
        }

    After::

        param %layers.0.w : f32[mlp=8, embed=8] = source("layers.0.w" : f32[mlp=8, embed=8]) @layers.0.ffn
        param %layers.1.w : f32[mlp=8, embed=8] = source("layers.1.w" : f32[mlp=8, embed=8]) @layers.1.ffn
        %a = contract %x, %layers.0.w {over=embed} : f32[batch=B, mlp=8] @layers.0.ffn
        …

    The ranges in names and locations say which layer is which.
    """  # noqa: E501

    name = "unroll-layers"
    summary = "unroll every repeated layer"
    takes_rolled = True
    preserves = EXACT

    def apply(self, graph: Graph, ctx: Context) -> PassResult:
        """Unroll every scan."""
        nodes = len(graph)
        scans = unroll(graph)
        stats = {"scans": scans, "nodes-added": len(graph) - nodes}
        return PassResult(scans > 0, scans, stats)
