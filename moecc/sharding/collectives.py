"""The collectives that bring a value from one sharding to another, those that send least."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from moecc.ir.graph import Value
from moecc.ir.mesh import NamedType, sharded_results
from moecc.ir.ops.collectives import collective_type
from moecc.ir.traits import RowMove
from moecc.sharding.assign import Site
from moecc.sharding.propagate import Propagation, Reshard
from moecc.sharding.vias import Via
from moecc.support.untyped import JsonDict
from moecc.types import Axis, Extent, TensorType

Step = tuple[str, JsonDict]
"""A collective and its attributes."""

TRANSPOSED = {
    "all_gather": "reduce_scatter",
    "reduce_scatter": "all_gather",
    "shard": "all_gather",
    "all_to_all": "all_to_all",
    "ragged_all_to_all": "ragged_all_to_all",
}
"""What brings the gradient back, of the same size: a part is gathered, parts of a sum are
scattered.  The gradient of a sum that was carried out is there already."""


def sent(
    source: TensorType, steps: Iterable[Step]
) -> Iterator[tuple[str, tuple[str, ...], TensorType]]:
    """Yield the operations of `steps` on a value of type `source`, with mesh axes and a type.

    The type is that of the operand or result, of which a device has more.  A ``shard`` sends
    nothing: a device takes its part.
    """
    type = source
    for op, attrs in steps:
        result = collective_type(op, type, attrs)
        yield op, attrs["mesh"], type if _is_larger(type, result) else result
        type = result


def _is_larger(type: TensorType, result: TensorType) -> bool:
    """Whether a device has more of a value of `type`: the fewer mesh axes, the larger the shard."""
    count, less = (sum(len(a.mesh) for a in t.axes) for t in (type, result))
    return count <= less


def steps(source: TensorType, target: TensorType) -> Iterator[Step]:
    """Yield the collectives that bring a value of type `source` to the sharding of `target`.

    Both types are equal but for their sharding; `target` is no unreduced sum.
    """
    now = {a.name: a.mesh for a in source.axes}
    goal = {a.name: a.mesh for a in target.axes}
    yield from _merged(_sums(source, now, goal), _moves(source, now, goal))


def _sums(
    source: TensorType, now: dict[str, tuple[str, ...]], goal: dict[str, tuple[str, ...]]
) -> Iterator[Step]:
    left = list(source.unreduced)
    while left:
        scatter = next(
            ((n, m) for n in now for m in left if goal[n][: len(now[n]) + 1] == (*now[n], m)), None
        )
        if scatter is None:
            break
        name, mesh = scatter
        now[name] = (*now[name], mesh)
        left.remove(mesh)
        yield "reduce_scatter", {"axis": name, "mesh": (mesh,)}
    if left:
        yield "all_reduce", {"mesh": tuple(left)}


def _moves(
    source: TensorType, now: dict[str, tuple[str, ...]], goal: dict[str, tuple[str, ...]]
) -> Iterator[Step]:
    ragged = source.ragged is not None
    while now != goal:
        used = {m for mesh in now.values() for m in mesh}
        move = next(_exchanges(now, goal, ragged), None)
        grow = next(_splits(now, goal, used), None)
        if move is not None:
            gather, split, mesh = move
            now[gather] = now[gather][: -len(mesh)]
            now[split] = (*now[split], *mesh)
            op = "ragged_all_to_all" if ragged else "all_to_all"
            yield op, {"mesh": mesh, "split": split, "gather": gather}
        elif grow is not None:
            name, axis = grow
            now[name] = (*now[name], axis)
            yield "shard", {"axis": name, "mesh": (axis,)}
        else:
            name = next(n for n in now if _excess(now[n], goal[n]))
            axis, now[name] = now[name][-1], now[name][:-1]
            yield "all_gather", {"axis": name, "mesh": (axis,)}


def _excess(now: tuple[str, ...], goal: tuple[str, ...]) -> bool:
    return now != goal[: len(now)]


def _exchanges(
    now: dict[str, tuple[str, ...]], goal: dict[str, tuple[str, ...]], ragged: bool
) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Yield axes that lose innermost mesh axes which another axis needs next, the most first."""
    for gather, mesh in now.items():
        if not _excess(mesh, goal[gather]):
            continue
        for at in range(len(mesh)):
            moved = mesh[at:]
            if moved == goal[gather][at : at + len(moved)] and mesh[:at] == goal[gather][:at]:
                continue
            for split in now:
                fits = goal[split][: len(now[split]) + len(moved)] == (*now[split], *moved)
                pair = {gather, split} == {"group", "expert"}
                if split != gather and fits and (pair or not ragged):
                    yield gather, split, moved


