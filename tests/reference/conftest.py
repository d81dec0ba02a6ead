import numpy as np
import pytest

from moecc.backend import get_backend
from moecc.ir import DTYPES, Axis, Builder, Graph, TensorType

KINDS = {"f": "f64", "i": "i64", "b": "pred"}


@pytest.fixture
def evaluate():
    """Return a function that runs one operation on arrays with named axes.

    An operand is a pair of an array and its axes, ``(array, "batch seq")``.
    """

    def run(op, *operands, **attrs):
        graph, arrays = Graph(), {}
        for number, (data, axes) in enumerate(operands):
            data = np.asarray(data)
            names = axes.split()
            sized = tuple(Axis(n, s) for n, s in zip(names, data.shape, strict=True))
            dtype = DTYPES[KINDS[data.dtype.kind]]
            graph.input(f"x{number}", TensorType(dtype, sized))
            arrays[f"x{number}"] = data
        node = Builder(graph).node(op, *graph.inputs.values(), **attrs)
        for number, value in enumerate(node.results):
            graph.set_output(f"y{number}", value)
        found = get_backend("reference").compile(graph).run({}, arrays)
        for value, data in zip(node.results, found.values(), strict=True):
            assert data.shape == value.type.shape
        return found["y0"] if len(found) == 1 else tuple(found.values())

    return run
