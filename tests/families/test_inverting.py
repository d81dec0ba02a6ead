"""Undoing how a family reads a parameter gives tensors that read back as the parameter."""

import numpy as np
import pytest
from family_configs import MemoryCheckpoint
from hypothesis import given
from hypothesis import strategies as st

from moecc.ir import F32, tensor
from moecc.translate.export import tensors_of
from moecc.weights.evaluate import evaluate
from moecc.weights.expr import Source, transform
from moecc.weights.movement import Concat, Index, Merge, Permute, Rename, Slice, Split, Stack, Tile
from moecc.weights.simplify import simplify


@st.composite
def readings(draw):
    """Draw an expression made of movements that can be undone, over sources of different names."""
    sizes = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    type = tensor(F32, **{f"a{i}": 2 * size for i, size in enumerate(sizes)})
    counter = iter(range(1000))
    expr = Source(f"t{next(counter)}", type)
    for level in range(draw(st.integers(0, 3))):
        kind = draw(st.sampled_from(["stack", "concat", "permute", "rename", "split", "merge"]))
        axis = draw(st.sampled_from(expr.type.names))
        if kind in ("stack", "concat"):
            parts = tuple(_fresh(expr, counter) for _ in range(draw(st.integers(1, 3))))
        if kind == "stack":
            expr = Stack(parts, f"s{level}", draw(st.integers(0, expr.type.rank)))
        elif kind == "concat":
            expr = Concat(parts, axis)
        elif kind == "permute":
            expr = Permute(expr, tuple(draw(st.permutations(expr.type.names))))
        elif kind == "rename":
            expr = Rename(expr, axis, f"r{level}")
        elif kind == "split" and expr.type[axis].size % 2 == 0:
            expr = Split(expr, axis, ((f"p{level}", 2), (f"q{level}", expr.type[axis].size // 2)))
        elif kind == "merge" and expr.type.rank > 1:
            expr = Merge(expr, expr.type.names[:2], f"m{level}")
    return expr


def _fresh(expr, counter):
    def renamed(x):
        return Source(f"t{next(counter)}", x.type) if isinstance(x, Source) else x

    return transform(expr, renamed)


@given(readings())
def test_reading_the_tensors_gives_the_parameter(read):
    made = Source("parameter", read.type)
    parameter = np.arange(np.prod(read.type.shape), dtype=np.float32).reshape(read.type.shape)
    before = MemoryCheckpoint({}, {"parameter": parameter})
    arrays = {n: evaluate(expr, before.read) for n, expr in tensors_of([(read, made)])}
    again = evaluate(read, MemoryCheckpoint({}, arrays).read)
    np.testing.assert_array_equal(again, parameter)


def test_an_axis_of_one_entry_comes_back():
    source = Source("gate", tensor(F32, shared=1, embed=3))
    made = Source("vector", tensor(F32, embed=3))
    read = Index(source, "shared", 0)
    ((name, expr),) = tensors_of([(read, made)])
    assert name == "gate"
    assert expr is simplify(Tile(made, "shared", 1))
    assert tensors_of([(read, read)]) == [("gate", source)]


@pytest.mark.parametrize(
    "read",
    [
        Slice(Source("t", tensor(F32, a=4)), "a", 0, 2),
        Index(Source("t", tensor(F32, a=4, b=2)), "a", 1),
        Tile(Source("t", tensor(F32, a=4)), "b", 2),
    ],
    ids=str,
)
def test_what_loses_elements_or_repeats_them_cannot_be_undone(read):
    with pytest.raises(ValueError, match="cannot be inverted"):
        tensors_of([(read, Source("p", read.type))])
