"""The pass ``roll-layers``: fold equal layers into one repeated layer."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Annotated, Literal

from moecc.errors import InputError, Problem, nearest
from moecc.ir.graph import Graph, Node, Value
from moecc.ir.mesh import ATTRIBUTE as MESH
from moecc.ir.mesh import mesh_of, required_mesh
from moecc.ir.ops.repetition import DEFAULT, KEPT, stacked
from moecc.ir.ops.slots import is_slots
from moecc.ir.structure import attributes, copied, type_key
from moecc.ir.unroll import unroll
from moecc.rewrite import P, fits
from moecc.rewrite.passes import EXACT, Context, Pass, PassResult, Remark
from moecc.rewrite.pattern import NearMiss
from moecc.support.ranges import joined
from moecc.types import Axis, TensorType
from moecc.weights.movement import Stack

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
    types = tuple(type_key(v.type, numbers) for v in node.results)
    return (node.op.name, tuple(uses), attributes(node.attrs), types)


def _rank(use: int | TensorType) -> tuple[int, str]:
    return (use, "") if isinstance(use, int) else (-1, str(use))


def difference(layer: LayerNodes, reference: LayerNodes) -> str:
    """Return the first difference of two layers that are not equal."""
    numbers: dict[Value, int] = {}
    others: dict[Value, int] = {}
    for a, b in zip(layer.nodes, reference.nodes, strict=False):
        if line(a, numbers) != line(b, others):
            message = f"its {a.op.name} @{a.loc} uses other parts of its layer than in"
            return next(_reasons(a, b), f"{message} {reference.name}")
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
            required_mesh(graph).size((self.split,))
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
        nodes, scans = len(graph), unroll(graph)
        return PassResult(scans > 0, scans, {"scans": scans, "nodes-added": len(graph) - nodes})


# Values carried between iterations are all that rematerialisation keeps; sharded along a mesh axis
# that replicates them they take a fraction of the memory, for one gather per iteration (Rajbhandari
# et al. 2019, §6.1: partitioned activations).

SPLIT_ORIGIN = "roll-layers/split"


@dataclass(frozen=True)
class Cuts:
    """Shards values along one mesh axis, and gathers them again.

    Attributes:
      graph: a graph on a mesh that has the axis.
      mesh: the axis; None leaves everything unchanged.
      loc: the location of the new nodes.
    """

    graph: Graph
    mesh: str | None
    loc: str

    def type(self, type: TensorType) -> TensorType:
        """Return `type` with its largest replicated axis sharded."""
        at = self._axis(type)
        if at is None:
            return type
        axes = list(type.axes)
        axes[at] = replace(axes[at], mesh=(*axes[at].mesh, self.mesh or ""))
        return type.with_axes(axes)

    def cut(self, value: Value, graph: Graph, before: Node | None = None) -> Value:
        """Return `value` sharded: each device keeps its shard."""
        return self._moved("shard", self._axis(value.type), value, graph, before)

    def joined(
        self, value: Value, full_type: TensorType, graph: Graph, before: Node | None = None
    ) -> Value:
        """Return `value` gathered again, as it was before it was cut."""
        return self._moved("all_gather", self._axis(full_type), value, graph, before)

    def _moved(
        self, op: str, at: int | None, value: Value, graph: Graph, before: Node | None
    ) -> Value:
        if at is None:
            return value
        attrs = {"axis": value.type.axes[at].name, "mesh": (self.mesh,)}
        collective = graph.append(
            op,
            [value],
            attrs,
            names=[graph.fresh(value.name)],
            loc=self.loc,
            origin=SPLIT_ORIGIN,
            before=before,
        )
        return collective.result

    def _axis(self, type: TensorType) -> int | None:
        """Return the axis to shard, the largest that divides; None if there is none."""
        if self.mesh is None or type.dtype.kind != "float" or type.unreduced:
            return None
        if any(self.mesh in a.mesh for a in type.axes):
            return None
        grid = mesh_of(self.graph)
        assert grid is not None, "checked by the pass"
        sizes = {
            i: a.size
            for i, a in enumerate(type.axes)
            if isinstance(a.size, int) and a.size % grid.size((*a.mesh, self.mesh)) == 0
        }
        return max(sizes, key=lambda i: sizes[i], default=None)


# The dataflow into and out of repeated layers: carries, stacks, captured values.

Each = tuple[Value, ...]
"""A value of every repetition, in order."""


class CannotRoll(InputError):
    """Why equal layers cannot be repeated."""


@dataclass
class Wiring:
    """Equal layers, block by block, and their dataflow.

    Attributes:
      blocks: the nodes of each repetition.
      carries: values from the previous block; for the first, from outside.
      params: parameters, one for each block, that nothing else uses.
      stacked: other values from outside, another one for each block.
      operands: for each node of a block, its operands in every block.
      captured: a value from outside that all blocks use, as often as there are blocks.
      returned: the blocks whose value is used outside, by its number among their results.
    """

    blocks: list[list[Node]]
    carries: dict[Each, int] = field(default_factory=dict)
    params: list[Each] = field(default_factory=list)
    stacked: list[Each] = field(default_factory=list)
    captured: list[Each] = field(default_factory=list)
    operands: list[list[Each]] = field(default_factory=list)
    returned: dict[int, list[int]] = field(default_factory=dict)

    def results(self, block: int) -> list[Value]:
        """Return the values that a block makes, by number."""
        return [v for node in self.blocks[block] for v in node.results]

    @cached_property
    def inside(self) -> dict[Node, int]:
        """The block of each node."""
        return {node: i for i, block in enumerate(self.blocks) for node in block}

    @cached_property
    def collected(self) -> list[int]:
        """The values that must be stacked over all blocks, not only taken from the last."""
        carried, last = set(self.carries.values()), [len(self.blocks) - 1]
        return [n for n, blocks in self.returned.items() if n not in carried or blocks != last]


Home = dict[Value, tuple[int, int]]
"""The block of a value, and its number among the results of that block."""


def wire(blocks: list[list[Node]]) -> Wiring:
    """Return the dataflow into and out of `blocks`, which are equal.

    Raises:
      CannotRoll: a value comes from elsewhere than the previous block or the outside.
    """
    wiring = Wiring(blocks)
    home = {v: (i, n) for i in range(len(blocks)) for n, v in enumerate(wiring.results(i))}
    wiring.operands = [slots_of(nodes, home) for nodes in zip(*blocks, strict=True)]
    slots = dict.fromkeys(
        each
        for node in wiring.operands
        for each in node
        if each[0] not in home or home[each[0]][0] != 0
    )
    members = [set(block) for block in blocks]
    occurrences = Counter(value for each in slots for value in set(each))
    for each in slots:
        if each[0].type.extents:
            raise CannotRoll(f"%{each[0].name} has sizes that are set outside the layers")
        if any(v in home for v in each):
            wiring.carries[each] = _carried(each, home)
        elif len(set(each)) == 1:
            wiring.captured.append(each)
        elif _is_own(each, members) and all(occurrences[value] == 1 for value in each):
            wiring.params.append(each)
        else:
            wiring.stacked.append(each)
    for value, (block, number) in home.items():
        outside = [user for user in value.users if user not in wiring.inside]
        if not outside:
            continue
        wiring.returned.setdefault(number, []).append(block)
        if value.type.extents:
            raise CannotRoll(f"%{value.name} has sizes that its layer sets, and is used outside")
        if is_slots(value) and any(user.results for user in outside):
            raise CannotRoll(f"the slots %{value.name} are used outside their layer")
    return wiring


def slots_of(nodes: Sequence[Node], home: Home) -> list[Each]:
    """Return the operands of a node in every block, exchangeable ones in a consistent order."""
    rows = [node.operands for node in nodes]
    if nodes[0].op.commutative:
        # The first block alone takes the stream from outside, so the second is the one to follow.
        rows = [_turned(row, rows[1], i, home) for i, row in enumerate(rows)]
    return list(zip(*rows, strict=True))


def _turned(row: list[Value], like: list[Value], block: int, home: Home) -> list[Value]:
    """Return two operands in the order that best matches those of the second block."""
    as_is, turned = (
        sum(_fit(v, w, block, home) for v, w in zip(some, like, strict=True))
        for some in (row, row[::-1])
    )
    return row[::-1] if turned > as_is else row


def _fit(value: Value, like: Value, block: int, home: Home) -> int:
    if value is like:
        return 2
    if value in home and like in home:
        steps = (home[value][0] - block, home[like][0] - 1)
        return 2 if steps[0] == steps[1] and home[value][1] == home[like][1] else 0
    return 1 if value.is_param and like.is_param else 0


def _carried(each: Each, home: Home) -> int:
    """Return the number of the value that is carried from each block to the next."""
    first, *later = (home.get(v) for v in each)
    numbers = {source[1] for source in later if source is not None}
    steps = [source[0] if source is not None else -1 for source in later]
    if first is not None or len(numbers) != 1 or steps != list(range(len(later))):
        wrong = next(v for v in each if v in home)
        raise CannotRoll(f"%{wrong.name} is used farther away than in the layer after its own")
    if each[0].type != each[1].type:
        message = "what goes from layer to layer changes its type"
        raise CannotRoll(message, expected=repr(each[0]), found=repr(each[1]))
    return numbers.pop()


def _is_own(each: Each, blocks: Sequence[Set[Node]]) -> bool:
    """Whether parameters, each used in its block alone, can be one parameter of a joined name."""
    if not all(v.is_param and v.users.keys() <= b for v, b in zip(each, blocks, strict=True)):
        return False
    if len({v.weight and v.weight.type for v in each}) != 1:
        return False
    name = joined([v.name for v in each])
    return name is not None and name not in each[0].graph


ORIGIN = "roll-layers/fold"

AXIS = "layer"
"""The name of the axis of repetitions, with a number if a value has an axis of that name."""


@dataclass
class Fold:
    """Folds layers into a scan.

    Attributes:
      graph: their graph.
      wiring: the layers, and what flows in and out.
      name: the location of the scan.
      axis: the axis along which parameters and results are stacked.
      merged: the new parameters, by the parameters that they replace.
    """

    graph: Graph
    wiring: Wiring
    name: str
    axis: Axis = field(init=False)
    merged: dict[Each, Value] = field(default_factory=dict)

    def __post_init__(self) -> None:
        values = [v for b in self.wiring.blocks for n in b for v in (*n.operands, *n.results)]
        used_names = {name for v in values for name in v.type.names}
        free = (n for n in (AXIS, *(f"{AXIS}{i}" for i in range(2, 99))) if n not in used_names)
        self.axis = Axis(next(free), len(self.wiring.blocks))

    def run(self, remat: str, save: tuple[str, ...], split: str | None) -> None:
        """Replace the layers by a scan.

        Args:
          remat: as of the ``scan``.
          save: as of the ``scan``.
          split: a mesh axis along which the values carried between iterations are sharded.

        Raises:
          InputError: the locations of the layers are not a range, or a node is not allowed
            in a body; nothing is changed.
        """
        wiring, first = self.wiring, self.wiring.blocks[0][0]
        cuts = Cuts(self.graph, split, self.name)
        body = self.body(self.locations(), cuts)
        along = [*map(self.param, wiring.params), *(self.stack(e, first) for e in wiring.stacked)]
        scan = self.graph.append(
            "scan",
            [
                *(cuts.cut(e[0], self.graph, first) for e in wiring.carries),
                *along,
                *(e[0] for e in wiring.captured),
            ],
            {
                "over": ((self.axis.name, self.axis.size),),
                "carries": len(wiring.carries),
                "stacked": len(along),
                "remat": remat,
                "save": save,
                "body": body,
            },
            names=body.output_names,
            loc=self.name,
            origin=ORIGIN,
            before=first,
        )
        results = list(scan.results)
        for at, (each, number) in enumerate(wiring.carries.items()):
            if number in wiring.returned:
                results[at] = cuts.joined(results[at], each[0].type, self.graph, first)
        self.connect(results, first)
        for block in reversed(wiring.blocks):
            for node in reversed(block):
                node.erase()
        self.order()

    def locations(self) -> list[str]:
        """Return the location of each node of the body, which stands for that of every layer."""
        locations = []
        for nodes in zip(*self.wiring.blocks, strict=True):
            loc = joined([node.loc for node in nodes])
            if loc is None:
                raise CannotRoll(
                    "the numbers of the layers do not rise in equal steps",
                    found=", ".join(node.loc for node in nodes),
                )
            locations.append(loc)
        return locations

    def body(self, locs: Sequence[str], cuts: Cuts) -> Graph:
        """Return the body: the computation of a block, from the values that flow into it."""
        wiring, graph = self.wiring, Graph("body")
        if MESH in self.graph.attrs:
            graph.attrs[MESH] = self.graph.attrs[MESH]
        entered = (*wiring.carries, *wiring.params, *wiring.stacked, *wiring.captured)
        types = {e: cuts.type(e[0].type) if e in wiring.carries else e[0].type for e in entered}
        entries = {e: graph.input(graph.fresh(_hint(e)), types[e]) for e in entered}
        inputs = dict(entries)
        for each in wiring.carries:
            inputs[each] = cuts.joined(entries[each], each[0].type, graph)
        values: dict[Value, Value] = {}
        for first, slots, loc in zip(wiring.blocks[0], wiring.operands, locs, strict=True):
            node = graph.append(
                first.op,
                [inputs[e] if e in inputs else values[e[0]] for e in slots],
                copied(first.attrs),
                names=[v.name for v in first.results],
                loc=loc,
                origin=first.origin,
            )
            values.update(zip(first.results, node.results, strict=True))
        results = wiring.results(0)
        for at, number in enumerate((*wiring.carries.values(), *wiring.collected)):
            value = values[results[number]]
            sharded = cuts.cut(value, graph) if at < len(wiring.carries) else value
            graph.set_output(_free(value.name, graph.output_names), sharded)
        return graph

    def param(self, each: Each) -> Value:
        """Return the stacked parameter for one parameter of each block."""
        weights = [v.weight for v in each if v.weight is not None]
        name = joined([v.name for v in each])
        assert name is not None, "its names are those of a range"
        param = self.graph.param(
            name,
            stacked(each[0].type, self.axis),
            Stack(tuple(weights), self.axis.name) if weights else None,
            loc=joined([v.loc for v in each]) or "",
        )
        self.merged[each] = param
        return param

    def stack(self, each: Each, before: Node) -> Value:
        """Return values of all blocks, stacked."""
        node = self.graph.append(
            "stack", each, {"axis": self.axis.name}, loc=self.name, origin=ORIGIN, before=before
        )
        return node.result

    def connect(self, scan_results: Sequence[Value], before: Node) -> None:
        """Replace the uses of values of the layers by results of the scan."""
        wiring, last = self.wiring, len(self.wiring.blocks) - 1
        every = [wiring.results(block) for block in range(last + 1)]
        numbers = list(wiring.carries.values())
        along = P.stack(P.any(), ..., axis=self.axis.name)
        for value, number in zip(scan_results[len(numbers) :], wiring.collected, strict=True):
            # What was stacked of all blocks is the stacked result of the scan.
            parts = [results[number] for results in every]
            for user in list(parts[0].users):
                if fits(along, user) and user.operands == parts:
                    user.replace_by(value)
        for number, blocks in wiring.returned.items():
            for block in blocks:
                old = every[block][number]
                if block == last and number in numbers:
                    old.replace_by(scan_results[numbers.index(number)])
                elif any(user not in wiring.inside for user in old.users):
                    stacked = scan_results[len(numbers) + wiring.collected.index(number)]
                    attrs = {"axis": self.axis.name, "at": block}
                    node = self.graph.append(
                        "index", [stacked], attrs, loc=self.name, origin=ORIGIN, before=before
                    )
                    old.replace_by(node.result)

    def order(self) -> None:
        """Put each merged parameter at the position of its first part, and erase the parts."""
        graph = self.graph
        merged = {each[0]: param for each, param in self.merged.items()}
        gone = {v for each in self.merged for v in each} | set(self.merged.values())
        order = [merged.get(v, v) for v in graph.params.values() if v in merged or v not in gone]
        for each in self.merged:
            for value in each:
                graph.erase_param(value.name)
        graph.order_params(order)


def _hint(each: Each) -> str:
    return (joined([v.name for v in each]) if each[0].is_param else None) or each[0].name


def _free(name: str, used_names: Sequence[str]) -> str:
    return name if name not in used_names else _free(f"{name}_", used_names)
