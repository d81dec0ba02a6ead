"""The judge sees differences that normal data hide, and ignores rounding."""

from __future__ import annotations

from collections.abc import Callable

from moecc.ir import BF16, F32, Builder, Graph, Value
from moecc.testing.oracle import differences
from moecc.types import tensor
from moecc.weights.arithmetic import Cast
from moecc.weights.expr import Source

from .judge import difference

Build = Callable[[Builder, Value], Value]

STREAM = tensor(F32, batch="B", seq="S", embed=4)


def graph(build: Build) -> Graph:
    result = Graph()
    x = result.input("x", STREAM)
    result.set_output("y", build(Builder(result), x))
    return result


def mirrored_choice(b: Builder, x: Value) -> Value:
    pieces = [b.slice(x, axis="embed", start=i, stop=i + 1) for i in (3, 2, 1, 0)]
    experts, _ = b.route(b.join(*pieces, axis="embed"), top_k=2, axis="embed")
    return b.sub(b.constant(value=3.0, dtype="i32"), experts)


def choice(b: Builder, x: Value) -> Value:
    return b.route(x, top_k=2, axis="embed")[0]


def test_ties_are_drawn():
    before, after = graph(choice), graph(mirrored_choice)
    assert differences(before, after) == []
    gap = difference(before, after, thorough=True)
    assert gap is not None
    assert gap.kind in ("signs", "equal", "sparse")


def test_a_tie_that_rounding_breaks_is_no_difference():
    def early(b: Builder, x: Value) -> Value:
        return choice(b, b.scale(b.tanh(x), by=3.0))

    def late(b: Builder, x: Value) -> Value:
        y = b.tanh(x)
        return choice(b, b.add(b.add(y, y), y))

    for seed in range(8):
        assert difference(graph(early), graph(late), seed, thorough=True) is None


def test_sizes_of_one_are_drawn():
    def first(b: Builder, x: Value) -> Value:
        return b.sum(x, axes="batch")

    def mean_of_one(b: Builder, x: Value) -> Value:
        return b.mean(x, axes="batch")

    gap = difference(graph(first), graph(mean_of_one), thorough=True)
    assert gap is not None
    assert dict(gap.sizes)["B"] > 1


def test_bits_differ_where_numbers_do_not():
    def left(b: Builder, x: Value) -> Value:
        return b.add(b.add(b.tanh(x), b.exp(x)), b.silu(x))

    def right(b: Builder, x: Value) -> Value:
        return b.add(b.tanh(x), b.add(b.exp(x), b.silu(x)))

    assert difference(graph(left), graph(right), thorough=True) is None
    assert difference(graph(left), graph(right), exact=True, thorough=True) is not None


def test_a_lost_gradient_is_seen():
    gap = difference(graph(lambda b, x: b.silu(x)), graph(lambda b, x: b.stop_gradient(b.silu(x))))
    assert gap is not None
    assert gap.law == "gradients"


def test_a_rounded_weight_is_seen():
    def scaled(weight_dtype: str) -> Graph:
        result = Graph()
        x, type = result.input("x", STREAM), tensor(F32, embed=4)
        weight = Source("w", type)
        rounded = Cast(Cast(weight, BF16), F32) if weight_dtype == "bf16" else weight
        w = result.param("w", type, rounded)
        result.set_output("y", Builder(result).mul(x, w))
        return result

    gap = difference(scaled("f32"), scaled("bf16"))
    assert gap is not None
    assert gap.law == "weights"


def test_nothing_is_said_of_a_division_by_zero():
    def through(b: Builder, x: Value) -> Value:
        return b.mul(b.div(x, x), x)

    assert difference(graph(through), graph(lambda b, x: x), thorough=True) is None


def test_calculating_with_a_mask_is_a_difference():
    def masked(b: Builder, x: Value) -> Value:
        at = b.positions(x, axis="seq")
        causal = b.causal(at, b.rename(b.positions(x, axis="seq"), axis="seq", to="kv_seq"))
        scores = b.contract(x, b.rename(x, axis="seq", to="kv_seq"), over="embed")
        return b.mask(scores, causal)

    def there_and_back(b: Builder, x: Value) -> Value:
        scores = masked(b, x)
        return b.sub(b.add(scores, scores), scores)

    before = graph(lambda b, x: b.softmax(masked(b, x), axis="kv_seq"))
    after = graph(lambda b, x: b.softmax(there_and_back(b, x), axis="kv_seq"))
    assert difference(before, after, thorough=True) is not None
