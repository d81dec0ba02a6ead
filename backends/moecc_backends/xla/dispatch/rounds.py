"""Ragged rows that go to other devices in rounds, through buffers of about the expected size.

A buffer for the worst case has room for all choices of all devices on one of them.  Here any two
devices exchange a fixed number of rows a round, and all devices do as many rounds as the rows need
that there are: no row is lost, whatever the routing.  Between dispatch and combine everything is
deferred, and done in each round for its rows.

The gradient is its own: each round is done again, rows and gradients of tokens go to the experts,
and gradients of rows come back.  Where rows are weighted at their experts nothing else is sent.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from moecc.ir.graph import Node, Value, setter_of
from moecc.ir.ops.collectives import CollectiveOp
from moecc.ir.ops.routing import WithinBufferOp, buffer_rows
from moecc.ir.ops.slots import operands_by_word
from moecc.ir.traits import CollectiveKind, RowMove
from moecc.sharding.vias import Rounds
from moecc.types import Extent
from moecc_backends.xla.dispatch.choose import region, why_meets
from moecc_backends.xla.dispatch.sorted_rows import (
    Deferral,
    ExchangeMap,
    ExchangeRecord,
    ExchangeSpec,
    RowPermutation,
    SortedRows,
    exchange_map,
    round_map,
    rows_to_tokens,
    send,
    send_back,
    sum_rows,
)
from moecc_backends.xla.kernels.grouped_matmul import starts_of
from moecc_backends.xla.trace.context import DeviceView, TraceContext, zeros_like_on_devices
from moecc_backends.xla.trace.values import (
    DeferredRows,
    Named,
    Names,
    Operand,
    PyTree,
    Routing,
    Rows,
    accumulator,
    is_float,
    rounds_scope,
    varies,
)

_TILE = 8
"""Rows are exchanged in multiples of this."""


@dataclass(frozen=True)
class RoundSpec:
    """What is the same in all rounds.

    Attributes:
      mesh: the mesh axes along which devices exchange rows.
      devices: how many there are along it.
      rounds: their number, and their rows.
    """

    mesh: Names
    devices: int
    rounds: Rounds

    @classmethod
    def of(cls, routing: Routing, mesh: Names, devices: int) -> RoundSpec:
        """Return the rounds for the rows of `routing`: a token chooses an expert at most once."""
        tokens, choices = routing.experts.shape
        experts = routing.num_experts
        return cls(mesh, devices, Rounds.of(tokens, choices, experts, devices, _TILE))

    @property
    def exchange(self) -> ExchangeSpec:
        """The exchange of a round."""
        count = self.devices * self.rounds.rows
        return ExchangeSpec(self.mesh, count, count, is_emulated=False)


class _Routed(NamedTuple):
    """What of a routing has no gradient: i32 arrays.

    Attributes:
      experts: ``[tokens, choice]``.
      permutation: the map between choices and rows sorted by expert.
      sizes: ``[devices, experts]``, the rows that each device has for each expert.
      others: what the experts take that has no gradient.
    """

    experts: Array
    permutation: RowPermutation
    sizes: Array
    others: list[Array]


Floats = list[Array]


@dataclass(frozen=True)
class InRounds(Deferral):
    """Rows that are sorted by expert, sent, worked on and brought back in rounds.

    Attributes:
      rows: all rows, sorted by expert; those of a round are laid out as it has them.
      spec: what is the same in all rounds.
      view: the device.
    """

    rows: SortedRows
    spec: RoundSpec
    view: DeviceView

    def unpermute(self, rows: Operand | DeferredRows, gates: Array | None) -> Named:
        """Return the sum over all rounds of the rows of each token."""
        assert isinstance(rows, DeferredRows), "`permute` makes no rows"
        operands = rows.outside()
        learned = [v for v, x in operands.items() if is_float(x.array.dtype)]
        others = [v for v in operands if v not in learned]
        axes = (*self.routing.tokens, *rows.row_axes)

        def in_round(
            turn: Array, floats: Floats, routed: _Routed, kind: DTypeLike | None = None
        ) -> Array:
            """Return the sums that a round adds to tokens, in the type `kind` (of rows if None)."""
            arrays = [*zip(learned, floats, strict=False), *zip(others, routed.others, strict=True)]
            values = {v: replace(operands[v], array=array) for v, array in arrays}
            layout = self._turn(turn, routed)
            sums = rows.make(values, layout)
            assert isinstance(sums, Rows), "`permute` made rows"
            weights = floats[-1] if gates is not None else None

            def summed(flat: Array) -> Array:
                return sum_rows(flat.astype(kind or flat.dtype), layout.permutation, weights)

            return rows_to_tokens(layout.routing, sums.array, sums.axes, summed).to(axes).array

        def forward(floats: Floats, routed: _Routed) -> Array:
            shape = jax.eval_shape(partial(in_round, jnp.int32(0)), floats, routed)
            kind = accumulator(shape.dtype)
            total: Array = self._repeated(
                routed,
                lambda turn, total: total + in_round(turn, floats, routed, kind),
                zeros_like_on_devices(shape).astype(kind),
            )
            return total.astype(shape.dtype)

        def backward(residuals: tuple[Floats, _Routed], slope: Array) -> tuple[Floats, None]:
            floats, routed = residuals

            def add(turn: Array, totals: Floats) -> Floats:
                _, pull = jax.vjp(lambda arrays: in_round(turn, arrays, routed), floats)
                return [total + part for total, part in zip(totals, pull(slope)[0], strict=True)]

            zeros = [zeros_like_on_devices(jax.eval_shape(jnp.array, array)) for array in floats]
            return self._repeated(routed, add, zeros), None

        floats = [operands[v].array for v in learned] + ([] if gates is None else [gates])
        mesh = varies(*floats).union(self.spec.mesh)
        # Devices that differ in one of them differ in all that is made of it.
        floats = [self.view.varying(array, mesh) for array in floats]
        routed = _Routed(
            self.routing.experts,
            self.rows.permutation,
            lax.all_gather(self.rows.group_sizes, self.spec.mesh),
            [operands[v].array for v in others],
        )
        differentiable = jax.custom_vjp(forward)
        differentiable.defvjp(lambda *arrays: (forward(*arrays), arrays), backward)
        return Named(differentiable(floats, routed), axes)

    def of_experts(self, first: Array | int, count: int) -> InRounds:
        """Return the rows of `count` experts from `first` on."""
        rows = self.rows.of_experts(first, count)
        return replace(self, routing=rows.routing, rows=rows)

    def _turn(self, turn: Array, routed: _Routed) -> SortedRows:
        """Return the layout of the rows of a round, device by device as they are sent."""
        mesh, count, sizes = self.spec.mesh, self.spec.rounds.rows, routed.sizes
        experts, rows = routed.experts, routed.permutation
        devices = sizes.shape[0]
        sent = sizes[lax.axis_index(mesh)].reshape(devices, -1).sum(1)
        starts, first = starts_of(sent), self.spec.rounds.first(turn)
        index = first + jnp.arange(count, dtype=jnp.int32)
        choice = jnp.take(rows.choice_of_row, starts[:, None] + index, mode="clip")
        device = jnp.clip(experts // (sizes.shape[1] // devices), 0, devices - 1)
        at = rows.row_of_choice - starts[device] - first
        is_now = (rows.row_of_choice >= 0) & (at >= 0) & (at < count)
        return replace(
            self.rows,
            routing=replace(self.routing, experts=experts, slots=experts, wanted=experts >= 0),
            permutation=RowPermutation(
                jnp.where(index < sent[:, None], choice, -1).reshape(-1),
                jnp.where(is_now, device * count + at, -1).astype(jnp.int32),
            ),
            group_sizes=jnp.zeros(self.routing.num_experts, jnp.int32),
            sends=(round_map(sizes, mesh, first, count), self.spec.exchange),
        )

    def _repeated(
        self, routed: _Routed, add: Callable[[Array, PyTree], PyTree], total: PyTree
    ) -> PyTree:
        """Return what `add` makes of `total`, turn by turn, as often as any device needs."""
        if self.spec.rounds.most == 1:
            return add(jnp.int32(0), total)
        sent = routed.sizes.reshape(self.spec.devices, self.spec.devices, -1).sum(2)
        busiest = self.spec.rounds.turns(jnp.max(sent))
        turns = lax.pmax(busiest, tuple(sorted(varies(busiest))))
        with jax.named_scope(rounds_scope(self.spec.rounds.most)):
            _, sums = lax.while_loop(
                lambda state: state[0] < turns,
                lambda state: (state[0] + 1, add(*state)),
                (jnp.int32(0), total),
            )
        return sums


# Sorted rows on a mesh: sent to the devices of their experts, and back.


def send_rows(ctx: TraceContext, node: Node, x: Rows, layout: SortedRows) -> Rows:
    """Return the rows that all devices have for the local experts, sorted by expert."""
    map, spec = layout.sends or _at_once(ctx, node, x, layout)
    mesh = frozenset(spec.mesh)
    assert ctx.view.mesh is not None, "without a mesh nothing is sent"
    arrived = replace(
        layout,
        routing=replace(
            layout.routing, num_experts=layout.routing.num_experts // ctx.view.mesh.size(spec.mesh)
        ),
        permutation=RowPermutation(map.arrival_of_row, jnp.full_like(layout.routing.experts, -1)),
        group_sizes=map.group_sizes,
        exchange=ExchangeRecord(layout, map, spec),
        sends=None,
    )
    flat = ctx.view.varying(x.array.reshape(spec.rows, -1), mesh)
    sent = send(flat, map, spec)
    return Rows(sent.reshape(spec.arrivals, *x.array.shape[1:]), x.axes, arrived)


def _at_once(
    ctx: TraceContext, node: Node, x: Rows, layout: SortedRows
) -> tuple[ExchangeMap, ExchangeSpec]:
    """Return how all rows are exchanged at once, with room for all that can arrive."""
    mesh, count = CollectiveOp.of_node(node).mesh, x.array.shape[0]
    assert ctx.view.mesh is not None, "without a mesh nothing is sent"
    devices = ctx.view.mesh.size(mesh)
    room = _room(node, layout, devices, layout.routing.num_experts // devices)
    spec = ExchangeSpec(mesh, count, min(room, count * devices), ctx.options.target == "cpu")
    sizes = ctx.view.varying(layout.group_sizes, frozenset(mesh))
    return exchange_map(sizes, mesh, spec.arrivals), spec


def send_rows_back(x: Rows, layout: SortedRows) -> Rows:
    """Return the rows where they were before they were sent."""
    record = layout.exchange
    assert record is not None, "only what was sent comes back"
    flat = send_back(x.array.reshape(x.array.shape[0], -1), record.map, record.spec)
    return Rows(flat.reshape(-1, *x.array.shape[1:]), x.axes, record.origin)


def local_rows(ctx: TraceContext, node: Node, x: Rows, layout: SortedRows) -> Rows:
    """Return the rows of the local experts, of rows that every device has for all of them."""
    mesh = CollectiveOp.of_node(node).mesh
    assert ctx.view.mesh is not None, "without a mesh all experts are local"
    count = layout.routing.num_experts // ctx.view.mesh.size(mesh)
    first = lax.axis_index(mesh) * count
    local = layout.of_experts(first, count)
    # A token goes to an expert at most once, so few local experts have fewer rows than all.
    tokens, choices = layout.routing.experts.shape
    most = local.permutation.choice_of_row[: tokens * min(choices, count)]
    local = replace(local, permutation=local.permutation._replace(choice_of_row=most))
    choice = local.permutation.choice_of_row
    row = layout.permutation.row_of_choice.reshape(-1)[jnp.maximum(choice, 0)]
    array = ctx.view.varying(x.array, frozenset(mesh))
    picked = jnp.take(array, jnp.where(choice >= 0, row, 0), axis=0)
    is_used = local.is_used.reshape(-1, *[1] * (picked.ndim - 1))
    return Rows(jnp.where(is_used, picked, jnp.zeros((), picked.dtype)), x.axes, local)


def _room(node: Node, layout: SortedRows, devices: int, num_experts: int) -> int:
    """Return the most rows that can arrive: each token goes to an expert at most once."""
    tokens, choices = layout.routing.experts.shape
    before = layout.exchange
    while before is not None:
        assert before.map.there is not None, "in a round rows go to other devices once"
        devices *= before.map.there.send_sizes.size
        before = before.origin.exchange
    room = tokens * devices * min(choices, num_experts)
    bound = _buffer(node.operands[0])
    if bound is None:
        return room
    parts = WithinBufferOp.of_node(bound).parts
    if parts * num_experts != bound.operands[2].type["expert"].size:
        return room
    return min(room, buffer_rows(bound.attrs, tokens * devices, choices))


def exchanged_once(slots: Value) -> Names | None:
    """Return the mesh axes along which the rows of `slots` go to their experts and back, or None.

    None, too, where they go in several steps, into bounded buffers, or meet one another, and where
    devices agree on their sums, of which a gradient of its own knows nothing.
    """
    sent = [n for n in slots.users if n.op.moves in _TO_SLOTS]
    back = [n.operands[0].node for n in slots.users if n.op.moves is RowMove.TO_TOKENS]
    if len(back) != 1 or not _exchanges(back[0], "group") or _buffer(sent[0].result) is not None:
        return None
    entries = [user for node in sent for user in node.result.users]
    if not all(_exchanges(node, "expert") for node in entries):
        return None
    others = (n for n in region(slots) if n not in entries and n is not back[0])
    if any(_exchanges_or_agrees(n) or why_meets(n, slots) for n in others):
        return None
    return CollectiveOp.of_node(entries[0]).mesh


_TO_SLOTS = (RowMove.TO_SLOTS, RowMove.GATES_TO_SLOTS)


def _exchanges_or_agrees(node: Node) -> bool:
    """Whether `node` is another exchange, or carries out a sum whose result devices agree on."""
    if node.op.collective is None:
        return False
    before, after = node.operands[0].type, node.result.type
    sharded = {m for axis in after.axes for m in axis.mesh}
    agreed = set(before.unreduced) - set(after.unreduced) - sharded
    return node.op.collective is CollectiveKind.EXCHANGES or bool(agreed)


def _exchanges(node: Node | None, split: str) -> bool:
    """Whether `node` sends ragged rows: to experts, cut by these, or back, cut by groups."""
    if node is None or node.op.collective is not CollectiveKind.EXCHANGES:
        return False
    return bool(node.attrs["split"] == split) and node.operands[0].type.ragged is not None


def _buffer(rows: Value) -> Node | None:
    """Return what bounds the buffers for `rows`, the `keep` operand of ``assign_slots``."""
    axis = rows.type.ragged
    if axis is None or not isinstance(axis.size, Extent):
        return None
    node = setter_of(axis.size).node
    if node is None:
        return None
    keep = operands_by_word(node.operands, node.attrs).get("keep")
    bound = None if keep is None else keep.node
    return bound if bound is not None and bound.op.name == "within_buffer" else None
