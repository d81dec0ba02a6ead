"""A graph run segment by segment, each compiled once a structure.

Equal layers are compiled once, and parameters are fetched, cast and freed layer by layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from moecc.backend import Arrays
from moecc.errors import InputError
from moecc.ir.graph import Graph, Value
from moecc.types.arrays import Array as NumpyArray
from moecc.types.dtypes import DType
from moecc_backends.xla.lower.function import finalize_output, lower_values
from moecc_backends.xla.lower.segments import Segment, segments
from moecc_backends.xla.run.device_memory import within_memory
from moecc_backends.xla.run.precision import in_precision
from moecc_backends.xla.trace.host_arrays import misfits, missing, to_device, to_numpy
from moecc_backends.xla.trace.options import DEFAULTS, Options
from moecc_backends.xla.trace.values import Named, Operand


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

    def run(self, params: Arrays, inputs: Arrays) -> dict[str, NumpyArray]:
        """Return the outputs by name.

        Parameters are looked up in `params` when their segment runs, so a mapping that makes them
        on demand keeps only one layer in memory.

        Raises:
          InputError: an array is missing or does not fit its type.
          MachineError: the memory of a device is too small.
        """
        self._check(inputs, params)
        with within_memory(), in_precision(self.dtype):
            return self._run_all(params, inputs)

    def _run_all(self, params: Arrays, inputs: Arrays) -> dict[str, NumpyArray]:
        alive = {v: self._to_devices(inputs[n], v) for n, v in self.graph.inputs.items()}
        returned = set(self.graph.outputs.values())
        for segment in self._segments:
            given = {v: alive[v] for v in segment.inputs}
            weights = {v: self._to_devices(params[v.name], v) for v in segment.params}
            alive.update(self._run(segment, given, weights))
            for value in segment.last_uses:
                if value not in returned:
                    del alive[value]
        for value in returned:
            if value.is_param:
                alive[value] = self._to_devices(params[value.name], value)
        return {
            n: self._to_numpy(finalize_output(Named(alive[v], v.type.names), v))
            for n, v in self.graph.outputs.items()
        }

    def _to_devices(self, array: Any, value: Value) -> jax.Array:
        """Return a parameter or input on its devices."""
        return to_device(array, value)

    def _to_numpy(self, array: jax.Array) -> NumpyArray:
        return to_numpy(array)

    def _run(
        self, segment: Segment, given: dict[Value, jax.Array], weights: dict[Value, jax.Array]
    ) -> dict[Value, jax.Array]:
        compiled = self._compiled.get(segment.key)
        if compiled is None:
            function = segment_function(segment, segment.inputs, self.dtype, self.options)
            compiled = self._compiled[segment.key] = jax.jit(function)
        results = compiled([], [*given.values()], [*weights.values()])
        return dict(zip(segment.outputs, results, strict=True))

    def _check(self, inputs: Arrays, params: Arrays) -> None:
        problems = missing(self.graph, params, inputs)
        sizes: dict[str, int] = {}
        for name, value in self.graph.inputs.items():
            if name in inputs:
                problems += misfits(value, inputs[name], sizes)
        if problems:
            raise InputError(problems)


def segment_function(
    segment: Segment, inputs: list[Value], dtype: DType, options: Options
) -> Callable[..., list[jax.Array]]:
    """Return a segment as a function of inputs that are spent, other inputs, and parameters.

    Args:
      segment: the segment.
      inputs: its inputs, those that are spent first.
      dtype: the type of the computation.
      options: what was chosen for the lowering.
    """

    def run(
        spent: list[jax.Array],
        given: list[jax.Array],
        weights: list[jax.Array | tuple[jax.Array, ...]],
    ) -> list[jax.Array]:
        arrays = (*spent, *given, *weights)
        named = dict(zip((*inputs, *segment.params), arrays, strict=True))
        values = lower_values(segment.nodes, named, dtype, options)
        return [_boundary(values[v], v) for v in segment.outputs]

    return run


def _boundary(value: Operand, declared: Value) -> jax.Array:
    assert isinstance(value, Named), f"the ragged value %{declared.name} crosses a segment"
    return value.to(declared.type.names).array
