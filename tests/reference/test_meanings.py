"""Each operation against a formula written differently: element by element, in plain Python."""

import itertools
import math
from statistics import NormalDist

import moecc_backends.reference  # noqa: F401 (fills the table of meanings)
import numpy as np
import pytest

from moecc.errors import InputError
from moecc.ir import BF16, DTYPES, F32, F64, I32, OPS, Builder, Graph, tensor
from moecc.testing import run_reference

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
def test_unary(name, evaluate):
    x = RNG.normal(size=40) * 3
    expected = [UNARY[name](v) for v in x]
    np.testing.assert_allclose(evaluate(name, (x, "a")), expected, rtol=1e-13, atol=1e-15)


def test_activations_do_not_lose_the_tails(evaluate):
    far = (np.array([-30.0, -800.0, 800.0]), "a")
    # x · Φ(x) at −30: Φ(−30) = 4.906713927148187e-198.
    np.testing.assert_allclose(
        evaluate("gelu", far), [-30 * 4.906713927148187e-198, 0, 800], rtol=1e-12
    )
    np.testing.assert_array_equal(evaluate("sigmoid", far)[1:], [0, 1])
    np.testing.assert_array_equal(evaluate("silu", far)[1:], [0, 800])


BINARY = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "maximum": max,
    "minimum": min,
    "less": lambda a, b: a < b,
    "equal": lambda a, b: a == b,
}


@pytest.mark.parametrize("name", BINARY)
def test_binary_matches_axes_by_name(name, evaluate):
    a, b = RNG.integers(1, 4, (2, 3, 4)) / 2, RNG.integers(1, 4, (4, 2)) / 2
    expected = [
        [[BINARY[name](a[i, j, k], b[k, i]) for k in range(4)] for j in range(3)] for i in range(2)
    ]
    np.testing.assert_array_equal(evaluate(name, (a, "x y z"), (b, "z x")), expected)
    swapped = evaluate(name, (b, "z x"), (a, "x y z"))
    expected = [
        [[BINARY[name](b[k, i], a[i, j, k]) for k in range(4)] for j in range(3)] for i in range(2)
    ]
    np.testing.assert_array_equal(swapped, expected)


@pytest.mark.parametrize("name", ["add", "sub", "mul", "maximum", "minimum", "neg"])
def test_arithmetic_of_whole_numbers_is_exact(name, evaluate):
    big = np.array([2**53 + 1, -7])
    operands = [(big, "a"), (np.array([3, 5]), "a")][: len(OPS[name].operands)]
    found = evaluate(name, *operands)
    function = BINARY.get(name, UNARY.get(name))
    assert function is not None
    expected = [function(*(int(d[i]) for d, _ in operands)) for i in range(2)]
    assert found.dtype == np.int64
    assert found.tolist() == expected


def test_select_and_mask(evaluate):
    x, y = np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([10.0, 20.0])
    keep = np.array([True, False])
    np.testing.assert_array_equal(
        evaluate("select", (keep, "i"), (x, "i j"), (y, "j")), [[1, 2], [10, 20]]
    )
    np.testing.assert_array_equal(
        evaluate("mask", (x, "i j"), (keep, "j")), [[1, -np.inf], [3, -np.inf]]
    )
    np.testing.assert_array_equal(
        evaluate("mask", (np.array([5, 6]), "j"), (keep, "j"), fill=-1.0), [5, -1]
    )


def test_scale_and_constant(evaluate):
    np.testing.assert_array_equal(
        evaluate("scale", (np.array([1.0, -2.0]), "a"), by=0.1), [0.1, -0.2]
    )
    assert evaluate("constant", value=0.1, dtype="bf16") == 0.1
    assert evaluate("constant", value=7.0, dtype="i32") == 7
    graph = Graph()
    for value, dtype in ((0.5, "i32"), (math.inf, "i32"), (1.0, "pred"), (1.0, "f31")):
        with pytest.raises(InputError):
            Builder(graph).constant(value=value, dtype=dtype)


def cast_graph(old, new):
    graph = Graph()
    x = graph.input("x", tensor(old, a="A"))
    graph.set_output("y", Builder(graph).cast(x, dtype=new.name))
    return graph


def cast(values, old, new):
    data = np.array(values).astype(old.numpy if old.kind != "float" else np.float64)
    return run_reference(cast_graph(old, new), inputs={"x": data})["y"].tolist()


def test_a_cast_to_a_narrower_float_rounds_to_nearest_even():
    # bf16 has 8 significant bits: between 1 and 2 its values are 1/128 apart.
    half = 1 / 256
    assert cast([1 + half, 1 + 3 * half, 1 + half + 1e-9], F32, BF16) == [
        1.0,
        1 + 4 * half,
        1 + 2 * half,
    ]
    assert cast([3.0e38 * 2, -np.inf], F64, F32) == [np.inf, -np.inf]
    assert cast([65520.0, 65519.9], F32, DTYPES["f16"]) == [np.inf, 65504.0]
    assert cast([448.0, 17.0], F32, DTYPES["f8e4m3fn"]) == [448.0, 16.0]


def test_casts_between_kinds():
    assert cast([2.9, -2.9, 0.0], F32, I32) == [2, -2, 0]
    assert cast([3, -4], I32, F32) == [3.0, -4.0]
    assert cast([2**24 + 1], I32, F32) == [2.0**24]
    assert cast([300], I32, DTYPES["i8"]) == [44]
    assert cast([0.0, 0.5], F32, DTYPES["pred"]) == [False, True]
    assert cast([True, False], DTYPES["pred"], F32) == [1.0, 0.0]


