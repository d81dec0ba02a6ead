"""A session: parameters and caches stay on the device, and caches are updated in place.

Graphs are cut into segments as in `program`, so equal layers are compiled once.  What a run takes
from the session and makes anew is donated: XLA writes into the same memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp

from moecc.backend import Arrays
from moecc.errors import InputError
from moecc.ir.graph import Graph, Value
from moecc.types.arrays import Array as NumpyArray
from moecc.types.dtypes import DType
from moecc_backends.xla.lower.function import cast_input, finalize_output
from moecc_backends.xla.lower.segments import Segment, segments
from moecc_backends.xla.run.device_memory import within_memory
from moecc_backends.xla.run.precision import in_precision
from moecc_backends.xla.run.program import segment_function
from moecc_backends.xla.trace.host_arrays import misfits, to_device, to_numpy
from moecc_backends.xla.trace.options import DEFAULTS, Options
from moecc_backends.xla.trace.values import MOST_LISTED, Named

Alive = dict[Value, jax.Array]

Weight = jax.Array | tuple[jax.Array, ...]
"""A parameter; one that experts have is an array for each, so that a step reads those it needs."""


@dataclass
class XlaSession:
    """See `moecc.decoding.session.Session`.

    Attributes:
      params: the parameters by name; each is read once.
      dtype: the type of the computation.
      options: what was chosen for the lowering.
    """

    params: Arrays
    dtype: DType
    options: Options = DEFAULTS
    _weights: dict[str, Weight] = field(default_factory=dict)
    _values: dict[str, jax.Array] = field(default_factory=dict)
    _segments: dict[Graph, list[Segment]] = field(default_factory=dict)
    _compiled: dict[tuple[object, ...], Any] = field(default_factory=dict)

    def keep(self, values: Mapping[str, NumpyArray]) -> None:
        """Keep `values` on the device, in the type of the computation."""
        with self._precision():
            made = {n: cast_input(jnp.asarray(a), self.dtype) for n, a in values.items()}
        self._values.update(made)

    def kept(self) -> dict[str, NumpyArray]:
        """Return what is kept."""
        return {name: to_numpy(array) for name, array in self._values.items()}

    def run(self, graph: Graph, inputs: Arrays) -> dict[str, NumpyArray]:
        """Run `graph`.

        Raises:
          MachineError: the memory of a device is too small.
        """
        with within_memory(), self._precision():
            alive = {v: self._input(n, v, inputs) for n, v in graph.inputs.items()}
            donated = {v for n, v in graph.inputs.items() if n not in inputs}
            donated &= {graph.inputs[n] for n in graph.outputs if n in graph.inputs}
            for segment in self._cut(graph):
                alive.update(self._run(segment, alive, donated))
                for value in segment.last_uses:
                    if not value.is_output:
                        del alive[value]
            return self._returned(graph, alive)

    def _returned(self, graph: Graph, alive: Alive) -> dict[str, NumpyArray]:
        returned = {}
        for name, value in graph.outputs.items():
            if name in graph.inputs:
                self._values[name] = alive[value]
            else:
                made = finalize_output(Named(alive[value], value.type.names), value)
                returned[name] = to_numpy(made)
        return returned

    def _run(self, segment: Segment, alive: Alive, donated: set[Value]) -> Alive:
        given = [v for v in segment.inputs if not (v in donated and v in segment.last_uses)]
        spent = [v for v in segment.inputs if v not in given]
        key = (*segment.key, tuple(segment.inputs.index(v) for v in spent))
        if key not in self._compiled:
            options = replace(self.options, in_place=True)
            function = segment_function(segment, [*spent, *given], self.dtype, options)
            self._compiled[key] = jax.jit(function, donate_argnums=0)
        weights = [self._weight(v) for v in segment.params]
        arrays = [alive[v] for v in spent], [alive[v] for v in given], weights
        return dict(zip(segment.outputs, self._compiled[key](*arrays), strict=True))

    def _cut(self, graph: Graph) -> list[Segment]:
        if graph not in self._segments:
            self._segments[graph] = segments(graph)
        return self._segments[graph]

    def _input(self, name: str, value: Value, inputs: Arrays) -> jax.Array:
        return to_device(inputs[name], value) if name in inputs else self._values[name]

    def _weight(self, value: Value) -> Weight:
        if value.name not in self._weights:
            self._weights[value.name] = _on_device(self.params[value.name], value)
        return self._weights[value.name]

    def _precision(self) -> Any:
        return in_precision(self.dtype)


def _on_device(array: NumpyArray, value: Value) -> Weight:
    names = value.type.names
    if len(names) < 3 or names[0] != "expert" or len(array) > MOST_LISTED:
        return to_device(array, value)
    problems = misfits(value, array, {})
    if problems:
        raise InputError(problems)
    return tuple(jnp.asarray(part) for part in array)
