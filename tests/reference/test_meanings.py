"""Each operation against a formula written differently: element by element, in plain Python."""

import itertools
import math
import operator
from statistics import NormalDist

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from moecc.errors import InputError
from moecc.ir import BF16, DTYPES, F32, F64, I32, OPS, PRED, Builder, Graph, tensor
from moecc.testing import run_reference

from .evaluation import evaluate

RNG = np.random.default_rng(7)


UNARY = {
    "silu": lambda x: x / (1 + math.exp(-x)),
    "gelu": lambda x: x * NormalDist().cdf(x),
    "gelu_tanh": lambda x: (
        0.5 * x * (1 + math.tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    ),
    "relu": lambda x: x if x > 0 else 0.0,
    "sigmoid": lambda x: 0.5 + 0.5 * math.tanh(x / 2),
    "tanh": lambda x: (math.exp(2 * x) - 1) / (math.exp(2 * x) + 1),
    "exp": lambda x: math.e**x,
    "log": lambda x: math.log2(x) * math.log(2) if x > 0 else math.nan,
    "square": lambda x: x * x,
    "rsqrt": lambda x: x**-0.5 if x > 0 else math.nan,
    "neg": lambda x: 0 - x,
    "stop_gradient": lambda x: x,
}


@pytest.mark.parametrize("name", UNARY)
def test_unary(name):
    x = RNG.normal(size=40) * 3
    expected = [UNARY[name](v) for v in x]
    assert_allclose(evaluate(name, (x, "a")), expected, rtol=1e-13, atol=1e-15)


def test_activations_do_not_lose_the_tails():
    far = [-30.0, -800.0, 800.0], "a"
    # x · Φ(x) at −30: Φ(−30) = 4.906713927148187e-198.
    assert_allclose(evaluate("gelu", far), [-30 * 4.906713927148187e-198, 0, 800], rtol=1e-12)
    assert_array_equal(evaluate("sigmoid", far)[1:], [0, 1])
    assert_array_equal(evaluate("silu", far)[1:], [0, 800])


BINARY = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": operator.truediv,
    "maximum": max,
    "minimum": min,
    "less": operator.lt,
    "equal": operator.eq,
}


@pytest.mark.parametrize("name", BINARY)
def test_binary_matches_axes_by_name(name):
    a, b = RNG.integers(1, 4, (2, 3, 4)) / 2, RNG.integers(1, 4, (4, 2)) / 2
    forth = evaluate(name, (a, "x y z"), (b, "z x"))
    back = evaluate(name, (b, "z x"), (a, "x y z"))
    assert forth.shape == back.shape == a.shape
    for i, j, k in np.ndindex(a.shape):
        assert forth[i, j, k] == BINARY[name](a[i, j, k], b[k, i])
        assert back[i, j, k] == BINARY[name](b[k, i], a[i, j, k])


@pytest.mark.parametrize("name", ["add", "sub", "mul", "maximum", "minimum", "neg"])
def test_arithmetic_of_whole_numbers_is_exact(name):
    operands = ([2**53 + 1, -7], [3, 5])[: len(OPS[name].operands)]
    found = evaluate(name, *((numbers, "a") for numbers in operands))
    assert found.dtype == np.int64
    assert found.tolist() == [*map((BINARY | UNARY)[name], *operands)]


def test_select_and_mask():
    x, y, keep = [[1.0, 2.0], [3.0, 4.0]], [10.0, 20.0], [True, False]
    assert_array_equal(evaluate("select", (keep, "i"), (x, "i j"), (y, "j")), [[1, 2], [10, 20]])
    assert_array_equal(evaluate("mask", (x, "i j"), (keep, "j")), [[1, -np.inf], [3, -np.inf]])
    assert_array_equal(evaluate("mask", ([5, 6], "j"), (keep, "j"), fill=-1.0), [5, -1])


