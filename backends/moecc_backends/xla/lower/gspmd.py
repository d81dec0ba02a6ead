"""Lowering for XLA's partitioner (GSPMD): the program of one device, with hints where values lie.

Each result is held to its place.  Rows of experts are placed group by group, so that no device
looks at another's tokens, and are held first to their groups and then to their experts: from these
two constraints the partitioner makes one all-to-all (GShard, §3.2), from one of them all-gathers.
Parameters that are split for storage are gathered where they are used, their gradients scattered.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from moecc.ir.graph import Node, Value
from moecc.ir.remat_names import feeds_route, only_routes
from moecc.ir.table.slots import capacity, group_count
from moecc.plan.layout import Layout
from moecc_backends.xla.dispatch.gather_vjp import combine, dispatch
from moecc_backends.xla.dispatch.layout import Routing, SlotPacking
from moecc_backends.xla.dispatch.permutation import Placement as RowPlacement
from moecc_backends.xla.dispatch.permutation import capacity_placement
from moecc_backends.xla.lower.dispatch_combine import ranks_in_experts, wanted_choices
from moecc_backends.xla.mesh.layout_specs import Parts, group_parts, value_parts, weight_parts
from moecc_backends.xla.trace.context import Context, Lowering
from moecc_backends.xla.trace.values import SLOT_AXES, Named, Operand

# Typed by jax in part only.
_hold: Any = jax.lax.with_sharding_constraint
_spec: Any = PartitionSpec

_TOKEN_AXES = ("batch", "group", "slot")
"""The axes that a parameter never has."""


@dataclass(frozen=True)
class GroupSlots(SlotPacking):
    """Slots that are filled group by group.

    Attributes:
      placements: of each group apart, choices and rows ``[expert * slot]`` of its own; all arrays
        have the groups as an axis in front.
    """

    placements: RowPlacement

    @property
    def is_used(self) -> jax.Array:
        """Whether something was placed in each row: bool ``[rows]``."""
        experts, groups, slots = self.shape
        used = (self.placements.choice_of_row >= 0).reshape(groups, experts, slots)
        return jnp.swapaxes(used, 0, 1).reshape(-1)

    def dispatch(self, tokens: jax.Array) -> jax.Array:
        """Gather rows from tokens, forward and backward."""
        raise NotImplementedError("`Spread` keeps the axes of groups and experts apart")

    def combine(self, rows: jax.Array, gates: jax.Array) -> jax.Array:
        """Gather the rows of each token, forward and backward."""
        raise NotImplementedError("`Spread` keeps the axes of groups and experts apart")


@dataclass(frozen=True)
class Spread:
    """Calls lowerings such that values lie on `mesh` as `layout` says.

    Attributes:
      mesh: the devices.
      layout: which of its axes split what.
    """

    mesh: jax.sharding.Mesh
    layout: Layout

    def __call__(
        self, ctx: Context, node: Node, operands: list[Operand | None], function: Lowering
    ) -> Operand | tuple[Operand, ...]:
        """Return the results of a lowering, held to their places."""
        special = self._by_group(ctx, node)
        if special is not None:
            return special(ctx, node, *operands)
        if node.op.name in ("contract", "embedding"):
            pairs = zip(operands, node.operands, strict=True)
            operands = [self._used(x, v, node) for x, v in pairs]
        made = function(ctx, node, *operands)
        results = made if isinstance(made, tuple) else (made,)
        return tuple(map(self._held, results))

    def sharding(self, axes: tuple[str, ...], parts: Parts) -> NamedSharding:
        """Return the sharding of an array with `axes`, whose `parts` lie on mesh axes."""
        return NamedSharding(self.mesh, _spec(*(parts.get(a) for a in axes)))

    def weight_sharding(self, value: Value, *, stored: bool, layers: str = "") -> NamedSharding:
        """Return the sharding of a parameter, where it lies or where it is used."""
        sizes = {a.name: s for a, s in zip(value.type.axes, value.type.shape, strict=True)}
        parts = weight_parts(self.layout, sizes, stored=stored, layers=layers)
        return self.sharding(value.type.names, {} if only_routes(value) else parts)

    def constrained(self, x: Named, parts: Parts) -> Named:
        """Return `x` held to `parts`."""
        held = _hold(x.array, self.sharding(x.axes, parts))
        return Named(held, x.axes)

    def _held(self, x: Operand) -> Operand:
        if not isinstance(x, Named) or x.array.ndim < 2 or not set(_TOKEN_AXES) & set(x.axes):
            return x
        return self.constrained(x, value_parts(self.layout, _sizes(x)))

    def _used(self, x: Operand | None, value: Value, node: Node) -> Operand | None:
        """Return a parameter as it is used, gathered from where it is stored."""
        if not isinstance(x, Named) or value.node is not None or set(_TOKEN_AXES) & set(x.axes):
            return x
        if x.array.ndim < 2 or not jnp.issubdtype(x.array.dtype, jnp.floating):
            return x
        if feeds_route(node):
            return Named(_gathered(x.array, self.sharding(x.axes, {}), None), x.axes)
        used, stored = (
            self.sharding(x.axes, weight_parts(self.layout, _sizes(x), stored=s))
            for s in (False, True)
        )
        return Named(_gathered(x.array, used, stored), x.axes)

    # --- routing, group by group

    def _by_group(self, ctx: Context, node: Node) -> Lowering | None:
        name = node.op.name
        if name == "assign_slots" and node.attrs["slots"] == "capacity":
            return self._place
        if name not in ("dispatch", "combine"):
            return None
        if isinstance(ctx.packings.get(node.operands[2]), GroupSlots):
            return self._dispatch if name == "dispatch" else self._combine
        return None

    def _place(self, ctx: Context, node: Node, experts: Named, *given: Named) -> Operand:
        attrs = node.attrs
        tokens: tuple[str, ...] = attrs["tokens"]
        (choice,) = (a for a in experts.axes if a not in tokens)
        sizes = tuple(experts.size(a) for a in tokens)
        chosen = experts.to((*tokens, choice)).array.reshape(prod(sizes), -1)
        groups = group_count(attrs, chosen.shape[0])
        more = dict(zip(attrs["using"], given, strict=True))
        wanted = wanted_choices(node, chosen, more, (*tokens, choice))
        limit = capacity(attrs, chosen.shape[0] // groups, chosen.shape[1])
        if "priority" in more:
            order = self._grouped(more["priority"].to(tokens).array.reshape(-1), groups)
        else:
            order = None

        def place(
            chosen: jax.Array, wanted: jax.Array | None, priority: jax.Array | None
        ) -> tuple[jax.Array, RowPlacement]:
            turns = None if priority is None else jnp.argsort(-priority, stable=True)
            slots = ranks_in_experts(chosen, 1, attrs, wanted, turns)
            slots = jnp.where(slots < limit, slots, -1)
            return slots, capacity_placement(chosen, slots, attrs["experts"], limit)

        wanted = None if wanted is None else self._grouped(wanted, groups)
        slots, placements = jax.vmap(place)(self._grouped(chosen, groups), wanted, order)
        slots = slots.reshape(chosen.shape)
        routing = Routing(chosen, slots, None, attrs["experts"], groups, limit, tokens, sizes)
        ctx.packings[node.result] = GroupSlots(routing, placements)
        return Named(slots.reshape(*sizes, -1), (*tokens, choice)).to(experts.axes)

    def _grouped(self, array: jax.Array, groups: int) -> jax.Array:
        """Return ``[tokens, …]`` as ``[group, token, …]``, each group where its tokens are."""
        parts = array.reshape(groups, -1, *array.shape[1:])
        return self._with_groups(parts)

    def _with_groups(self, array: jax.Array) -> jax.Array:
        spec = group_parts(self.layout, {"group": array.shape[0]})
        axes = ("group", *("" for _ in array.shape[1:]))
        held: jax.Array = _hold(array, self.sharding(axes, spec))
        return held

    def _dispatch(
        self, ctx: Context, node: Node, x: Named, experts: Named, place: Named
    ) -> Operand:
        packing = ctx.packings[node.operands[2]]
        assert isinstance(packing, GroupSlots), "`_by_group` has looked"
        count, groups, limit = packing.shape
        routing = packing.routing
        rest = tuple(a for a in x.axes if a not in routing.tokens)
        source = x.to((*routing.tokens, *rest)).array
        inner = source.shape[len(routing.tokens) :]
        tokens = self._grouped(source.reshape(routing.num_tokens, prod(inner)), groups)
        rows = self._with_groups(jax.vmap(dispatch)(tokens, packing.placements))
        slots = Named(
            rows.reshape(groups, count, limit, *inner), ("group", "expert", "slot", *rest)
        )
        return self._exchanged(slots).to((*SLOT_AXES, *rest))

    def _exchanged(self, slots: Named) -> Named:
        """Return rows that lie with their groups where their experts are."""
        at_groups = self.constrained(slots, group_parts(self.layout, _sizes(slots)))
        return self.constrained(at_groups, value_parts(self.layout, _sizes(slots)))

    def _combine(
        self,
        ctx: Context,
        node: Node,
        rows: Named,
        experts: Named,
        place: Named,
        gates: Named,
    ) -> Operand:
        packing = ctx.packings[node.operands[2]]
        assert isinstance(packing, GroupSlots), "`_by_group` has looked"
        routing, groups = packing.routing, packing.routing.groups
        rest = tuple(a for a in rows.axes if a not in SLOT_AXES)
        slots = rows.to(("group", "expert", "slot", *rest))
        at_experts = self.constrained(slots, value_parts(self.layout, _sizes(slots)))
        back = self.constrained(at_experts, group_parts(self.layout, _sizes(slots))).array
        inner = back.shape[3:]
        (choice,) = (a for a in gates.axes if a not in routing.tokens)
        weights = gates.to((*routing.tokens, choice)).array
        weights = self._grouped(weights.reshape(routing.num_tokens, -1), groups)
        flat = back.reshape(groups, prod(back.shape[1:3]), prod(inner))
        result = self._with_groups(jax.vmap(combine)(flat, packing.placements, weights))
        outer = tuple(a for a in node.result.type.names if a in routing.tokens)
        whole = result.reshape(*routing.token_sizes, *inner)
        return self._held(Named(whole, (*routing.tokens, *rest)).to((*outer, *rest)))


def _sizes(x: Named) -> dict[str, int]:
    return dict(zip(x.axes, x.array.shape, strict=True))


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gathered(array: Any, used: NamedSharding, stored: NamedSharding | None) -> Any:
    return _hold(array, used)


def _gather_forward(
    array: Any, used: NamedSharding, stored: NamedSharding | None
) -> tuple[Any, None]:
    return _gathered(array, used, stored), None


def _gather_backward(
    used: NamedSharding, stored: NamedSharding | None, residuals: None, gradient: Any
) -> tuple[Any]:
    if stored is None:
        return (gradient,)
    return (_hold(gradient, stored),)


_gathered.defvjp(_gather_forward, _gather_backward)
