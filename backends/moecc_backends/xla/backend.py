"""The XLA backend: a graph as one pure function, or run segment by segment.

`function` gives ``(params, inputs) → outputs`` for ``jax.jit`` and ``jax.grad``.  A `XlaProgram`
runs the same lowering cut into segments, so that equal layers are compiled once and parameters
are fetched, cast and freed layer by layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moecc.ahead.request import Job, Result
from moecc.backend import Arrays
from moecc.errors import InputError, Problem, nearest
from moecc.ir.graph import Graph, Node, Value
from moecc.ir.remat_names import only_routes
from moecc.ir.verify import where
from moecc.launch.process_info import process_info
from moecc.types.dtypes import F32, F64, DType
from moecc_backends.xla.dispatch.choose import check_dispatch, dispatch_problems
from moecc_backends.xla.import_jax import find_devices
from moecc_backends.xla.lower import attention as attention
from moecc_backends.xla.lower import buffers as buffers
from moecc_backends.xla.lower import chunks as chunks
from moecc_backends.xla.lower import collectives as collectives
from moecc_backends.xla.lower import contract as contract
from moecc_backends.xla.lower import dispatch_combine as dispatch_combine
from moecc_backends.xla.lower import elementwise as elementwise
from moecc_backends.xla.lower import random as random
from moecc_backends.xla.lower import scan as scan
from moecc_backends.xla.lower.segments import Segment, segments
from moecc_backends.xla.trace.context import LOWERINGS, Around, Context, lower_nodes
from moecc_backends.xla.trace.device_view import Local
from moecc_backends.xla.trace.dtypes import accumulator
from moecc_backends.xla.trace.options import AUTO, DEFAULTS, Options
from moecc_backends.xla.trace.values import Named, Operand

Tree = Mapping[str, jax.Array]


def function(
    graph: Graph,
    *,
    dtype: DType = F32,
    options: Options = DEFAULTS,
    around: Around | None = None,
) -> Callable[[Tree, Tree], dict[str, jax.Array]]:
    """Return `graph` as a pure function of parameters and inputs, by name.

    A random key is a key of jax's, ``jax.random.key(0)`` or what `jax_inputs` makes of a number.
    Floating-point parameters and inputs are cast to `dtype`; norms, softmax and routing compute in
    float32 (selective precision, ST-MoE §3.3), and floating-point outputs are float32.

    Args:
      graph: the graph.
      dtype: the type of the computation.
      options: what was chosen for the lowering.
      around: what calls each lowering, see `Context`.

    Raises:
      InputError: a dispatch lowering is forced that does not fit; when the function is traced, an
        operation has no lowering.
    """
    check_dispatch(graph, options)
    nodes = list(graph)

    def run(params: Tree, inputs: Tree) -> dict[str, jax.Array]:
        _check_keys(graph, inputs)
        given = {v: inputs[n] for n, v in graph.inputs.items()}
        given |= {v: params[n] for n, v in graph.params.items() if v.users}
        values = trace(nodes, given, dtype, options, around=around)
        return {n: finished(values[v], v) for n, v in graph.outputs.items()}

    return run


def trace(
    nodes: list[Node],
    given: Mapping[Value, jax.Array],
    dtype: DType,
    options: Options = DEFAULTS,
    local: Local | None = None,
    around: Around | None = None,
) -> dict[Value, Operand]:
    """Return all values of `nodes`, lowered under the current trace from the `given` arrays.

    Args:
      nodes: the nodes, in order.
      given: the arrays of the values that they use and do not make.
      dtype: the type of the computation.
      options: what was chosen for the lowering.
      local: where the device stands whose parts the arrays are; None where they are whole.
      around: what calls each lowering, see `Context`.
    """
    # What another segment computed has its type already: a loss may be wider than the model.
    values: dict[Value, Operand] = {
        v: Named(
            entered(array, dtype, precise=v.is_param and only_routes(v))
            if v.node is None
            else array,
            v.type.names,
        )
        for v, array in given.items()
    }
    context = Context(dtype.numpy, values, options, local=local or Local(), around=around)
    lower_nodes(context, nodes)
    return values


def jax_inputs(graph: Graph, inputs: Arrays) -> dict[str, Any]:
    """Return `inputs` as the function of `graph` takes them: with keys of jax's.

    A key may be one already, or the 64-bit number that the reference takes: then both draw the
    same numbers.  Under ``jax.jit`` it is too late for that, as jax halves such a number.
    """
    is_key = {n: v.type.dtype.kind == "key" for n, v in graph.inputs.items()}
    return {n: _key(a) if is_key.get(n) else a for n, a in inputs.items()}


def entered(array: jax.Array, dtype: DType, *, precise: bool = False) -> jax.Array:
    """Return an array cast to the type of the computation if it is floating-point.

    Args:
      array: a parameter or an input.
      dtype: the type of the computation.
      precise: whether it is float32 at least, as a router is under selective precision.
    """
    if jnp.issubdtype(array.dtype, jnp.floating):
        return array.astype(accumulator(dtype.numpy) if precise else dtype.numpy)
    return array.astype(jnp.int32) if jnp.issubdtype(array.dtype, jnp.integer) else array


def finished(value: Operand, declared: Value) -> jax.Array:
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


class XlaBackend:
    """Runs graphs through XLA."""

    name = "xla"

    def compile(
        self, graph: Graph, *, dtype: DType = F32, options: Options = DEFAULTS
    ) -> XlaProgram:
        """Return `graph` ready to run in `dtype`: on all processes, where the environment says so.

        Raises:
          MachineError: the processes did not meet.
          InputError: an operation has no lowering, an output is ragged, or a dispatch lowering is
            forced that does not fit.
        """
        problems = [
            Problem("a ragged value cannot be returned", f"output {n}", found=str(v.type))
            for n, v in graph.outputs.items()
            if v.type.ragged
        ]
        problems += [
            Problem(f"the xla backend cannot lower {node.op.name}", where(node))
            for node in graph
            if node.op.name not in LOWERINGS
        ]
        problems += dispatch_problems(graph, options)
        if problems:
            raise InputError(problems)
        process = process_info()
        if process is not None:
            from moecc_backends.xla.run.multi_process import shared_program

            return shared_program(graph, dtype, options, process)
        find_devices()
        return XlaProgram(graph, dtype, options)

    def compile_ahead(self, graph: Graph, job: Job) -> Result:
        """Compile a step of `graph` for a machine that need not be there; see `moecc.ahead`."""
        from moecc_backends.xla.aot.compiler import compile_ahead

        return compile_ahead(graph, job)

    def lower(
        self,
        graph: Graph,
        inputs: Arrays,
        *,
        emit: str,
        dtype: DType = F32,
        options: Mapping[str, str | None],
    ) -> str:
        """Return `graph` as text: a ``jaxpr``, ``stablehlo``, or ``hlo`` as compiled here.

        The options ``dispatch`` and ``platform`` are those of `Options`.

        Raises:
          UsageError: there is no such text, dispatch lowering or platform.
          MachineError: HLO is asked for, for a platform that is not here.
          InputError: the graph has no lowering, or the forced dispatch does not fit it.
        """
        from moecc_backends.xla.run.emitting import emitted

        find_devices()
        chosen = Options(options.get("dispatch") or AUTO, options.get("platform"))
        return emitted(graph, inputs, emit=emit, dtype=dtype, options=chosen)


class XlaProgram:
    """A graph cut into segments, each compiled once a structure.

    Attributes:
      graph: the graph.
      dtype: the type of the computation.
      options: what was chosen for the lowering.
      writes: whether this process writes what `run` returns.
    """

    writes = True

    def __init__(self, graph: Graph, dtype: DType, options: Options = DEFAULTS) -> None:
        self.graph = graph
        self.dtype = dtype
        self.options = options
        self._segments = segments(graph)
        self._compiled: dict[tuple[object, ...], Any] = {}

    def run(self, params: Arrays, inputs: Arrays) -> dict[str, np.ndarray[Any, Any]]:
        """Return the outputs by name.

        Parameters are looked up in `params` when their segment runs, so a mapping that makes them
        on demand keeps only one layer in memory.

        Raises:
          InputError: an array is missing or does not fit its type.
        """
        self._check(inputs, params)
        # Without its switch jax makes every float64 a float32 without a word.
        with jax.enable_x64(self.dtype == F64):
            return self._run_all(params, inputs)

    def _run_all(self, params: Arrays, inputs: Arrays) -> dict[str, np.ndarray[Any, Any]]:
        alive = {v: self._placed(inputs[n], v) for n, v in self.graph.inputs.items()}
        returned = set(self.graph.outputs.values())
        for segment in self._segments:
            given = {v: alive[v] for v in segment.inputs}
            weights = {v: self._placed(params[v.name], v) for v in segment.params}
            alive.update(self._run(segment, given, weights))
            for value in segment.last_uses:
                if value not in returned:
                    del alive[value]
        for value in returned:
            if value.is_param:
                alive[value] = self._placed(params[value.name], value)
        return {
            n: self._fetched(finished(Named(alive[v], v.type.names), v))
            for n, v in self.graph.outputs.items()
        }

    def _placed(self, array: Any, value: Value) -> jax.Array:
        """Return a parameter or input on its devices."""
        return _device(array, value)

    def _fetched(self, array: jax.Array) -> np.ndarray[Any, Any]:
        return numpy_output(array)

    def _run(
        self, segment: Segment, given: dict[Value, jax.Array], weights: dict[Value, jax.Array]
    ) -> dict[Value, jax.Array]:
        compiled = self._compiled.get(segment.key)
        if compiled is None:
            compiled = self._compiled[segment.key] = jax.jit(self._segment_function(segment))
        arrays = [*given.values()], [*weights.values()]
        results = compiled(*arrays)
        return dict(zip(segment.outputs, results, strict=True))

    def _segment_function(self, segment: Segment) -> Callable[..., list[jax.Array]]:
        def run(given: list[jax.Array], weights: list[jax.Array]) -> list[jax.Array]:
            named = dict(zip((*segment.inputs, *segment.params), (*given, *weights), strict=True))
            values = trace(segment.nodes, named, self.dtype, self.options)
            return [_boundary(values[v], v) for v in segment.outputs]

        return run

    def _check(self, inputs: Arrays, params: Arrays) -> None:
        problems = [
            Problem("no array is given", f"input %{n}", str(v.type), hint=nearest(n, inputs))
            for n, v in self.graph.inputs.items()
            if n not in inputs
        ]
        problems += [
            Problem("no array is given", f"param %{n}", str(v.type))
            for n, v in self.graph.params.items()
            if v.users and n not in params
        ]
        sizes: dict[str, int] = {}
        for name, value in self.graph.inputs.items():
            if name in inputs:
                problems += _misfit(value, inputs[name], sizes)
        if problems:
            raise InputError(problems)


def _boundary(value: Operand, declared: Value) -> jax.Array:
    assert isinstance(value, Named), f"the ragged value %{declared.name} crosses a segment"
    return value.to(declared.type.names).array


def _device(array: Any, value: Value) -> jax.Array:
    problems = _misfit(value, array, {})
    if problems:
        raise InputError(problems)
    if value.type.dtype.kind == "key":
        key: jax.Array = _key(array)
        return key
    if array.dtype.kind in "iu" and array.dtype.itemsize == 8:
        array = np.asarray(array).astype(np.int32)
    return jnp.asarray(array)


def _is_key(array: Any) -> bool:
    return isinstance(array, jax.Array) and jnp.issubdtype(array.dtype, jax.dtypes.prng_key)


def _check_keys(graph: Graph, inputs: Tree) -> None:
    problems = [
        Problem(
            "this is no key of jax's",
            f"input %{name}",
            expected="jax.random.key(0), for example",
            found=_kind(inputs[name].dtype),
            hint="jax_inputs(graph, inputs) makes one of a number",
        )
        for name, value in graph.inputs.items()
        if value.type.dtype.kind == "key" and not _is_key(inputs[name])
    ]
    if problems:
        raise InputError(problems)


def _key(array: Any) -> Any:
    """Return the key of jax's that has the bits of a 64-bit number; one of jax's as it is."""
    if _is_key(array):
        return array
    bits = np.asarray(array, np.uint64)
    words = np.stack([bits >> np.uint64(32), bits & np.uint64(0xFFFFFFFF)], axis=-1)
    data = jnp.asarray(words.astype(np.uint32))
    return jax.random.wrap_key_data(data, impl="threefry2x32")


def numpy_output(array: jax.Array) -> np.ndarray[Any, Any]:
    """Return an output as NumPy's; a key of jax's as the 64-bit number that has its bits."""
    if not _is_key(array):
        return np.asarray(array)
    words = np.asarray(jax.random.key_data(array)).astype(np.uint64)
    return np.asarray((words[..., 0] << np.uint64(32)) | words[..., 1])


def _misfit(value: Value, array: Any, sizes: dict[str, int]) -> list[Problem]:
    wanted, shape = value.type.sizes, np.shape(array)
    fits = len(wanted) == len(shape) and all(
        (size == n) if isinstance(size, int) else sizes.setdefault(str(size), n) == n
        for size, n in zip(wanted, shape, strict=True)
    )
    kind, expected = _kind(array.dtype), value.type.dtype.kind
    if fits and (kind == expected or (kind, expected) == ("int", "key")):
        return []
    here = f"{'param' if value.is_param else 'input'} %{value.name}"
    return [Problem("the array does not fit", here, str(value.type), f"{kind}{list(shape)}")]


def _kind(dtype: Any) -> str:
    """Return the kind of element as the types of the IR name it; `dtype` is NumPy's or jax's."""
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return "key"
    if jnp.issubdtype(dtype, jnp.floating):
        return "float"
    return {"i": "int", "u": "int", "b": "bool"}.get(dtype.kind, str(dtype))