def test_scale_and_constant():
    assert_array_equal(evaluate("scale", ([1.0, -2.0], "a"), by=0.1), [0.1, -0.2])
    assert evaluate("constant", value=0.1, dtype="bf16") == 0.1
    assert evaluate("constant", value=7.0, dtype="i32") == 7
    for value, dtype in ((0.5, "i32"), (math.inf, "i32"), (1.0, "pred"), (1.0, "f31")):
        with pytest.raises(InputError):
            Builder(Graph()).constant(value=value, dtype=dtype)


def cast(values, old, new):
    graph = Graph()
    x = graph.input("x", tensor(old, a="A"))
    graph.set_output("y", Builder(graph).cast(x, dtype=new.name))
    return run_reference(graph, inputs={"x": np.array(values)})["y"].tolist()


def test_a_cast_to_a_narrower_float_rounds_to_nearest_even():
    # bf16 has 8 significant bits: between 1 and 2 its values are 1/128 apart.
    half = 1 / 256
    found = cast([1 + half, 1 + 3 * half, 1 + half + 1e-9], F32, BF16)
    assert found == [1.0, 1 + 4 * half, 1 + 2 * half]
    assert cast([3.0e38 * 2, -np.inf], F64, F32) == [np.inf, -np.inf]
    assert cast([65520.0, 65519.9], F32, DTYPES["f16"]) == [np.inf, 65504.0]
    assert cast([448.0, 17.0], F32, DTYPES["f8e4m3fn"]) == [448.0, 16.0]


def test_casts_between_kinds():
    assert cast([2.9, -2.9, 0.0], F32, I32) == [2, -2, 0]
    assert cast([3, -4], I32, F32) == [3.0, -4.0]
    assert cast([2**24 + 1], I32, F32) == [2.0**24]
    assert cast([300], I32, DTYPES["i8"]) == [44]
    assert cast([0.0, 0.5], F32, PRED) == [False, True]
    assert cast([True, False], PRED, F32) == [1.0, 0.0]


def test_contract_sums_named_axes_and_keeps_shared_ones():
    x, w = RNG.normal(size=(2, 3, 4, 5)), RNG.normal(size=(6, 4, 3, 5))
    found = evaluate(
        "contract", (x, "batch expert embed seq"), (w, "mlp embed expert seq"), over="embed"
    )
    assert found.shape == (2, 3, 5, 6)
    for b, e, s, m in itertools.product(range(2), range(3), range(5), range(6)):
        expected = math.fsum(x[b, e, d, s] * w[m, d, e, s] for d in range(4))
        assert found[b, e, s, m] == pytest.approx(expected, rel=1e-13)


def test_contract_over_two_axes_and_to_a_scalar():
    x, w = RNG.normal(size=(3, 4)), RNG.normal(size=(4, 3))
    found = evaluate("contract", (x, "i j"), (w, "j i"), over=("i", "j"))
    expected = math.fsum(x[i, j] * w[j, i] for i in range(3) for j in range(4))
    assert found.shape == ()
    assert float(found) == pytest.approx(expected, rel=1e-13)


REDUCE = {
    "sum": math.fsum,
    "mean": lambda v: math.fsum(v) / len(v),
    "max": max,
    "logsumexp": lambda v: math.log(math.fsum(math.exp(x) for x in v)),
}


@pytest.mark.parametrize("name", REDUCE)
def test_reductions(name):
    x = RNG.normal(size=(2, 3, 4))
    expected = [REDUCE[name]([x[i, j, k] for i in range(2) for k in range(4)]) for j in range(3)]
    found = evaluate(name, (x, "i j k"), axes=("k", "i"))
    assert_allclose(found, expected, rtol=1e-13)


def test_logsumexp_and_softmax_do_not_overflow():
    x = [1000.0, 1000.0, -np.inf], "a"
    assert evaluate("logsumexp", x, axes="a") == pytest.approx(1000 + math.log(2), rel=1e-15)
    assert_array_equal(evaluate("softmax", x, axis="a"), [0.5, 0.5, 0])