def _splits(
    now: dict[str, tuple[str, ...]], goal: dict[str, tuple[str, ...]], used: set[str]
) -> Iterator[tuple[str, str]]:
    for name, mesh in now.items():
        if len(mesh) < len(goal[name]) and not _excess(mesh, goal[name]):
            following = goal[name][len(mesh)]
            if following not in used:
                yield name, following


def _merged(*parts: Iterator[Step]) -> Iterator[Step]:
    """Yield steps, neighbours of one kind along one axis as one."""
    last: Step | None = None
    for part in parts:
        for op, attrs in part:
            if last is not None and last[0] == op and _same_axis(last[1], attrs):
                mesh = (
                    (*attrs["mesh"], *last[1]["mesh"])
                    if op == "all_gather"
                    else (*last[1]["mesh"], *attrs["mesh"])
                )
                last = (op, {**attrs, "mesh": mesh})
                continue
            if last is not None:
                yield last
            last = (op, attrs)
    if last is not None:
        yield last


def _same_axis(a: JsonDict, b: JsonDict) -> bool:
    return "split" not in a and a.get("axis") == b.get("axis")


# What the backward pass sums over the mesh: gradients of which each device has a part.
#
# A gradient with respect to an operand is a sum over the dimensions along which the operand has no
# axis.  Where such a dimension is sharded, each device has the sum over its shard: a parameter that
# is the same along an axis of data, or what a product over sharded neurons was made of.


@dataclass(frozen=True)
class GradientSum:
    """A gradient that is summed where an operation differs from device to device.

    Attributes:
      site: the operation.
      number: of the operand whose gradient it is.
      axes: the mesh axes to sum over.
    """

    site: Site
    number: int
    axes: frozenset[str]


@dataclass(frozen=True)
class Gradients:
    """The sums of a backward pass.

    Attributes:
      params: of each parameter, the mesh axes over which its gradient is summed.
      values: those of other values, in the order of the nodes.
    """

    params: dict[Value, set[str]] = field(default_factory=dict)
    values: list[GradientSum] = field(default_factory=list)


@dataclass(frozen=True)
class GradientFlow:
    """What a gradient flows to.

    Attributes:
      differentiable: values that depend on parameters, these included.
      of_inputs: values that depend on inputs.
    """

    differentiable: set[Value]
    of_inputs: set[Value]

    def is_deferred(self, value: Value) -> bool:
        """Whether parameters alone make `value`: their gradient is summed, and not its own."""
        return value in self.differentiable and value not in self.of_inputs


def dependence(sites: Iterable[Site], inputs: Iterable[Value]) -> GradientFlow:
    """Return which values of `sites` depend on parameters, and which on inputs."""
    differentiable, of_inputs = set[Value](), set(inputs)
    for site in sites:
        differentiable.update(v for v in site.operands if v.is_param and v.type.dtype.is_float)
        if not site.space.shape_only and not of_inputs.isdisjoint(site.operands):
            of_inputs.update(site.node.results)
        if site.node.op.blocks_gradient or differentiable.isdisjoint(site.operands):
            continue
        differentiable.update(v for v in site.node.results if v.type.dtype.is_float)
    return GradientFlow(differentiable, of_inputs)


def gradients(sites: Sequence[Site], propagation: Propagation, on: GradientFlow) -> Gradients:
    """Return the sums of the backward pass of `sites`, sharded as was `propagation`."""
    sums = Gradients()
    deferred: dict[Value, set[str]] = sums.params
    for site in reversed(sites):
        left = {m for v in site.node.results for m in deferred.get(v, ())}
        along = None
        for number, value in enumerate(site.operands):
            if value not in on.differentiable:
                continue
            along = _along(site, propagation.used(site.node)) if along is None else along
            axes = _sharded_beside(along, site.space.operands[number].values()) if along else set()
            if on.is_deferred(value):
                deferred.setdefault(value, set()).update(axes, left)
            elif axes:
                sums.values.append(GradientSum(site, number, frozenset(axes)))
    sums.values.reverse()
    return sums


def _sharded_beside(along: Mapping[str, Iterable[str]], dimensions: Collection[str]) -> set[str]:
    """Return the mesh axes of the dimensions that are not the operand's own."""
    return {m for dimension, mesh in along.items() if dimension not in dimensions for m in mesh}


def _along(site: Site, types: Sequence[TensorType]) -> dict[str, tuple[str, ...]]:
    """Return the mesh axes of the dimensions that are sharded."""
    meshes: dict[str, tuple[str, ...]] = {}
    for type, names in zip(types, site.space.operands, strict=True):
        for axis in type.axes if type.is_sharded else ():
            if axis.mesh and axis.name in names:
                meshes[names[axis.name]] = axis.mesh
    return meshes


