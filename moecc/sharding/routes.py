"""The ways of rows to their experts and back: which collectives, on which values of a layer.

The pass ``expert-parallel`` writes them into a graph, and a plan prices them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from moecc.ir.graph import Value
from moecc.ir.sharding_rules import Given, sharded_results
from moecc.ir.traits import RowMove
from moecc.sharding.collectives import Step, steps
from moecc.sharding.propagate import Propagation, Reshard
from moecc.sharding.sites import Site
from moecc.sharding.vias import Via
from moecc.types.tensor import Axis, Extent, TensorType


@dataclass(frozen=True)
class Slice:
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


def to_experts(rows: TensorType, target: TensorType, part: Slice | None) -> Iterator[Step]:
    """Yield what brings rows to their experts; in slices they were dispatched cut."""
    yield from steps(
        rows if part is None else part.of(rows), target if part is None else part.of(target)
    )
    if part is not None:
        yield part.gather


def from_experts(made: TensorType, target: TensorType, part: Slice | None) -> Iterator[Step]:
    """Yield what brings rows that experts made back to their tokens, in parts if they were cut."""
    yield from steps(made, target if part is None else part.of(target))


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
    whole = TensorType(source.dtype, source.axes)
    yield from steps(source, whole)
    yield from steps(whole, target)


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
      made: of what the experts make of them, maybe a sum that is still to be carried out.
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
    made: TensorType
    leaving: TensorType
    added: TensorType
    gates: SentGates | None = None

    @property
    def expert_mesh(self) -> tuple[str, ...]:
        """The mesh axes over which the experts are sharded."""
        return self.made["expert"].mesh

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


def sparse_layer(sites: Iterable[Site], found: Propagation) -> SparseLayer | None:
    """Return the routed layer among `sites`, sharded as was `found`, or None."""
    moving = {site.node.op.moves: site for site in sites if not _sends_numbers(site)}
    dispatch, combine = moving.get(RowMove.TO_SLOTS), moving.get(RowMove.TO_TOKENS)
    if dispatch is None or combine is None:
        return None
    rows, back = dispatch.node.result, found.operands[combine.node][0]
    made = back.value if isinstance(back, Reshard) else back
    gates = moving.get(RowMove.GATES_TO_SLOTS)
    return SparseLayer(
        dispatch=dispatch,
        combine=combine,
        tokens=found.used(dispatch.node)[0],
        rows=found.types[rows],
        entered=_entered(rows, found),
        made=found.types[made],
        leaving=found.types[back],
        added=found.types[found.visible[combine.node.result]],
        gates=None if gates is None else _sent(gates, found),
    )


def _sends_numbers(site: Site) -> bool:
    """Whether a dispatch sends a number of each token, as a metric does, beside a layer's rows."""
    node = site.node
    return node.op.moves is RowMove.TO_SLOTS and not any(_row_axes(node.result.type))


def _entered(rows: Value, found: Propagation) -> TensorType:
    """Return the type of what is dispatched as the experts take it."""
    return next((r.target for r in found.reshards if r.operand is rows), found.types[rows])


def _sent(gates: Site, found: Propagation) -> SentGates:
    made = gates.node.result
    return SentGates(gates, found.types[made], _entered(made, found))


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


def route(layer: SparseLayer, way: Via, found: Propagation, part: Slice | None) -> list[Stage]:
    """Return what the values of `layer` go through on the way `way`, forward.

    Args:
      layer: the layer.
      way: a row of the table.
      found: the sharding of what it routes by.
      part: how rows are cut in slices; None: they are sent whole.
    """
    if not way.exchanges_rows:
        return _gathering(layer, way, found)
    rows, entered, made, leaving = (
        bounded(t) if way.is_bounded else t
        for t in (layer.rows, layer.entered, layer.made, layer.leaving)
    )
    to, back = to_experts(rows, entered, part), from_experts(made, leaving, part)
    beside = _gates_there(layer, way)
    if part is None:
        return [Stage("rows", rows, tuple(to)), *beside, Stage("made", made, tuple(back))]
    return [
        Stage("tokens", layer.tokens, (part.shard,)),
        Stage("rows", part.of(rows), tuple(to)),
        *beside,
        Stage("made", made, tuple(back)),
        Stage("added", part.of(layer.added), (part.gather,)),
    ]


def _gates_there(layer: SparseLayer, way: Via) -> list[Stage]:
    """Return what gates go through that are sent with rows; each copy of a device sends all."""
    if layer.gates is None:
        return []
    types = (layer.gates.sent, layer.gates.entered)
    sent, entered = (bounded(t) if way.is_bounded else t for t in types)
    return [Stage("gates", sent, tuple(to_experts(sent, entered, None)))]


def _gathering(layer: SparseLayer, way: Via, found: Propagation) -> list[Stage]:
    """Return the stages where tokens are gathered, and rows stay: experts add to all tokens."""
    over = layer.exchanged
    types = [layer.made, *(without(t, over) for t in found.used(layer.combine.node)[1:])]
    given = [Given(v.name, t) for v, t in zip(layer.combine.operands, types, strict=True)]
    node, space = layer.combine.node, layer.combine.space
    (sums,) = sharded_results(node.op, space, given, [node.result.type], None)
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
