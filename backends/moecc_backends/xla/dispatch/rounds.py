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
from math import ceil
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from moecc.ir.graph import Value
from moecc.sharding.vias import ROUND_ROOM
from moecc_backends.xla.dispatch.deferral import Deferral
from moecc_backends.xla.dispatch.flat import rows_to_tokens
from moecc_backends.xla.dispatch.gather_vjp import sum_rows
from moecc_backends.xla.dispatch.permutation import Permutation
from moecc_backends.xla.dispatch.sorted_rows import SortedRows
from moecc_backends.xla.mesh.all_to_all import ExchangeSpec, Mesh, round_map
from moecc_backends.xla.trace.device_view import DeviceView, varies, zeros_like_on_devices
from moecc_backends.xla.trace.dtypes import accumulator
from moecc_backends.xla.trace.rounds_scope import rounds_scope
from moecc_backends.xla.trace.routing import Routing
from moecc_backends.xla.trace.typed_jax import PyTree, pmax
from moecc_backends.xla.trace.values import DeferredRows, Named, Operand, Rows

_TILE = 8
"""Rows are exchanged in multiples of this."""


@dataclass(frozen=True)
class RoundSpec:
    """What is the same in all rounds.

    Attributes:
      mesh: the mesh axes along which devices exchange rows.
      devices: how many there are along it.
      rows: how many rows any two of them exchange in a round.
      most: how many rounds the worst routing takes.
    """

    mesh: Mesh
    devices: int
    rows: int
    most: int

    @classmethod
    def of(cls, routing: Routing, mesh: Mesh, devices: int) -> RoundSpec:
        """Return that of the rows of `routing`: a token has a choice for an expert at most once."""
        tokens, choices = routing.experts.shape
        worst = tokens * min(choices, routing.num_experts // devices)
        share = ceil(ROUND_ROOM * tokens * choices / devices)
        rows = max(min(-(-share // _TILE) * _TILE, worst), 1)
        return cls(mesh, devices, rows, max(-(-worst // rows), 1))

    @property
    def exchange(self) -> ExchangeSpec:
        """The exchange of a round."""
        count = self.devices * self.rows
        return ExchangeSpec(self.mesh, count, count, is_emulated=False, is_even=True)


class _Routed(NamedTuple):
    """What of a routing has no gradient: i32 arrays.

    Attributes:
      experts: ``[tokens, choice]``.
      permutation: the map between choices and rows sorted by expert.
      sizes: ``[devices, experts]``, the rows that each device has for each expert.
      others: what the experts take that has no gradient.
    """

    experts: jax.Array
    permutation: Permutation
    sizes: jax.Array
    others: list[jax.Array]


Floats = list[jax.Array]
Round = Callable[[jax.Array, Floats, _Routed, DTypeLike | None], jax.Array]
"""What a round adds to tokens, in a type; None for that of the rows."""

Add = Callable[[jax.Array, PyTree], PyTree]
"""Adds what a round makes."""


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

    def unpermute(self, rows: Operand | DeferredRows, gates: jax.Array | None) -> Named:
        """Return the sum over all rounds of the rows of each token."""
        assert isinstance(rows, DeferredRows), "`permute` makes no rows"
        taken = rows.outside()
        learned = [v for v, x in taken.items() if jnp.issubdtype(x.array.dtype, jnp.floating)]
        others = [v for v in taken if v not in learned]
        axes: tuple[str, ...] = ()

        def one(
            turn: jax.Array, floats: Floats, routed: _Routed, kind: DTypeLike | None
        ) -> jax.Array:
            nonlocal axes
            arrays = [*zip(learned, floats, strict=False), *zip(others, routed.others, strict=True)]
            made = {v: replace(taken[v], array=array) for v, array in arrays}
            weights = floats[-1] if gates is not None else None
            result = self._round(rows, made, self._turn(turn, routed), weights, kind)
            axes = result.axes
            return result.array

        floats = [taken[v].array for v in learned] + ([] if gates is None else [gates])
        mesh = frozenset[str]().union(*map(varies, floats), self.spec.mesh)
        # Devices that differ in one of them differ in all that is made of it.
        floats = [self.view.varying(array, mesh) for array in floats]
        routed = _Routed(
            self.routing.experts,
            self.rows.permutation,
            jax.lax.all_gather(self.rows.group_sizes, self.spec.mesh),
            [taken[v].array for v in others],
        )
        return Named(_Rounds(self.spec, one)(floats, routed), axes)

    def of_experts(self, first: jax.Array | int, count: int) -> InRounds:
        """Return the rows of `count` experts from `first` on."""
        rows = self.rows.of_experts(first, count)
        return replace(self, routing=rows.routing, rows=rows)

    def _turn(self, turn: jax.Array, routed: _Routed) -> SortedRows:
        """Return the layout of the rows of a round, device by device as they are sent."""
        spec = self.spec
        map = round_map(routed.sizes, spec.mesh, turn, spec.rows)
        routing = replace(
            self.routing, experts=routed.experts, slots=routed.experts, wanted=routed.experts >= 0
        )
        return replace(
            self.rows,
            routing=routing,
            permutation=rows_in_round(
                routed.permutation, routed.experts, routed.sizes, spec.mesh, turn, spec.rows
            ),
            group_sizes=jnp.zeros(self.routing.num_experts, jnp.int32),
            sends=(map, spec.exchange),
        )

    def _round(
        self,
        rows: DeferredRows,
        outside: dict[Value, Named],
        layout: SortedRows,
        gates: jax.Array | None,
        kind: DTypeLike | None,
    ) -> Named:
        """Return what a round adds to each token, in the type `kind`; None: in that of the rows."""
        made = rows.make(outside, layout)
        assert isinstance(made, Rows), "`permute` made rows"
        return rows_to_tokens(
            layout.routing,
            made,
            lambda flat: sum_rows(flat.astype(kind or flat.dtype), layout.permutation, gates),
        )


@dataclass(frozen=True)
class _Rounds:
    """The sum over rounds.

    Attributes:
      spec: what is the same in all rounds.
      one: makes what a round adds.
    """

    spec: RoundSpec
    one: Round

    def __call__(self, floats: Floats, routed: _Routed) -> jax.Array:
        """Return the sum ``[tokens, …]``."""
        total = jax.custom_vjp(self._forward)
        total.defvjp(
            lambda floats, routed: (self._forward(floats, routed), (floats, routed)), self._backward
        )
        return total(floats, routed)

    def _forward(self, floats: Floats, routed: _Routed) -> jax.Array:
        shape = jax.eval_shape(lambda f, r: self.one(jnp.int32(0), f, r, None), floats, routed)
        kind = accumulator(shape.dtype)

        def add(turn: jax.Array, total: jax.Array) -> jax.Array:
            return total + self.one(turn, floats, routed, kind)

        zeros = zeros_like_on_devices(shape).astype(kind)
        total: jax.Array = self._repeated(routed, add, zeros)
        return total.astype(shape.dtype)

    def _backward(self, residuals: tuple[Floats, _Routed], slope: jax.Array) -> tuple[Floats, None]:
        floats, routed = residuals

        def add(turn: jax.Array, totals: Floats) -> Floats:
            _, pull = jax.vjp(lambda given: self.one(turn, given, routed, None), floats)
            (parts,) = pull(slope)
            return [total + part for total, part in zip(totals, parts, strict=True)]

        zeros = [zeros_like_on_devices(jax.eval_shape(jnp.array, array)) for array in floats]
        slopes: Floats = self._repeated(routed, add, zeros)
        return slopes, None

    def _repeated(self, routed: _Routed, add: Add, total: PyTree) -> PyTree:
        """Return what `add` makes of `total`, turn by turn, as often as any device needs."""
        if self.spec.most == 1:
            return add(jnp.int32(0), total)
        sent = routed.sizes.reshape(self.spec.devices, self.spec.devices, -1).sum(2)
        busiest = (jnp.max(sent) + self.spec.rows - 1) // self.spec.rows
        turns = pmax(busiest, tuple(sorted(varies(busiest))))
        with jax.named_scope(rounds_scope(self.spec.most)):
            _, made = jax.lax.while_loop(
                lambda state: state[0] < turns,
                lambda state: (state[0] + 1, add(*state)),
                (jnp.int32(0), total),
            )
        return made


def rows_in_round(
    permutation: Permutation,
    experts: jax.Array,
    sizes: jax.Array,
    mesh: Mesh,
    turn: jax.Array,
    rows: int,
) -> Permutation:
    """Return the choices whose rows are sent in a round, ``[devices * rows]``, by device.

    Args:
      permutation: the map between choices and rows sorted by expert.
      experts: i32 ``[tokens, choice]``.
      sizes: i32 ``[devices, experts]``, the rows that each device has for each expert.
      mesh: the mesh axes along which devices exchange rows.
      turn: the number of the round.
      rows: how many rows go to each device.
    """
    devices = sizes.shape[0]
    sent = sizes[jax.lax.axis_index(mesh)].reshape(devices, -1).sum(1)
    starts, first = jnp.cumsum(sent) - sent, turn * rows
    place = first + jnp.arange(rows, dtype=jnp.int32)
    row = starts[:, None] + place
    choice = jnp.take(permutation.choice_of_row, row, mode="clip")
    device = jnp.clip(experts // (sizes.shape[1] // devices), 0, devices - 1)
    at = permutation.row_of_choice - starts[device] - first
    is_now = (permutation.row_of_choice >= 0) & (at >= 0) & (at < rows)
    return Permutation(
        jnp.where(place < sent[:, None], choice, -1).reshape(-1),
        jnp.where(is_now, device * rows + at, -1).astype(jnp.int32),
    )