# The ways of rows to their experts and back: which collectives, on which values of a layer.
#
# The pass ``expert-parallel`` writes them into a graph, and a plan prices them.


@dataclass(frozen=True)
class RowSlice:
    """Rows of which devices that are copies of one another each send a part.

    Attributes:
      axis: the axis along which a row is cut.
      mesh: the mesh axis along which devices are copies of one another.
    """

    axis: str
    mesh: str

    @property
    def shard(self) -> Step:
        """What takes a device's part of a row."""
        return "shard", {"axis": self.axis, "mesh": (self.mesh,)}

    @property
    def gather(self) -> Step:
        """What puts the parts together."""
        return "all_gather", {"axis": self.axis, "mesh": (self.mesh,)}

    def of(self, type: TensorType) -> TensorType:
        """Return `type`, no sum any more, with its axis sharded."""
        return moved(type, {self.axis: (self.mesh,)})


def to_experts(rows: TensorType, target: TensorType, part: RowSlice | None) -> Iterator[Step]:
    """Yield what brings rows to their experts; in slices they were dispatched cut."""
    yield from steps(
        rows if part is None else part.of(rows), target if part is None else part.of(target)
    )
    if part is not None:
        yield part.gather


def from_experts(outputs: TensorType, target: TensorType, part: RowSlice | None) -> Iterator[Step]:
    """Yield what brings rows that experts made back to their tokens, in parts if they were cut."""
    yield from steps(outputs, target if part is None else part.of(target))


def gathered(type: TensorType, over: Sequence[str]) -> Iterator[Step]:
    """Yield what makes a value whole along the mesh axes `over`."""
    for axis in type.axes:
        mesh = tuple(m for m in axis.mesh if m in over)
        if mesh:
            yield "all_gather", {"axis": axis.name, "mesh": mesh}


def sums_back(source: TensorType, target: TensorType, way: Via) -> Iterator[Step]:
    """Yield what makes tokens of what the experts of each device add to them.

    A ring scatters the sums; where tokens are everywhere, the sums are carried out everywhere.
    """
    if not way.tokens_everywhere:
        yield from steps(source, target)
        return
    reduced = TensorType(source.dtype, source.axes)
    yield from steps(source, reduced)
    yield from steps(reduced, target)


def without(type: TensorType, over: Sequence[str]) -> TensorType:
    """Return `type`, whole along the mesh axes `over`."""
    axes = (replace(a, mesh=tuple(m for m in a.mesh if m not in over)) for a in type.axes)
    return type.with_axes(axes)


def moved(type: TensorType, spec: dict[str, tuple[str, ...]]) -> TensorType:
    """Return `type`, no sum any more, with the axes of `spec` sharded so."""
    axes = (replace(a, mesh=spec.get(a.name, a.mesh)) for a in type.axes)
    return TensorType(type.dtype, tuple(axes))


class SentGates(NamedTuple):
    """Gates that go with the rows: what sends them, their type before that, and at the experts."""

    dispatch: Site
    sent: TensorType
    entered: TensorType


@dataclass(frozen=True)
class SparseLayer:
    """How the values of a routed layer are sharded, from its tokens to what it adds to them.

    Attributes:
      dispatch: the operation that makes rows of tokens.
      combine: the operation that makes tokens of rows.
      tokens: the type of the tokens that are dispatched.
      rows: of the rows as they are dispatched.
      entered: of the rows as the experts take them.
      outputs: of what the experts make of them, maybe a sum that is still to be carried out.
      leaving: of that as it is combined.
      gates: what sends the gates with the rows, and their types there and as rows meet them; None
        where tokens are weighted.
      added: of what is combined, its sum carried out.
    """

    dispatch: Site
    combine: Site
    tokens: TensorType
    rows: TensorType
    entered: TensorType
    outputs: TensorType
    leaving: TensorType
    added: TensorType
    gates: SentGates | None

    @property
    def expert_mesh(self) -> tuple[str, ...]:
        """The mesh axes over which the experts are sharded."""
        return self.outputs["expert"].mesh

    @property
    def exchanged(self) -> tuple[str, ...]:
        """Those of them over which tokens are sharded, too, in the order of the tokens."""
        return tuple(m for a in self.tokens for m in a.mesh if m in self.expert_mesh)

    @property
    def width(self) -> str:
        """The axis along which a row is cut in slices."""
        return next(_row_axes(self.rows))


def _row_axes(rows: TensorType) -> Iterator[str]:
    """Yield the axes of one row."""
    return (name for name in rows.names if name not in ("group", "expert", "slot"))


