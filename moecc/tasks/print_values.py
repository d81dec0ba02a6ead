"""Describe values inside a graph while it runs: shape, mean, spread and extremes, a line each."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase

import numpy as np

from moecc.errors import UsageError, nearest
from moecc.ir.graph import Graph, Value
from moecc.ir.structure import clone
from moecc.types import Array

PREFIX = "value."


def chosen_values(graph: Graph, pattern: str) -> list[Value]:
    """Return the values whose name or location matches a pattern of the shell, ``layers.3.*``.

    Raises:
      UsageError: there is none.
    """
    every = [*graph.inputs.values(), *graph.params.values(), *(v for n in graph for v in n.results)]
    found = [v for v in every if _matches(v, pattern)]
    if not found:
        hint = nearest(pattern, [v.name for v in every])
        raise UsageError(f"no value is called {pattern!r}", where="--print-values", hint=hint)
    return found


def _matches(value: Value, pattern: str) -> bool:
    loc = value.loc if value.node is None else value.node.loc
    bare = pattern.removeprefix("%")
    return fnmatchcase(value.name, bare) or fnmatchcase(loc, bare)


def with_values(graph: Graph, values: list[Value]) -> Graph:
    """Return a copy of `graph` whose further outputs ``value.NAME`` are `values`.

    Rows of experts have no shape that could be returned, and are left out.
    """
    copy = clone(graph)
    for value in values:
        if not value.type.extents and value.type.dtype.kind != "key":
            copy.set_output(f"{PREFIX}{value.name}", copy.value(value.name))
    return copy


def describe_values(values: list[Value], outputs: Mapping[str, Array]) -> list[str]:
    """Return a line for each value."""
    return [_line(value, outputs.get(f"{PREFIX}{value.name}")) for value in values]


def _line(value: Value, array: Array | None) -> str:
    loc = value.loc if value.node is None else value.node.loc
    place = f"%{value.name} : {value.type}" + (f" @{loc}" if loc else "")
    if array is None:
        return f"{place}: rows of experts, or a random key, have no array to show"
    shown = f"{place}: {list(array.shape)}"
    if array.dtype.kind not in "fV":
        return f"{shown} {_numbers(np.unique(array)[:8])}"
    wide = array.astype(np.float64)
    finite = wide[np.isfinite(wide)]
    if not finite.size:
        return f"{shown} no finite element"
    rest = f", {wide.size - finite.size:,} not finite" if finite.size < wide.size else ""
    return (
        f"{shown} mean {finite.mean():.4g}, std {finite.std():.4g}, min {finite.min():.4g}, "
        f"max {finite.max():.4g}, first {_numbers(wide.reshape(-1)[:4])}{rest}"
    )


def _numbers(array: Array) -> str:
    return "[" + ", ".join(f"{x:.4g}" for x in array.reshape(-1).tolist()) + "]"
