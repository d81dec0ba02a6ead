"""The first value of a graph that is not what it means: of the XLA backend, or of its weights."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from moecc.backend import get_backend
from moecc.errors import InputError
from moecc.ir.graph import Graph, Value
from moecc.ir.structure import clone
from moecc.ir.text import format_node
from moecc.types import F64, Array

TOLERANCE = 1e-9
"""The difference allowed between two backends in float64, times the magnitude of a value."""


@dataclass(frozen=True)
class Gap:
    """A value that differs.

    Attributes:
      place: the line of its node, or the name of the parameter.
      expected: one element.
      found: the same element.
    """

    place: str
    expected: object
    found: object

    def __str__(self) -> str:
        return f"{self.place}: expected {self.expected}, found {self.found}"


def line_of(value: Value) -> str:
    """Return the line of the node that makes a value, or its name."""
    return f"%{value.name}" if value.node is None else format_node(value.node)


def gap(value: Value, expected: Array, found: Array, tolerance: float) -> Gap | None:
    """Return the element in which two arrays differ most, or None if they agree.

    Args:
      value: what they are of.
      expected: the right one; what is NaN in it may be anything.
      found: the other.
      tolerance: of floats, times the largest magnitude; 0 compares bit for bit.
    """
    if expected.shape != found.shape:
        return Gap(line_of(value), f"shape {expected.shape}", f"shape {found.shape}")
    from moecc.testing.oracle import distance, magnitude

    if expected.dtype.kind not in "fV":
        apart = np.asarray(expected != found, np.float64)
        allowed = 0.0
    else:
        apart, allowed = distance(expected, found), tolerance * magnitude(expected)
    if not (apart > allowed).any():
        return None
    at = np.unravel_index(int(np.argmax(apart)), apart.shape)
    return Gap(f"{line_of(value)}, element {[int(i) for i in at]}", expected[at], found[at])


def xla_gap(graph: Graph, seed: int = 0) -> Gap | None:
    """Return the first value that XLA computes otherwise than the reference, on random data.

    Both compute in float64.

    Raises:
      InputError: one of them cannot run the graph.
    """
    from moecc.testing.data import inputs_for, params_for

    params, inputs = params_for(graph, seed), inputs_for(graph, seed)
    names = watched(graph)
    expected = values_of(graph, params, inputs)
    with_all = _returning(graph, names)
    found = get_backend("xla").compile(with_all, dtype=F64).run(params, inputs)
    for name, output in names.items():
        value = graph.value(name)
        differs = gap(value, expected[value], np.asarray(found[output]), TOLERANCE)
        if differs is not None:
            return differs
    return None


def watched(graph: Graph) -> dict[str, str]:
    """Return the values that a backend can return, by name, with names of outputs for them.

    Rows of experts have no shape of their own; what is combined from them is compared.
    """
    made = [v for node in graph for v in node.results if not v.type.extents]
    free = [v for v in made if v.type.dtype.kind != "key" and not v.type.unreduced]
    return {value.name: f"value.{number}" for number, value in enumerate(free)}


def values_of(
    graph: Graph, params: Mapping[str, Array], inputs: Mapping[str, Array]
) -> dict[Value, Array]:
    """Return all values of `graph` in the reference, without those of repeated bodies."""
    program = cast(Any, get_backend("reference").compile(graph))
    return {value: np.asarray(array.data) for value, array in program.trace(params, inputs)}


def _returning(graph: Graph, names: Mapping[str, str]) -> Graph:
    copy = clone(graph)
    for name in list(copy.output_names):
        copy.drop_output(name)
    for name, output in names.items():
        copy.set_output(output, copy.value(name))
    if not copy.output_names:
        raise InputError("the graph has no value that could be compared")
    return copy


def weight_gap(graph: Graph, seed: int = 0) -> Gap | None:
    """Return the first parameter that is written otherwise than its expression says.

    The weights are written as a checkpoint, of random sources, and read back; the oracle evaluates
    the expressions as they stand, without the simplifier.

    Raises:
      InputError: the weights cannot be written.
    """
    from moecc.formats.safetensors import read_header
    from moecc.formats.writer import OutputTensor, write_checkpoint
    from moecc.testing.weights import stored_sources, whole_naively

    weights = {n: v.weight for n, v in graph.params.items() if v.weight is not None}
    read = stored_sources(weights.values(), seed)
    tensors = [OutputTensor(n, w, w.type.dtype) for n, w in weights.items()]
    with tempfile.TemporaryDirectory(prefix="moecc-weights-") as name:
        written = write_checkpoint(Path(name), tensors, read, max_shard_bytes=1 << 16)
        files = {t.name: Path(name) / t.file for t in written.tensors}
        headers = {path: read_header(path) for path in set(files.values())}
        for tensor in tensors:
            expected = whole_naively(tensor.expr, read)
            info = headers[files[tensor.name]].tensors[tensor.name]
            with info.file.open("rb") as file:
                file.seek(info.offset)
                raw = file.read(info.nbytes)
            found = np.frombuffer(raw, info.dtype.numpy).reshape(info.shape)
            if expected.tobytes() != raw:
                differs = gap(graph.params[tensor.name], expected, found, 0.0)
                return differs or Gap(f"%{tensor.name}", "the same bits", "others")
    return None
