"""A graph run segment by segment, each compiled once a structure.

Equal layers are compiled once, and parameters are fetched, cast and freed layer by layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from moecc.backend import Arrays
from moecc.errors import InputError, MachineError, UsageError, nearest
from moecc.ir.graph import Graph, Value
from moecc.types import Array as NumpyArray
from moecc.types import DType
from moecc_backends.xla.lower.function import cast_input, finalize_output, function, lower_values
from moecc_backends.xla.lower.scan import GraphSegment, segments
from moecc_backends.xla.run.memory import in_precision, within_memory
from moecc_backends.xla.trace.context import DEFAULTS, Options
from moecc_backends.xla.trace.host_arrays import misfits, missing, to_device, to_numpy
from moecc_backends.xla.trace.values import MOST_LISTED, Named, Operand


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
        problems = missing(self.graph, params, inputs)
        sizes: dict[str, int] = {}
        for name, value in self.graph.inputs.items():
            if name in inputs:
                problems += misfits(value, inputs[name], sizes)
        if problems:
            raise InputError(problems)
        with within_memory(), in_precision(self.dtype):
            return self._run_all(params, inputs)

    def _run_all(self, params: Arrays, inputs: Arrays) -> dict[str, NumpyArray]:
        alive = {v: self._to_devices(inputs[n], v) for n, v in self.graph.inputs.items()}
        returned = set(self.graph.outputs.values())
        for segment in self._segments:
            arrays = {v: alive[v] for v in segment.inputs}
            weights = {v: self._to_devices(params[v.name], v) for v in segment.params}
            alive.update(self._run(segment, arrays, weights))
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
        self, segment: GraphSegment, inputs: dict[Value, jax.Array], weights: dict[Value, jax.Array]
    ) -> dict[Value, jax.Array]:
        compiled = self._compiled.get(segment.key)
        if compiled is None:
            function = segment_function(segment, segment.inputs, self.dtype, self.options)
            compiled = self._compiled[segment.key] = jax.jit(function)
        results = compiled([], [*inputs.values()], [*weights.values()])
        return dict(zip(segment.outputs, results, strict=True))


def segment_function(
    segment: GraphSegment, inputs: list[Value], dtype: DType, options: Options
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
        borrowed: list[jax.Array],
        weights: list[jax.Array | tuple[jax.Array, ...]],
    ) -> list[jax.Array]:
        arrays = (*spent, *borrowed, *weights)
        named = dict(zip((*inputs, *segment.params), arrays, strict=True))
        values = lower_values(segment.nodes, named, dtype, options)
        return [_boundary(values[v], v) for v in segment.outputs]

    return run


def _boundary(value: Operand, declared: Value) -> jax.Array:
    assert isinstance(value, Named), f"the ragged value %{declared.name} crosses a segment"
    return value.to(declared.type.names).array


# A session: parameters and caches stay on the device, and caches are updated in place.
#
# Graphs are cut into segments as in `program`, so equal layers are compiled once. What a run takes
# from the session and makes anew is donated: XLA writes into the same memory.

Alive = dict[Value, jax.Array]

Weight = jax.Array | tuple[jax.Array, ...]
"""A parameter; one that experts have is an array for each, so that a step reads those it needs."""


@dataclass
class XlaSession:
    """See `moecc.decoding.Session`.

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
    _segments: dict[Graph, list[GraphSegment]] = field(default_factory=dict)
    _compiled: dict[tuple[object, ...], Any] = field(default_factory=dict)

    def keep(self, values: Mapping[str, NumpyArray]) -> None:
        """Keep `values` on the device, in the type of the computation."""
        with in_precision(self.dtype):
            arrays = {n: cast_input(jnp.asarray(a), self.dtype) for n, a in values.items()}
        self._values.update(arrays)

    def kept(self) -> dict[str, NumpyArray]:
        """Return what is kept."""
        return {name: to_numpy(array) for name, array in self._values.items()}

    def run(self, graph: Graph, inputs: Arrays) -> dict[str, NumpyArray]:
        """Run `graph`.

        Raises:
          MachineError: the memory of a device is too small.
        """
        with within_memory(), in_precision(self.dtype):
            alive = {
                v: (to_device(inputs[n], v) if n in inputs else self._values[n])
                for n, v in graph.inputs.items()
            }
            donated = {v for n, v in graph.inputs.items() if n not in inputs}
            donated &= {graph.inputs[n] for n in graph.outputs if n in graph.inputs}
            if graph not in self._segments:
                self._segments[graph] = segments(graph)
            for segment in self._segments[graph]:
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
                array = finalize_output(Named(alive[value], value.type.names), value)
                returned[name] = to_numpy(array)
        return returned

    def _run(self, segment: GraphSegment, alive: Alive, donated: set[Value]) -> Alive:
        borrowed = [v for v in segment.inputs if not (v in donated and v in segment.last_uses)]
        spent = [v for v in segment.inputs if v not in borrowed]
        key = (*segment.key, tuple(segment.inputs.index(v) for v in spent))
        if key not in self._compiled:
            options = replace(self.options, in_place=True)
            function = segment_function(segment, [*spent, *borrowed], self.dtype, options)
            self._compiled[key] = jax.jit(function, donate_argnums=0)
        weights = [self._weight(v) for v in segment.params]
        arrays = [alive[v] for v in spent], [alive[v] for v in borrowed], weights
        return dict(zip(segment.outputs, self._compiled[key](*arrays), strict=True))

    def _weight(self, value: Value) -> Weight:
        if value.name not in self._weights:
            self._weights[value.name] = _on_device(self.params[value.name], value)
        return self._weights[value.name]