def test_a_row_that_sees_nothing():
    x = [[-np.inf, -np.inf], [0.0, -np.inf]], "i j"
    assert_array_equal(evaluate("softmax", x, axis="j"), [[0, 0], [1, 0]])
    assert_array_equal(evaluate("logsumexp", x, axes="j"), [-np.inf, 0])
    assert np.isnan(evaluate("softmax", ([np.nan, -np.inf], "a"), axis="a")).all()


def test_softmax():
    x = RNG.normal(size=(2, 3))
    sums = [math.fsum(map(math.exp, column)) for column in x.T]
    expected = [[math.exp(v) / total for v, total in zip(row, sums, strict=True)] for row in x]
    assert_allclose(evaluate("softmax", (x, "i j"), axis="i"), expected, rtol=1e-13)


def test_norms():
    x, g, b = RNG.normal(size=(3, 2)), np.array([1.5, -2.0, 0.5]), np.array([0.1, 0.2, 0.3])
    for j in range(2):
        column = x[:, j]
        power = math.fsum(v * v for v in column) / 3
        rms = [v / math.sqrt(power + 0.25) * s for v, s in zip(column, g, strict=True)]
        found = evaluate("rms_norm", (x, "i j"), (g, "i"), axis="i", eps=0.25)
        assert_allclose(found[:, j], rms, rtol=1e-13)
        mean = math.fsum(column) / 3
        variance = math.fsum((v - mean) ** 2 for v in column) / 3
        unit = [(v - mean) / math.sqrt(variance + 0.25) for v in column]
        found = evaluate("layer_norm", (x, "i j"), (g, "i"), (b, "i"), axis="i", eps=0.25)
        assert_allclose(found[:, j], np.array(unit) * g + b, rtol=1e-12)


def test_rename_split_merge_slice_broadcast():
    x = np.arange(24).reshape(2, 12)
    assert_array_equal(evaluate("rename", (x, "a b"), axis="b", to="c"), x)
    parts = evaluate("split", (x, "a b"), axis="b", into=(("h", 3), ("d", 4)))
    assert parts.shape == (2, 3, 4)
    assert parts[1, 2, 3] == x[1, 2 * 4 + 3]
    merged = evaluate("merge", (parts, "a h d"), axes=("d", "a"), into="all")
    assert merged.shape == (3, 8)
    assert merged[2, 3 * 2 + 1] == parts[1, 2, 3]
    assert_array_equal(evaluate("slice", (x, "a b"), axis="b", start=3, stop=5), x[:, 3:5])
    wide = evaluate("broadcast", ([1, 2], "a"), (parts, "a h d"))
    assert wide.tolist() == [[[1] * 4] * 3, [[2] * 4] * 3]


def test_positions_embedding_one_hot():
    table = RNG.normal(size=(5, 7))
    ids = np.array([[3, 0, 4]])
    assert_array_equal(evaluate("positions", (table, "a b"), axis="a"), [0, 1, 2, 3, 4])
    for axes, rows in (("vocab embed", table), ("embed vocab", table.T)):
        found = evaluate("embedding", (table, axes), (ids, "batch seq"), axis="vocab")
        assert_array_equal(found, rows[ids])
    hot = evaluate("one_hot", ([1, 3, -1], "a"), into=(("b", 3),))
    assert_array_equal(hot, [[0, 1, 0], [0, 0, 0], [0, 0, 0]])


@pytest.mark.parametrize("index", [5, -1])
def test_an_index_outside_a_table_is_an_error(index):
    table = np.zeros((5, 2)), "vocab embed"
    with pytest.raises(InputError, match="an index is outside the table") as caught:
        evaluate("embedding", table, ([0, index], "seq"), axis="vocab")
    (problem,) = caught.value.problems
    assert (problem.found, problem.where) == (str(index), "%v = embedding")
