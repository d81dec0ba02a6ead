"""Lowering for XLA's partitioner (GSPMD): the program of one device, with hints on shardings.

Lowerings are the same as everywhere.  Each result is held to its sharding, token groups are kept
apart, and parameters that are sharded for storage are gathered where they are used, their gradients
scattered.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from moecc.ir.graph import Node, Value
from moecc.ir.traits import Role
from moecc.sharding.layout import Layout
from moecc.sharding.spec import ShardingSpec, group_spec, param_spec, value_spec
from moecc_backends.xla.dispatch.group_slots import GroupSlots
from moecc_backends.xla.lower.precision import is_precise, is_precise_param
from moecc_backends.xla.trace.context import Context, Function, Given, Lowered
from moecc_backends.xla.trace.routing import Routing
from moecc_backends.xla.trace.typed_jax import partition_spec, with_sharding
from moecc_backends.xla.trace.values import Deferred, DispatchLayout, Named, Operand

_TOKEN_AXES = ("batch", "group", "slot")
"""The axes that a parameter never has."""

_WEIGHTS = frozenset({Role.MATRIX, Role.TABLE})
"""The roles of parameters that are sharded for storage, in the operations that read them."""


@dataclass(frozen=True)
class GspmdLowering:
    """Calls lowerings such that values are sharded over `mesh` as a layout of the plan shards them.

    Attributes:
      mesh: the devices.
      plan: which of its axes shard what.
    """

    mesh: jax.sharding.Mesh
    plan: Layout

    def __call__(
        self, ctx: Context, node: Node, operands: list[Given], function: Function
    ) -> Lowered:
        """Return the results of a lowering, each held to its sharding."""
        if not _WEIGHTS.isdisjoint(node.op.roles):
            pairs = zip(operands, node.operands, strict=True)
            operands = [self._gathered(x, v, node) for x, v in pairs]
        made = function(ctx, node, *operands)
        if isinstance(made, Deferred):
            return made
        results = made if isinstance(made, tuple) else (made,)
        return tuple(map(self._held, results))

    def by_group(
        self,
        function: Callable[..., jax.Array],
        groups: int,
        arrays: tuple[jax.Array | None, ...],
    ) -> jax.Array:
        """Return what `function` makes of each group, on the devices that have its tokens."""
        if not self._divides(groups):
            return function(groups, *arrays)
        each = (None if a is None else self.grouped(a, groups) for a in arrays)
        made = jax.vmap(partial(function, 1))(*each)
        return made.reshape(-1, *made.shape[2:])

    def layout(self, routing: Routing) -> DispatchLayout | None:
        """Return slots that are filled group by group, where groups have slots of their own."""
        if routing.capacity is None or not self._divides(routing.groups):
            return None
        return GroupSlots(routing, self)

    def _divides(self, groups: int) -> bool:
        return groups > 0 and groups % self.plan.shards["batch"] == 0

    def sharding(self, axes: tuple[str, ...], spec: ShardingSpec) -> NamedSharding:
        """Return the sharding of an array with `axes`, of which `spec` names the mesh axes."""
        return NamedSharding(self.mesh, partition_spec(*(spec.get(a) for a in axes)))

    def weight_sharding(self, value: Value, *, stored: bool, layers: str = "") -> NamedSharding:
        """Return the sharding of a parameter, as it is stored or as it is used."""
        sizes = {a.name: s for a, s in zip(value.type.axes, value.type.shape, strict=True)}
        spec = param_spec(self.plan, sizes, stored=stored, layers=layers)
        return self.sharding(value.type.names, {} if is_precise_param(value) else spec)

    def constrained(self, x: Named, spec: ShardingSpec) -> Named:
        """Return `x` held to `spec`."""
        return Named(with_sharding(x.array, self.sharding(x.axes, spec)), x.axes)

    def _held(self, x: Operand) -> Operand:
        if not isinstance(x, Named) or x.array.ndim < 2 or not set(_TOKEN_AXES) & set(x.axes):
            return x
        return self.constrained(x, value_spec(self.plan, x.sizes))

    def _gathered(self, x: Given, value: Value, node: Node) -> Given:
        """Return a parameter as it is used, gathered from where it is stored."""
        if not isinstance(x, Named) or value.node is not None or set(_TOKEN_AXES) & set(x.axes):
            return x
        if x.array.ndim < 2 or not jnp.issubdtype(x.array.dtype, jnp.floating):
            return x
        if is_precise(node):
            return Named(_gathered_param(x.array, self.sharding(x.axes, {}), None), x.axes)
        used, stored = (
            self.sharding(x.axes, param_spec(self.plan, x.sizes, stored=s)) for s in (False, True)
        )
        return Named(_gathered_param(x.array, used, stored), x.axes)

    # --- the shards of token groups, see `GroupShards`

    def grouped(self, array: jax.Array, groups: int) -> jax.Array:
        """Return ``[tokens, …]`` as ``[group, token, …]``, each group where its tokens are."""
        return self.with_groups(array.reshape(groups, -1, *array.shape[1:]))

    def with_groups(self, array: jax.Array) -> jax.Array:
        """Return ``[group, …]`` with each group where its tokens are."""
        spec = group_spec(self.plan, {"group": array.shape[0]})
        axes = ("group", *("" for _ in array.shape[1:]))
        return with_sharding(array, self.sharding(axes, spec))

    def at_groups(self, slots: Named) -> Named:
        """Return slots where the tokens of their groups are."""
        return self.constrained(slots, group_spec(self.plan, slots.sizes))

    def at_experts(self, slots: Named) -> Named:
        """Return slots where their experts are."""
        return self.constrained(slots, value_spec(self.plan, slots.sizes))


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gathered_param(
    array: jax.Array, used: NamedSharding, stored: NamedSharding | None
) -> jax.Array:
    return with_sharding(array, used)


def _gather_forward(
    array: jax.Array, used: NamedSharding, stored: NamedSharding | None
) -> tuple[jax.Array, None]:
    return _gathered_param(array, used, stored), None


def _gather_backward(
    used: NamedSharding, stored: NamedSharding | None, residuals: None, gradient: jax.Array
) -> tuple[jax.Array]:
    if stored is None:
        return (gradient,)
    return (with_sharding(gradient, stored),)


_gathered_param.defvjp(_gather_forward, _gather_backward)