def _on_device(array: NumpyArray, value: Value) -> Weight:
    names = value.type.names
    if len(names) < 3 or names[0] != "expert" or len(array) > MOST_LISTED:
        return to_device(array, value)
    problems = misfits(value, array, {})
    if problems:
        raise InputError(problems)
    return tuple(jnp.asarray(part) for part in array)


# A graph as the text that jax or XLA makes of it, for people to read.

_XLA_PLATFORMS = {"cpu": "cpu", "gpu": "cuda", "tpu": "tpu"}


def emitted(graph: Graph, inputs: Arrays, *, emit: str, dtype: DType, options: Options) -> str:
    """Return `graph` as text.

    Args:
      graph: the graph.
      inputs: arrays for its inputs, of which only the shapes matter.
      emit: ``jaxpr``, what jax traces; ``stablehlo``, what it hands to XLA for the platform; or
        ``hlo``, what XLA compiles for a device that is here.
      dtype: the type of the computation.
      options: choices for the lowering.

    Raises:
      UsageError: there is no such text.
      MachineError: HLO is asked for, for a platform that is not here.
      InputError: the graph has no lowering, or the forced dispatch does not fit it.
    """
    if emit not in _EMITTERS:
        hint = nearest(emit, _EMITTERS)
        raise UsageError(
            f"nothing called {emit!r} is emitted", expected=", ".join(_EMITTERS), hint=hint
        )
    if emit == "hlo" and options.target != jax.default_backend():
        raise MachineError(
            f"XLA compiles for a device, and there is no {options.target} here",
            hint="--emit stablehlo shows what XLA is given for any platform",
        )
    with in_precision(dtype):
        params = {n: _shape(v, v.type.shape, dtype) for n, v in graph.params.items() if v.users}
        shapes = {n: _shape(v, inputs[n].shape, dtype) for n, v in graph.inputs.items()}
        traced = jax.jit(function(graph, dtype=dtype, options=options)).trace(params, shapes)
        return str(_EMITTERS[emit](traced, options))


def _shape(value: Value, shape: tuple[int, ...], dtype: DType) -> jax.ShapeDtypeStruct:
    """Return an array without elements: nothing of a large model is in memory."""
    kinds: dict[str, DTypeLike] = {"float": dtype.numpy, "int": jnp.int32, "bool": jnp.bool_}
    kind = value.type.dtype.kind
    element = jax.random.key(0).dtype if kind == "key" else kinds[kind]
    return jax.ShapeDtypeStruct(shape, element)


_EMITTERS: dict[str, Callable[[jax.stages.Traced, Options], object]] = {
    "jaxpr": lambda traced, options: traced.jaxpr,
    "stablehlo": lambda traced, options: traced.lower(
        lowering_platforms=(_XLA_PLATFORMS[options.target],)
    ).as_text(),
    "hlo": lambda traced, options: traced.lower().compile().as_text(),
}
