"""A graph as one pure function, ``(params, inputs) → outputs``, and the trace that makes it.

The lowerings of all operations are imported here, which registers them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax.numpy as jnp
from jax import Array

from moecc.errors import InputError
from moecc.ir.graph import Graph, Node, Value
from moecc.types import F32, DType
from moecc_backends.xla.dispatch.choose import check_dispatch
from moecc_backends.xla.lower import attention as attention
from moecc_backends.xla.lower import axes as axes
from moecc_backends.xla.lower import collectives as collectives
from moecc_backends.xla.lower import contract as contract
from moecc_backends.xla.lower import elementwise as elementwise
from moecc_backends.xla.lower import opaque as opaque
from moecc_backends.xla.lower import routing as routing
from moecc_backends.xla.lower import scan as scan
from moecc_backends.xla.lower.contract import is_precise_param
from moecc_backends.xla.trace.context import (
    DEFAULTS,
    DIRECT,
    DeviceView,
    Interceptor,
    Options,
    TraceContext,
    lower_nodes,
)
from moecc_backends.xla.trace.host_arrays import Master, check_given, check_keys
from moecc_backends.xla.trace.values import ExpertArrays, Named, Operand, Uncast, accumulator

Tree = Mapping[str, Array]

Given = Array | Master | tuple[Array, ...]
"""What is given of a value: an array, a parameter as it is stored, or an array for each expert."""


def function(
    graph: Graph,
    *,
    dtype: DType = F32,
    options: Options = DEFAULTS,
    interceptor: Interceptor = DIRECT,
) -> Callable[[Tree, Tree], dict[str, Array]]:
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

    def run(params: Tree, inputs: Tree) -> dict[str, Array]:
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
    if isinstance(array, Master):
        return Uncast(array, value.type.names)
    if isinstance(array, tuple):
        precise = _is_precise(value)
        parts = tuple(cast_input(part, dtype, precise=precise) for part in array)
        return ExpertArrays(parts, value.type.names)
    if value.node is not None:
        return Named(array, value.type.names)
    return Named(cast_input(array, dtype, precise=_is_precise(value)), value.type.names)


def _is_precise(value: Value) -> bool:
    # A number for the whole batch is a count, which a narrow type would round.
    return is_precise_param(value) or not (value.is_param or value.type.axes)


def cast_input(array: Array, dtype: DType, *, precise: bool = False) -> Array:
    """Return an array cast to the type of the computation if it is floating-point.

    Args:
      array: a parameter or an input.
      dtype: the type of the computation.
      precise: whether it is float32 at least, as a router is under selective precision.
    """
    if jnp.issubdtype(array.dtype, jnp.floating):
        return array.astype(accumulator(dtype.numpy) if precise else dtype.numpy)
    return array.astype(jnp.int32) if jnp.issubdtype(array.dtype, jnp.integer) else array


def finalize_output(value: Operand, declared: Value) -> Array:
    """Return an output with its axes in the declared order, floats as float32 at least.

    Raises:
      InputError: the output is ragged.
    """
    if not isinstance(value, Named):
        raise InputError("a ragged value cannot be returned", where=f"%{declared.name}")
    array = value.to(declared.type.names).array
    if jnp.issubdtype(array.dtype, jnp.floating):
        return array.astype(jnp.promote_types(array.dtype, jnp.float32))
    return array
