"""Weight expressions: types, errors, limits, interning."""

from __future__ import annotations

import threading

import pytest

from moecc.errors import InputError
from moecc.types import BF16, F16, F32, F64, KEY, PRED, Axis, TensorType, tensor
from moecc.weights.arithmetic import Add, Cast, Moment, Mul, Scale, Select
from moecc.weights.draws import Normal, Subset, TruncatedNormal, Uniform, derive_key
from moecc.weights.expr import MAX_DEPTH, MAX_NODES, Expr, Full, Source
from moecc.weights.movement import (
    Concat,
    Index,
    Merge,
    Permute,
    Rename,
    Slice,
    Split,
    Stack,
    Tile,
)

W = Source("w", tensor(BF16, mlp=6, embed=4))
V = Source("v", tensor(BF16, mlp=6, embed=4))
N = Source("n", tensor(F16, embed=4))
MASK = Source("i", tensor(PRED, mlp=6))


@pytest.mark.parametrize(
    ("expr", "type"),
    [
        (Tile(W, "expert", 8), "bf16[expert=8, mlp=6, embed=4]"),
        (Tile(W, "expert", 8, 2), "bf16[mlp=6, embed=4, expert=8]"),
        (Stack((W, V), "expert", 1), "bf16[mlp=6, expert=2, embed=4]"),
        (Concat((W, V, W), "mlp"), "bf16[mlp=18, embed=4]"),
        (Index(W, "mlp", 5), "bf16[embed=4]"),
        (Slice(W, "mlp", 2, 5), "bf16[mlp=3, embed=4]"),
        (Split(W, "mlp", (("group", 2), ("mlp", 3))), "bf16[group=2, mlp=3, embed=4]"),
        (Merge(W, ("mlp", "embed"), "all"), "bf16[all=24]"),
        (Rename(W, "mlp", "inner"), "bf16[inner=6, embed=4]"),
        (Permute(W, ("embed", "mlp")), "bf16[embed=4, mlp=6]"),
        (Scale(W, 2), "f32[mlp=6, embed=4]"),
        (Scale(Cast(W, F64), 2), "f64[mlp=6, embed=4]"),
        (Cast(W, F16), "f16[mlp=6, embed=4]"),
        (Add(N, W), "f32[mlp=6, embed=4]"),
        (Mul(W, Cast(N, F64)), "f64[mlp=6, embed=4]"),
        (Select(MASK, W, V), "bf16[mlp=6, embed=4]"),
        (Select(MASK, W, N), "f32[mlp=6, embed=4]"),
        (Moment("mean", W, MASK, ("embed",)), "f32[embed=4]"),
        (Moment("std", W), "f32[]"),
    ],
)
def test_types_follow_from_operands(expr: Expr, type: str) -> None:
    assert str(expr.type) == type


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Tile(W, "mlp", 8), "two axes of the same name"),
        (lambda: Tile(W, "expert", 0), "at least one copy"),
        (lambda: Tile(W, "expert", 2, 3), "position of the new axis is out of range"),
        (lambda: Tile(W, "a b", 2), "not a valid axis name"),
        (lambda: Stack((), "expert"), "nothing to stack"),
        (lambda: Stack((W, N), "expert"), "one type"),
        (lambda: Concat((), "mlp"), "nothing to concatenate"),
        (lambda: Concat((W, N), "mlp"), "may differ only in axis 'mlp'"),
        (lambda: Concat((W, Slice(V, "embed", 0, 2)), "mlp"), "may differ only in axis 'mlp'"),
        (lambda: Index(W, "mlp", 6), "no position 6"),
        (lambda: Index(W, "mpl", 0), "no axis 'mpl'"),
        (lambda: Slice(W, "mlp", 3, 3), "not a range"),
        (lambda: Slice(W, "mlp", 3, 7), "not a range"),
        (lambda: Split(W, "mlp", (("a", 4), ("b", 2))), "the product of the parts is not"),
        (lambda: Split(W, "mlp", (("a", 6), ("embed", 1))), "two axes of the same name"),
        (lambda: Split(W, "mlp", ()), "at least 1"),
        (lambda: Merge(W, ("embed", "mlp"), "a"), "neighbours"),
        (lambda: Merge(W, (), "a"), "no axes"),
        (lambda: Rename(W, "mlp", "embed"), "two axes of the same name"),
        (lambda: Permute(W, ("mlp",)), "each axis once"),
        (lambda: Scale(W, float("nan")), "not finite"),
        (lambda: Scale(W, 1e39), "does not hold the factor"),
        (lambda: Scale(MASK, 2.0), "needs floats"),
        (lambda: Cast(MASK, F32), "needs floats"),
        (lambda: Cast(W, PRED), "floats are cast to floats"),
        (lambda: Add(W, Source("x", tensor(BF16, embed=5))), "disagree on the size"),
        (lambda: Add(W, Source("x", tensor(BF16, expert=2))), "contain those"),
        (lambda: Select(W, W, W), "of type pred"),
        (lambda: Moment("mean", N, MASK), "contain those"),
        (lambda: Moment("mean", W, N), "of type pred"),
        (lambda: Moment("median", W), "no such moment"),  # type: ignore[arg-type]
        (lambda: Moment("mean", W, None, ("expert",)), "no axis 'expert'"),
        (lambda: Moment("mean", W, None, ("mlp", "mlp")), "kept twice"),
        (lambda: Source("", tensor(BF16)), "needs a name"),
        (lambda: Source("x", tensor(BF16, batch="B")), "no fixed size"),
        (lambda: Source("x", tensor(KEY)), "cannot be a random key"),
        (lambda: Source("x", TensorType(F32, (Axis("a", 1), Axis("a", 1)))), "two axes"),
        (lambda: Source("x", TensorType(F32, (Axis("a", 2, ("data",)),))), "no mesh"),
        (lambda: Full(float("inf"), tensor(F32)), "not finite"),
        (lambda: Full(1e6, tensor(F16)), "cannot hold"),
        (lambda: Full(2, tensor(PRED)), "cannot hold"),
        (lambda: Full(0.5, tensor(PRED)), "cannot hold fractions"),
        (lambda: Normal(tensor(BF16), 1.0, 1), "drawn in f32"),
        (lambda: Normal(tensor(F32), -1.0, 1), "must not be negative"),
        (lambda: Normal(tensor(F32), 1.0, 1 << 128), "128 bits"),
        (lambda: TruncatedNormal(tensor(F32), 1.0, 1, 0.0), "bound is out of range"),
        (lambda: Uniform(tensor(F32), 1.0, 0.0, 1), "lower bound is not below"),
        (lambda: Subset(tensor(F32, mlp=4), "mlp", 2, 1), "of type pred"),
        (lambda: Subset(tensor(PRED, mlp=4), "mlp", 5, 1), "number of positions is out of range"),
        (lambda: Subset(tensor(PRED, mlp=4), "embed", 1, 1), "no axis 'embed'"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(make: object, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        make()  # type: ignore[operator]
    assert "weight expression" in str(caught.value)


def test_equal_expressions_are_one_object() -> None:
    assert Tile(W, "expert", 8) is Tile(W, "expert", 8)
    assert Tile(W, "expert", 8) is not Tile(V, "expert", 8)
    assert Source("w", tensor(BF16, mlp=6, embed=4)) is W
    assert Scale(W, 2) is Scale(W, 2.0)
    assert Stack([W, V], "expert") is Stack((W, V), "expert")  # type: ignore[arg-type]
    assert Full(0.0, tensor(F32)) is not Full(-0.0, tensor(F32))
    assert Moment("mean", W, None, ("embed", "mlp")) is Moment("mean", W, None, ("mlp", "embed"))
    assert Source("w", tensor(F16, mlp=6, embed=4)) is not W


def test_threads_agree_on_the_object() -> None:
    found: list[list[Expr]] = []

    def build() -> None:
        found.append([Tile(Source(f"t{i}", W.type), "expert", 2) for i in range(200)])

    threads = [threading.Thread(target=build) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert all(a is b for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_depth_has_a_limit() -> None:
    e: Expr = W
    for _ in range(MAX_DEPTH - 1):
        e = Scale(e, 3.0)
    assert e.depth == MAX_DEPTH
    with pytest.raises(InputError, match="nests deeper"):
        Scale(e, 3.0)


def test_shared_parts_cannot_grow_without_limit() -> None:
    e: Expr = W
    while 2 * e.nodes + 1 <= MAX_NODES:
        e = Add(e, e)
    assert e.depth < 25
    with pytest.raises(InputError, match="more than 1,000,000 nodes"):
        Add(e, e)


def test_keys_depend_on_seed_and_location() -> None:
    keys = {derive_key(s, loc) for s in (0, 1, 10) for loc in ("a", "b", "0a")}
    assert len(keys) == 9
    assert all(0 <= key < 1 << 128 for key in keys)
    # Part of what makes a conversion repeatable: it must not change between versions.
    assert derive_key(0, "layers.0.ffn/router") == 0xEB41278CDEAEB57CC84839912A0CF2EE
