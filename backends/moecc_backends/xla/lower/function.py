"""A graph as one pure function: on one device, under shard_map, or for XLA's partitioner."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from math import prod

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import NamedSharding, PartitionSpec

from moecc.errors import InputError, Problem, raise_problems
from moecc.ir.graph import Graph, Node, Value, where
from moecc.ir.mesh import Mesh, mesh_of, nearest_multiple, required_mesh
from moecc.ir.ops.slots import SlotsOp
from moecc.ir.traits import CollectiveKind, Role
from moecc.sharding.layout import Layout, ShardingSpec, group_spec, param_spec, value_spec
from moecc.types import F32, DType, TensorType
from moecc.types import Array as HostArray
from moecc.weights.expr import Box
from moecc_backends.xla.dispatch.choose import check_dispatch
from moecc_backends.xla.dispatch.sorted_rows import (
    RowPermutation,
    capacity_permutation,
    flat_tokens,
    permute,
    permute_choices,
    sum_rows,
)
from moecc_backends.xla.lower.contract import is_precise, is_precise_param
from moecc_backends.xla.trace.context import (
    DEFAULTS,
    DIRECT,
    AnyOperand,
    DeviceView,
    Function,
    Interceptor,
    Lowered,
    Options,
    TraceContext,
    lower_nodes,
)
from moecc_backends.xla.trace.host_arrays import Master, check_given, check_keys
from moecc_backends.xla.trace.values import (
    SLOT_AXES,
    Deferred,
    DeferredRows,
    DispatchLayout,
    ExpertArrays,
    Named,
    NamedArrays,
    Names,
    Operand,
    Routing,
    Uncast,
    accumulator,
    is_float,
)

Given = Array | Master | tuple[Array, ...]
"""What is given of a value: an array, a parameter as it is stored, or an array for each expert."""


def function(
    graph: Graph,
    *,
    dtype: DType = F32,
    options: Options = DEFAULTS,
    interceptor: Interceptor = DIRECT,
) -> Callable[[NamedArrays, NamedArrays], dict[str, Array]]:
    """Return `graph` as a pure function of parameters and inputs, by name.

    A random key is a key of jax's, ``jax.random.key(0)`` or what `jax_inputs` makes of a number.
    Floating-point parameters and inputs are cast to `dtype`; norms, softmax and routing compute in
    float32 (selective precision, ST-MoE §3.3), and floating-point outputs are float32.

    Args:
      graph: the graph.
      dtype: the type of the computation.
      options: what was chosen for the lowering.
      interceptor: calls each lowering, see `Interceptor`.

    Raises:
      InputError: a dispatch lowering is forced that does not fit; when the function is traced, an
        operation has no lowering.
    """
    check_dispatch(graph, options)
    nodes = list(graph)
    keys = [name for name, value in graph.inputs.items() if value.type.dtype.kind == "key"]

    def run(params: NamedArrays, inputs: NamedArrays) -> dict[str, Array]:
        check_given(graph, params, inputs)
        check_keys({name: inputs[name] for name in keys})
        operands = {v: inputs[n] for n, v in graph.inputs.items()}
        operands |= {v: params[n] for n, v in graph.params.items() if v.users}
        values = lower_values(nodes, operands, dtype, options, interceptor=interceptor)
        return {n: finalize_output(values[v], v) for n, v in graph.outputs.items()}

    return run


def lower_values(
    nodes: list[Node],
    arrays: Mapping[Value, Given],
    dtype: DType,
    options: Options = DEFAULTS,
    view: DeviceView | None = None,
    interceptor: Interceptor = DIRECT,
) -> dict[Value, Operand]:
    """Return all values of `nodes`, lowered under the current trace from `arrays`.

    Args:
      nodes: the nodes, in order.
      arrays: of the values that they use and do not make; of a parameter that experts have, it may
        be a tuple with an array for each, and a parameter may be given as it is stored.
      dtype: the type of the computation.
      options: what was chosen for the lowering.
      view: the device whose shards the arrays are; None where they are whole.
      interceptor: calls each lowering, see `Interceptor`.
    """
    # What another segment computed has its type already: a loss may be wider than the model.
    values: dict[Value, Operand] = {v: _operand(v, array, dtype) for v, array in arrays.items()}
    context = TraceContext(
        dtype.numpy, values, options, view=view or DeviceView(), interceptor=interceptor
    )
    lower_nodes(context, nodes)
    return values


def _operand(value: Value, array: Given, dtype: DType) -> Named:
    names = value.type.names
    if isinstance(array, Master):
        return Uncast(array, names)
    # A number for the whole batch is a count, which a narrow type would round.
    precise = is_precise_param(value) or not (value.is_param or value.type.axes)
    if isinstance(array, tuple):
        parts = tuple(cast_input(part, dtype, precise=precise) for part in array)
        return ExpertArrays(parts, names)
    if value.node is None:
        array = cast_input(array, dtype, precise=precise)
    return Named(array, names)


def cast_input(array: Array, dtype: DType, *, precise: bool = False) -> Array:
    """Return an array cast to the type of the computation if it is floating-point.

    Args:
      array: a parameter or an input.
      dtype: the type of the computation.
      precise: whether it is float32 at least, as a router is under selective precision.
    """
    if is_float(array.dtype):
        return array.astype(accumulator(dtype.numpy) if precise else dtype.numpy)
    return array.astype(jnp.int32) if jnp.issubdtype(array.dtype, jnp.integer) else array


def finalize_output(value: Operand, declared: Value, *, wide: bool = True) -> Array:
    """Return an output with its axes in the declared order.

    Args:
      value: the output.
      declared: the value of the graph.
      wide: whether floats are float32 at least.

    Raises:
      InputError: the output is ragged.
    """
    if not isinstance(value, Named):
        raise InputError("a ragged value cannot be returned", where=f"%{declared.name}")
    array = value.to(declared.type.names).array
    if wide and is_float(array.dtype):
        return array.astype(accumulator(array.dtype))
    return array


# Devices as the mesh of a graph, and the shardings that types say.


def device_mesh(graph: Graph, devices: list[jax.Device] | None = None) -> jax.sharding.Mesh:
    """Return the mesh of `graph` made of `devices`, or of those at hand.

    Raises:
      InputError: the graph is on no mesh, or there are not enough devices.
    """
    grid = required_mesh(graph)
    devices = jax.devices() if devices is None else devices
    if len(devices) < grid.devices:
        raise InputError(
            "there are not enough devices",
            expected=f"{grid.devices} ({grid})",
            found=f"{len(devices)} of {devices[0].platform}",
            hint=f"XLA_FLAGS=--xla_force_host_platform_device_count={grid.devices} makes a CPU "
            "many",
        )
    kinds = (jax.sharding.AxisType.Auto,) * len(grid.axes)
    return jax.make_mesh(grid.shape, grid.names, kinds, devices=devices[: grid.devices])


def spec(type: TensorType) -> PartitionSpec:
    """Return how the axes of `type` are sharded, as jax spells it."""
    return PartitionSpec(*(axis.mesh or None for axis in type.axes))


def sharded_array(
    shape: tuple[int, ...],
    where: jax.sharding.Sharding | None,
    part: Callable[[Box], HostArray],
) -> jax.Array:
    """Return an array whose shards are made one by one, each where its device needs it.

    Args:
      shape: the shape of the array.
      where: its devices; None for the first one.
      part: makes a box of the array; devices that are copies of one another share it.
    """
    boxed = cache(part)

    def shard(index: tuple[slice, ...] | None) -> HostArray:
        assert index is not None, "every device has its part"
        return boxed(tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True)))

    where = where or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.make_array_from_callback(shape, where, shard)


# The token groups of a graph that XLA's partitioner spreads over a mesh.


def group_counts(graph: Graph) -> set[int]:
    """Return the numbers of token groups in which slots are counted under a capacity."""
    nodes = (node for node in graph.every_node() if node.op.assigns_slots and not node.op.chooses)
    bounded = (attrs for attrs in map(SlotsOp.of_node, nodes) if attrs.slots == "capacity")
    return {attrs.groups for attrs in bounded}


# A graph on a mesh as one program: by shard_map, or by XLA's partitioner.

_TOKEN_AXES = ("batch", "group", "slot")
"""The axes that a parameter never has."""

_WEIGHTS = frozenset({Role.MATRIX, Role.TABLE})
"""The roles of parameters that are sharded for storage, in the operations that read them."""


@dataclass(frozen=True)
class GspmdLowering(Interceptor):
    """Calls lowerings such that values are sharded over `mesh` as a layout of the plan shards them.

    Attributes:
      mesh: the devices.
      plan: which of its axes shard what.
    """

    mesh: jax.sharding.Mesh
    plan: Layout

    def __call__(
        self, ctx: TraceContext, node: Node, operands: list[AnyOperand], function: Function
    ) -> Lowered:
        """Return the results of a lowering, each held to its sharding."""
        if not _WEIGHTS.isdisjoint(node.op.roles):
            pairs = zip(operands, node.operands, strict=True)
            operands = [self._gathered(x, v, node) for x, v in pairs]
        lowered = function(ctx, node, *operands)
        if isinstance(lowered, Deferred):
            return lowered
        results = lowered if isinstance(lowered, tuple) else (lowered,)
        return tuple(map(self._held, results))

    def by_group(
        self,
        function: Callable[..., Array],
        groups: int,
        arrays: tuple[Array | None, ...],
    ) -> Array:
        """Return what `function` makes of each group, on the devices that have its tokens."""
        if not self._divides(groups):
            return function(groups, *arrays)
        each = (None if a is None else self.grouped(a, groups) for a in arrays)
        grouped = jax.vmap(partial(function, 1))(*each)
        return grouped.reshape(-1, *grouped.shape[2:])

    def layout(self, routing: Routing) -> DispatchLayout | None:
        """Return slots that are filled group by group, where groups have slots of their own."""
        if routing.capacity is None or not self._divides(routing.groups):
            return None
        return GroupSlots(routing, self)

    def _divides(self, groups: int) -> bool:
        return groups > 0 and groups % self.plan.shards["batch"] == 0

    def sharding(self, axes: Names, spec: ShardingSpec) -> NamedSharding:
        """Return the sharding of an array with `axes`, of which `spec` names the mesh axes."""
        return NamedSharding(self.mesh, PartitionSpec(*map(spec.get, axes)))

    def weight_sharding(self, value: Value, layers: str) -> NamedSharding:
        """Return the sharding of a parameter as it is stored, stacked along the axis `layers`."""
        sizes = dict(zip(value.type.names, value.type.shape, strict=True))
        spec = param_spec(self.plan, sizes, stored=True, layers=layers)
        return self.sharding(value.type.names, {} if is_precise_param(value) else spec)

    def constrained(self, x: Named, spec: ShardingSpec) -> Named:
        """Return `x` held to `spec`."""
        return Named(lax.with_sharding_constraint(x.array, self.sharding(x.axes, spec)), x.axes)

    def _held(self, x: Operand) -> Operand:
        if not isinstance(x, Named) or x.array.ndim < 2 or not set(_TOKEN_AXES) & set(x.axes):
            return x
        return self.constrained(x, value_spec(self.plan, x.sizes))

    def _gathered(self, x: AnyOperand, value: Value, node: Node) -> AnyOperand:
        """Return a parameter as it is used, gathered from where it is stored."""
        if not isinstance(x, Named) or value.node is not None or set(_TOKEN_AXES) & set(x.axes):
            return x
        if x.array.ndim < 2 or not is_float(x.array.dtype):
            return x
        if is_precise(node):
            return Named(_gathered_param(x.array, self.sharding(x.axes, {}), None), x.axes)
        used, stored = (
            self.sharding(x.axes, param_spec(self.plan, x.sizes, stored=s)) for s in (False, True)
        )
        return Named(_gathered_param(x.array, used, stored), x.axes)

    def grouped(self, array: Array, groups: int) -> Array:
        """Return ``[tokens, …]`` as ``[group, token, …]``, each group where its tokens are."""
        return self.with_groups(array.reshape(groups, -1, *array.shape[1:]))

    def with_groups(self, array: Array) -> Array:
        """Return ``[group, …]`` with each group where its tokens are."""
        axes = ("group", *("" for _ in array.shape[1:]))
        return self.constrained(
            Named(array, axes), group_spec(self.plan, {"group": array.shape[0]})
        ).array


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gathered_param(array: Array, used: NamedSharding, stored: NamedSharding | None) -> Array:
    return lax.with_sharding_constraint(array, used)


_gathered_param.defvjp(
    lambda array, used, stored: (_gathered_param(array, used, stored), None),
    lambda used, stored, _, gradient: (
        gradient if stored is None else lax.with_sharding_constraint(gradient, stored),
    ),
)


# Slots that are filled group by group, for XLA's partitioner (GSPMD).
#
# No device looks at another's tokens, and slots are held first to their groups and then to their
# experts: from these two constraints the partitioner makes one all-to-all (GShard, §3.2), from one
# of them all-gathers.

_GROUP_MAJOR = ("group", "expert", "slot")


@dataclass(frozen=True)
class GroupSlots(DispatchLayout):
    """Slots of each group apart, of a routing under a capacity.

    Attributes:
      shards: where groups and experts are sharded.
    """

    shards: GspmdLowering

    @cached_property
    def permutations(self) -> RowPermutation:
        """Choices and rows ``[expert * slot]`` of each group, with the groups as axis in front."""
        experts, groups, limit = self.routing.slot_shape
        chosen, slots = (
            self.shards.grouped(a, groups) for a in (self.routing.experts, self.routing.slots)
        )
        return jax.vmap(lambda c, s: capacity_permutation(c, s, experts, limit))(chosen, slots)

    def permute(self, x: Named) -> Named:
        """Gather the slots of each group from its tokens, and exchange them for the experts'."""
        tokens, inner, sizes = flat_tokens(self.routing, x)
        return self._exchanged(permute, tokens, inner, sizes)

    def permute_gates(self, gates: Array) -> Named:
        """Gather the gates of the slots of each group, and exchange them for the experts'."""
        return self._exchanged(permute_choices, gates, (), ())

    def _exchanged(
        self,
        move: Callable[[Array, RowPermutation], Array],
        tokens: Array,
        inner: Names,
        sizes: tuple[int, ...],
    ) -> Named:
        experts, groups, limit = self.routing.slot_shape
        rows = jax.vmap(move)(self.shards.grouped(tokens, groups), self.permutations)
        rows = self.shards.with_groups(rows).reshape(groups, experts, limit, *sizes)
        slots = Named(rows, (*_GROUP_MAJOR, *inner))
        return self._held(slots, group_spec, value_spec).to((*SLOT_AXES, *inner))

    def _held(self, slots: Named, *specs: Callable[..., ShardingSpec]) -> Named:
        """Return slots held first to one sharding, then to another."""
        for spec in specs:
            slots = self.shards.constrained(slots, spec(self.shards.plan, slots.sizes))
        return slots

    def unpermute(self, rows: Operand | DeferredRows, gates: Array | None) -> Named:
        """Exchange the slots of experts for the slots of groups, and gather those of each token."""
        assert isinstance(rows, Named), "slots have axes"
        routing, groups = self.routing, self.routing.groups
        inner = tuple(a for a in rows.axes if a not in SLOT_AXES)
        slots = rows.to((*_GROUP_MAJOR, *inner))
        back = self._held(slots, value_spec, group_spec).array
        sizes = back.shape[3:]
        flat = back.reshape(groups, prod(back.shape[1:3]), prod(sizes))
        weights = None if gates is None else self.shards.grouped(gates, groups)
        tokens = self.shards.with_groups(jax.vmap(sum_rows)(flat, self.permutations, weights))
        return Named(tokens.reshape(*routing.token_sizes, *sizes), (*routing.tokens, *inner))