def sparse_layer(sites: Iterable[Site], propagation: Propagation) -> SparseLayer | None:
    """Return the routed layer among `sites`, sharded as was `propagation`, or None."""
    moving = {site.node.op.moves: site for site in sites if not _sends_numbers(site)}
    dispatch, combine = moving.get(RowMove.TO_SLOTS), moving.get(RowMove.TO_TOKENS)
    if dispatch is None or combine is None:
        return None
    rows, back = dispatch.node.result, propagation.operands[combine.node][0]
    outputs = back.value if isinstance(back, Reshard) else back
    gates = moving.get(RowMove.GATES_TO_SLOTS)
    return SparseLayer(
        dispatch=dispatch,
        combine=combine,
        tokens=propagation.used(dispatch.node)[0],
        rows=propagation.types[rows],
        entered=_entered(rows, propagation),
        outputs=propagation.types[outputs],
        leaving=propagation.types[back],
        added=propagation.types[propagation.visible[combine.node.result]],
        gates=None if gates is None else _sent(gates, propagation),
    )


def _sends_numbers(site: Site) -> bool:
    """Whether a dispatch sends a number of each token, as a metric does, beside a layer's rows."""
    node = site.node
    return node.op.moves is RowMove.TO_SLOTS and not any(_row_axes(node.result.type))


def _entered(rows: Value, propagation: Propagation) -> TensorType:
    """Return the type of what is dispatched as the experts take it."""
    return next(
        (r.target for r in propagation.reshards if r.operand is rows), propagation.types[rows]
    )


def _sent(gates: Site, propagation: Propagation) -> SentGates:
    rows = gates.node.result
    return SentGates(gates, propagation.types[rows], _entered(rows, propagation))


class Stage(NamedTuple):
    """What a value of a layer goes through.

    Attributes:
      value: what it is of the layer: ``tokens``, ``rows``, ``gates``, ``made`` or ``added``.
      source: its type before.
      steps: the collectives.
    """

    value: str
    source: TensorType
    steps: tuple[Step, ...]


def route(
    layer: SparseLayer, way: Via, propagation: Propagation, part: RowSlice | None
) -> list[Stage]:
    """Return what the values of `layer` go through on the way `way`, forward.

    Args:
      layer: the layer.
      way: a row of the table.
      propagation: the sharding of what it routes by.
      part: how rows are cut in slices; None: they are sent whole.
    """
    if not way.exchanges_rows:
        return _gathering(layer, way, propagation)
    rows, entered, outputs, leaving = (
        bounded(t) if way.is_bounded else t
        for t in (layer.rows, layer.entered, layer.outputs, layer.leaving)
    )
    to, back = to_experts(rows, entered, part), from_experts(outputs, leaving, part)
    beside = _gates_there(layer, way)
    if part is None:
        return [Stage("rows", rows, tuple(to)), *beside, Stage("made", outputs, tuple(back))]
    return [
        Stage("tokens", layer.tokens, (part.shard,)),
        Stage("rows", part.of(rows), tuple(to)),
        *beside,
        Stage("made", outputs, tuple(back)),
        Stage("added", part.of(layer.added), (part.gather,)),
    ]


def _gates_there(layer: SparseLayer, way: Via) -> list[Stage]:
    """Return what gates go through that are sent with rows; each copy of a device sends all."""
    if layer.gates is None:
        return []
    types = (layer.gates.sent, layer.gates.entered)
    sent, entered = (bounded(t) if way.is_bounded else t for t in types)
    return [Stage("gates", sent, tuple(to_experts(sent, entered, None)))]


def _gathering(layer: SparseLayer, way: Via, propagation: Propagation) -> list[Stage]:
    """Return the stages where tokens are gathered, and rows stay: experts add to all tokens."""
    over = layer.exchanged
    types = [layer.outputs, *(without(t, over) for t in propagation.used(layer.combine.node)[1:])]
    operands = [NamedType(v.name, t) for v, t in zip(layer.combine.operands, types, strict=True)]
    node, space = layer.combine.node, layer.combine.space
    (sums,) = sharded_results(node.op, space, operands, [node.result.type], None)
    return [
        Stage("tokens", layer.tokens, tuple(gathered(layer.tokens, over))),
        Stage("added", sums, tuple(sums_back(sums, layer.added, way))),
    ]


def bounded(type: TensorType) -> TensorType:
    """Return `type` with as many slots for every expert, as a capacity makes them."""
    return type.with_axes(
        Axis(a.name, Extent("capacity", a.size.value), a.mesh)
        if isinstance(a.size, Extent) and a.is_ragged
        else a
        for a in type.axes
    )
