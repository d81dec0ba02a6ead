"""Weight expressions: types, errors, limits, interning."""

import pytest

from moecc.errors import InputError
from moecc.types import BF16, F16, F32, KEY, PRED, Axis, TensorType, tensor
from moecc.weights.arithmetic import Add, Cast, Moment, Scale, Select
from moecc.weights.draws import Normal, Subset, Uniform, derive_key
from moecc.weights.expr import MAX_DEPTH, Full, Source
from moecc.weights.movement import (
    Concat,
    Index,
    Merge,
    Permute,
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
    ("make", "message"),
    [
        (lambda: Tile(W, "mlp", 8), "two axes of the same name"),
        (lambda: Tile(W, "expert", 0), "at least one copy"),
        (lambda: Tile(W, "expert", 2, 3), "position of the new axis is out of range"),
        (lambda: Stack((), "expert"), "nothing to stack"),
        (lambda: Stack((W, N), "expert"), "one type"),
        (lambda: Concat((W, N), "mlp"), "may differ only in axis 'mlp'"),
        (lambda: Index(W, "mlp", 6), "no position 6"),
        (lambda: Index(W, "mpl", 0), "no axis 'mpl'"),
        (lambda: Slice(W, "mlp", 3, 3), "not a range"),
        (lambda: Split(W, "mlp", (("a", 4), ("b", 2))), "the product of the parts is not"),
        (lambda: Split(W, "mlp", ()), "at least 1"),
        (lambda: Merge(W, ("embed", "mlp"), "a"), "neighbours"),
        (lambda: Merge(W, (), "a"), "no axes"),
        (lambda: Permute(W, ("mlp",)), "each axis once"),
        (lambda: Scale(W, float("nan")), "not finite"),
        (lambda: Scale(W, 1e39), "does not hold the factor"),
        (lambda: Scale(MASK, 2.0), "needs floats"),
        (lambda: Cast(W, PRED), "floats are cast to floats"),
        (lambda: Add(W, Source("x", tensor(BF16, embed=5))), "disagree on the size"),
        (lambda: Add(W, Source("x", tensor(BF16, expert=2))), "contain those"),
        (lambda: Select(W, W, W), "of type pred"),
        (lambda: Moment("mean", W, N), "of type pred"),
        (lambda: Moment("mean", W, None, ("expert",)), "no axis 'expert'"),
        (lambda: Source("", tensor(BF16)), "needs a name"),
        (lambda: Source("x", tensor(BF16, batch="B")), "no fixed size"),
        (lambda: Source("x", tensor(KEY)), "cannot be a random key"),
        (lambda: Source("x", TensorType(F32, (Axis("a", 2, ("data",)),))), "no mesh"),
        (lambda: Full(float("inf"), tensor(F32)), "not finite"),
        (lambda: Full(1e6, tensor(F16)), "cannot hold"),
        (lambda: Full(0.5, tensor(PRED)), "cannot hold fractions"),
        (lambda: Normal(tensor(BF16), 1.0, 1), "drawn in f32"),
        (lambda: Normal(tensor(F32), -1.0, 1), "must not be negative"),
        (lambda: Normal(tensor(F32), 1.0, 1 << 128), "128 bits"),
        (lambda: Uniform(tensor(F32), 1.0, 0.0, 1), "lower bound is not below"),
        (lambda: Subset(tensor(PRED, mlp=4), "mlp", 5, 1), "number of positions is out of range"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(make, message):
    with pytest.raises(InputError, match=message) as caught:
        make()
    assert "weight expression" in str(caught.value)


def test_equal_expressions_are_one_object():
    assert Tile(W, "expert", 8) is Tile(W, "expert", 8)
    assert Tile(W, "expert", 8) is not Tile(V, "expert", 8)
    assert Source("w", tensor(BF16, mlp=6, embed=4)) is W
    assert Scale(W, 2) is Scale(W, 2.0)
    assert Stack([W, V], "expert") is Stack((W, V), "expert")
    assert Full(0.0, tensor(F32)) is not Full(-0.0, tensor(F32))
    assert Moment("mean", W, None, ("embed", "mlp")) is Moment("mean", W, None, ("mlp", "embed"))
    assert Source("w", tensor(F16, mlp=6, embed=4)) is not W


def test_depth_has_a_limit():
    e = W
    for _ in range(MAX_DEPTH - 1):
        e = Scale(e, 3.0)
    assert e.depth == MAX_DEPTH
    with pytest.raises(InputError, match="nests deeper"):
        Scale(e, 3.0)


def test_keys_depend_on_seed_and_location():
    keys = {derive_key(s, loc) for s in (0, 1, 10) for loc in ("a", "b", "0a")}
    assert len(keys) == 9
    assert all(0 <= key < 1 << 128 for key in keys)
    # Part of what makes a conversion repeatable: it must not change between versions.
    assert derive_key(0, "layers.0.ffn/router") == 0xEB41278CDEAEB57CC84839912A0CF2EE
