"""A graph as the text that jax or XLA makes of it, for people to read."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from moecc.backend import Arrays
from moecc.errors import MachineError, UsageError, nearest
from moecc.ir.graph import Graph, Value
from moecc.types.dtypes import DType
from moecc_backends.xla.lower.function import function
from moecc_backends.xla.run.precision import in_precision
from moecc_backends.xla.trace.options import Options
from moecc_backends.xla.trace.typed_jax import abstract_array

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
        raise UsageError(f"nothing called {emit!r} is emitted", expected=_KNOWN, hint=hint)
    if emit == "hlo" and options.target != jax.default_backend():
        raise MachineError(
            f"XLA compiles for a device, and there is no {options.target} here",
            hint="--emit stablehlo shows what XLA is given for any platform",
        )
    with in_precision(dtype):
        params = {n: _shape(v, v.type.shape, dtype) for n, v in graph.params.items() if v.users}
        given = {n: _shape(v, inputs[n].shape, dtype) for n, v in graph.inputs.items()}
        traced = jax.jit(function(graph, dtype=dtype, options=options)).trace(params, given)
        return _EMITTERS[emit](traced, options)


def _shape(value: Value, shape: tuple[int, ...], dtype: DType) -> jax.ShapeDtypeStruct:
    """Return an array without elements: nothing of a large model is in memory."""
    kinds: dict[str, DTypeLike] = {"float": dtype.numpy, "int": jnp.int32, "bool": jnp.bool_}
    kind = value.type.dtype.kind
    element = jax.random.key(0).dtype if kind == "key" else kinds[kind]
    return abstract_array(shape, element)


def _jaxpr(traced: jax.stages.Traced, options: Options) -> str:
    return str(traced.jaxpr)


def _stablehlo(traced: jax.stages.Traced, options: Options) -> str:
    return str(traced.lower(lowering_platforms=(_XLA_PLATFORMS[options.target],)).as_text())


def _hlo(traced: jax.stages.Traced, options: Options) -> str:
    return str(traced.lower().compile().as_text())


_EMITTERS: dict[str, Callable[[jax.stages.Traced, Options], str]] = {
    "jaxpr": _jaxpr,
    "stablehlo": _stablehlo,
    "hlo": _hlo,
}
_KNOWN = ", ".join(_EMITTERS)
