"""Small graphs in the reference interpreter, on arrays with named axes."""

from __future__ import annotations

import numpy as np

from moecc.ir import Builder, Graph, equal, parse, print_graph, tensor
from moecc.testing import run_reference
from moecc.types import dtype_from_numpy


def compute(build, **operands):
    """Return the outputs of a graph by name, which its text reads back as.

    Args:
      build: takes a builder and the inputs of its graph by name, and returns the outputs by name.
      operands: the inputs, arrays with their axes: ``(array, "batch seq")``.  The graph does not
        know the size of ``batch=B``.
    """
    graph, arrays = Graph(), {}
    for name, (data, axes) in operands.items():
        data = arrays[name] = np.asarray(data)
        sizes = {}
        for word, length in zip(axes.split(), data.shape, strict=True):
            axis, _, variable = word.partition("=")
            sizes[axis] = variable or length
        graph.input(name, tensor(dtype_from_numpy(data.dtype), **sizes))
    for name, value in build(Builder(graph), **graph.inputs).items():
        graph.set_output(name, value)
    assert equal(parse(print_graph(graph)), graph)
    results = run_reference(graph, inputs=arrays)
    for name, value in graph.outputs.items():
        assert not value.type.is_static or results[name].shape == value.type.shape
    return results


def evaluate(op, *operands, **attrs):
    """Return the result of an operation, or a tuple of its results."""

    def build(b, **inputs):
        node = b.node(op, *inputs.values(), **attrs)
        return {f"y{number}": value for number, value in enumerate(node.results)}

    results = compute(build, **{f"x{number}": pair for number, pair in enumerate(operands)})
    return results["y0"] if len(results) == 1 else tuple(results.values())


OPERANDS = {"keep": "token=T choice", "priority": "token=T", "mask": "token=T"}
"""Further operands of assign_slots, and their axes."""


def assign_slots(choices, experts, **attrs):
    """Return the slots of choices, ``[token, choice]``; further operands are given by name."""
    using = tuple(name for name in OPERANDS if name in attrs)
    operands = [(attrs.pop(name), OPERANDS[name]) for name in using]
    attrs |= {"tokens": "token", "experts": experts, "using": using}
    return evaluate("assign_slots", (choices, "token=T choice"), *operands, **attrs)