# A graph on a mesh as one program: the same for every device, on the shards that each holds.
#
# What a device does stands in the graph: shards where types are sharded, and collectives where that
# changes. So the compiler has nothing to guess, and inserts no collective of its own.


def sharded_function(
    graph: Graph,
    mesh: jax.sharding.Mesh,
    *,
    dtype: DType = F32,
    options: Options = DEFAULTS,
) -> Callable[[NamedArrays, NamedArrays], dict[str, Array]]:
    """Return `graph` as a function of global parameters and inputs, run shard by shard on `mesh`.

    Args:
      graph: a graph on a mesh, its collectives lowered.
      mesh: devices, with the axes of the graph's mesh.
      dtype: what to compute in, as in `function`.
      options: what was chosen for the lowering; its platform is that of the devices.

    Raises:
      InputError: the graph is on no mesh, or on another; an output is an unreduced sum;
        a dispatch lowering is forced that does not fit.  The function raises it for inputs with
        an axis that the mesh does not divide.
    """
    grid = mesh_of(graph)
    spelling = ",".join(f"{n}:{s}" for n, s in mesh.shape.items())
    if grid is None or str(grid) != spelling:
        raise InputError(
            "the graph is on another mesh than the devices",
            expected="no mesh" if grid is None else str(grid),
            found=spelling,
        )
    problems = [
        Problem("an output is an unreduced sum", f"output {name}", found=str(value.type))
        for name, value in graph.outputs.items()
        if value.type.unreduced
    ] + [
        Problem("the collectives are not lowered", where(node))
        for node in graph
        if node.op.collective is CollectiveKind.ANY
    ]
    if problems:
        raise InputError(replace(problem, hint="run lower-collectives") for problem in problems)
    check_dispatch(graph, options)
    nodes = list(graph)
    params = {n: v for n, v in graph.params.items() if v.users}

    def on_device(weights: NamedArrays, inputs: NamedArrays) -> dict[str, Array]:
        arrays = {v: inputs[n] for n, v in graph.inputs.items()}
        arrays |= {v: weights[n] for n, v in params.items()}
        values = lower_values(nodes, arrays, dtype, options, view=DeviceView(grid))
        return {
            n: DeviceView(grid).settled(finalize_output(values[v], v), v.type)
            for n, v in graph.outputs.items()
        }

    in_specs, inputs_specs, out_specs = (
        {n: spec(v.type) for n, v in values.items()}
        for values in (params, graph.inputs, graph.outputs)
    )
    mapped = jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(in_specs, inputs_specs),
        out_specs=out_specs,
        check_vma=True,
    )

    def run(weights: NamedArrays, inputs: NamedArrays) -> dict[str, Array]:
        _check_divided({v: inputs[n] for n, v in graph.inputs.items()}, grid)
        return mapped({n: weights[n] for n in params}, {n: inputs[n] for n in graph.inputs})

    return run


def _check_divided(arrays: Mapping[Value, Array], mesh: Mesh) -> None:
    """Raise InputError with every axis of an input that the mesh does not divide."""
    problems = [
        Problem(
            f"the mesh does not divide the axis {axis.name}",
            f"%{value.name}",
            f"a multiple of {parts} ({' x '.join(axis.mesh)})",
            str(size),
            f"{nearest_multiple(size, parts)} would do",
        )
        for value, array in arrays.items()
        for axis, size in zip(value.type.axes, array.shape, strict=False)
        if size % (parts := mesh.size(axis.mesh))
    ]
    raise_problems(problems)