def test_contract_sums_named_axes_and_keeps_shared_ones(evaluate):
    x, w = RNG.normal(size=(2, 3, 4, 5)), RNG.normal(size=(6, 4, 3, 5))
    found = evaluate(
        "contract", (x, "batch expert embed seq"), (w, "mlp embed expert seq"), over="embed"
    )
    assert found.shape == (2, 3, 5, 6)
    for b, e, s, m in itertools.product(range(2), range(3), range(5), range(6)):
        expected = math.fsum(x[b, e, d, s] * w[m, d, e, s] for d in range(4))
        assert found[b, e, s, m] == pytest.approx(expected, rel=1e-13)


def test_contract_over_two_axes_and_to_a_scalar(evaluate):
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
def test_reductions(name, evaluate):
    x = RNG.normal(size=(2, 3, 4))
    expected = [REDUCE[name]([x[i, j, k] for i in range(2) for k in range(4)]) for j in range(3)]
    found = evaluate(name, (x, "i j k"), axes=("k", "i"))
    np.testing.assert_allclose(found, expected, rtol=1e-13)


def test_logsumexp_and_softmax_do_not_overflow(evaluate):
    x = (np.array([1000.0, 1000.0, -np.inf]), "a")
    assert evaluate("logsumexp", x, axes="a") == pytest.approx(1000 + math.log(2), rel=1e-15)
    np.testing.assert_array_equal(evaluate("softmax", x, axis="a"), [0.5, 0.5, 0])


def test_a_row_that_sees_nothing(evaluate):
    x = (np.array([[-np.inf, -np.inf], [0.0, -np.inf]]), "i j")
    np.testing.assert_array_equal(evaluate("softmax", x, axis="j"), [[0, 0], [1, 0]])
    np.testing.assert_array_equal(evaluate("logsumexp", x, axes="j"), [-np.inf, 0])
    assert np.isnan(evaluate("softmax", (np.array([np.nan, -np.inf]), "a"), axis="a")).all()


def test_softmax(evaluate):
    x = RNG.normal(size=(2, 3))
    expected = [
        [math.exp(x[i, j]) / sum(map(math.exp, x[:, j])) for j in range(3)] for i in range(2)
    ]
    np.testing.assert_allclose(evaluate("softmax", (x, "i j"), axis="i"), expected, rtol=1e-13)


def test_norms(evaluate):
    x, g, b = RNG.normal(size=(3, 2)), np.array([1.5, -2.0, 0.5]), np.array([0.1, 0.2, 0.3])
    for j in range(2):
        column = x[:, j]
        power = math.fsum(v * v for v in column) / 3
        rms = [v / math.sqrt(power + 0.25) * s for v, s in zip(column, g, strict=True)]
        found = evaluate("rms_norm", (x, "i j"), (g, "i"), axis="i", eps=0.25)
        np.testing.assert_allclose(found[:, j], rms, rtol=1e-13)
        mean = math.fsum(column) / 3
        variance = math.fsum((v - mean) ** 2 for v in column) / 3
        unit = [(v - mean) / math.sqrt(variance + 0.25) for v in column]
        found = evaluate("layer_norm", (x, "i j"), (g, "i"), (b, "i"), axis="i", eps=0.25)
        np.testing.assert_allclose(found[:, j], np.array(unit) * g + b, rtol=1e-12)


def test_rename_split_merge_slice_broadcast(evaluate):
    x = np.arange(24).reshape(2, 12)
    np.testing.assert_array_equal(evaluate("rename", (x, "a b"), axis="b", to="c"), x)
    parts = evaluate("split", (x, "a b"), axis="b", into=(("h", 3), ("d", 4)))
    assert parts.shape == (2, 3, 4)
    assert parts[1, 2, 3] == x[1, 2 * 4 + 3]
    merged = evaluate("merge", (parts, "a h d"), axes=("d", "a"), into="all")
    assert merged.shape == (3, 8)
    assert merged[2, 3 * 2 + 1] == parts[1, 2, 3]
    np.testing.assert_array_equal(
        evaluate("slice", (x, "a b"), axis="b", start=3, stop=5), x[:, 3:5]
    )
    wide = evaluate("broadcast", (np.array([1, 2]), "a"), (parts, "a h d"))
    assert wide.shape == (2, 3, 4)
    assert (wide[0] == 1).all()
    assert (wide[1] == 2).all()


def test_positions_embedding_one_hot(evaluate):
    table = RNG.normal(size=(5, 7))
    ids = np.array([[3, 0, 4]])
    np.testing.assert_array_equal(evaluate("positions", (table, "a b"), axis="a"), [0, 1, 2, 3, 4])
    found = evaluate("embedding", (table, "vocab embed"), (ids, "batch seq"), axis="vocab")
    np.testing.assert_array_equal(found, table[ids])
    found = evaluate("embedding", (table, "embed vocab"), (ids, "batch seq"), axis="vocab")
    np.testing.assert_array_equal(found, table.T[ids])
    hot = evaluate("one_hot", (np.array([1, 3, -1]), "a"), into=(("b", 3),))
    np.testing.assert_array_equal(hot, [[0, 1, 0], [0, 0, 0], [0, 0, 0]])


@pytest.mark.parametrize("index", [5, -1])
def test_an_index_outside_a_table_is_an_error(index, evaluate):
    with pytest.raises(InputError, match="an index is outside the table") as caught:
        evaluate(
            "embedding",
            (np.zeros((5, 2)), "vocab embed"),
            (np.array([0, index]), "seq"),
            axis="vocab",
        )
    assert caught.value.problems[0].found == str(index)
    assert caught.value.problems[0].where == "%v = embedding"
