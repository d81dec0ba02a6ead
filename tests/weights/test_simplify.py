"""Simplifications that conversions count on, in the form that they take."""

from __future__ import annotations

import pytest

from moecc.ir.dtypes import BF16, F16, F32, F64, PRED
from moecc.ir.types import tensor
from moecc.weights.arithmetic import Add, Cast, Moment, Mul, Scale, Select
from moecc.weights.draws import Normal, Subset
from moecc.weights.expr import Expr, Full, Source
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
from moecc.weights.simplify import simplify

W = Source("w", tensor(BF16, mlp=6, embed=4))
V = Source("v", tensor(BF16, mlp=6, embed=4))
ROUTER = Normal(tensor(F32, expert=4, embed=4), 0.02, 7)


def virtual_groups(w: Expr, groups: int, parts: int) -> Expr:
    """Give expert i the slice i mod `parts` of `w`."""
    size = w.type.shape[w.type.names.index("mlp")] // parts
    cut = Split(w, "mlp", (("part", parts), ("mlp", size)))
    first = Permute(cut, ("part", *(n for n in cut.type.names if n != "part")))
    return Merge(Tile(first, "group", groups), ("group", "part"), "expert")


@pytest.mark.parametrize("expert", range(4))
def test_an_expert_of_virtual_groups_is_a_slice(expert: int) -> None:
    part = expert % 2
    for w in (W, Permute(W, ("embed", "mlp"))):
        one = simplify(Index(virtual_groups(w, 2, 2), "expert", expert))
        assert one is simplify(Slice(w, "mlp", 3 * part, 3 * part + 3))


def test_an_expert_of_copies_is_the_source() -> None:
    assert simplify(Index(Tile(W, "expert", 8), "expert", 3)) is W
    assert simplify(Index(Scale(Tile(W, "expert", 8), 2.0), "expert", 3)) is Scale(W, 2.0)
    assert simplify(Index(Cast(Tile(W, "expert", 8, 1), F16), "expert", 3)) is Cast(W, F16)


def test_every_expert_has_the_same_expression() -> None:
    grouped = virtual_groups(W, 3, 2)
    found = {simplify(Cast(Index(grouped, "expert", e), BF16)) for e in range(6)}
    assert len(found) == 2


def test_stacked_experts_come_apart() -> None:
    assert simplify(Index(Stack((W, V), "expert"), "expert", 1)) is V
    assert simplify(Slice(Concat((W, V), "mlp"), "mlp", 6, 12)) is V
    whole = Stack(tuple(Index(ROUTER, "expert", i) for i in range(4)), "expert")
    assert simplify(whole) is ROUTER


def test_a_fused_tensor_comes_apart_and_together() -> None:
    fused = Source("fused", tensor(BF16, expert=2, mlp=12, embed=4))
    gate, up = Slice(fused, "mlp", 0, 6), Slice(fused, "mlp", 6, 12)
    assert simplify(Concat((gate, up), "mlp")) is fused
    assert simplify(Slice(Index(Concat((gate, up), "mlp"), "expert", 1), "mlp", 6, 12)) is simplify(
        Index(up, "expert", 1)
    )


def test_a_draw_is_drawn_in_part() -> None:
    one = simplify(Index(Permute(ROUTER, ("embed", "expert")), "expert", 2))
    assert one is Index(ROUTER, "expert", 2)
    chosen = Subset(tensor(PRED, expert=4, mlp=6), "mlp", 3, 7)
    drop = Select(chosen, Tile(V, "expert", 4), Tile(W, "expert", 4))
    assert simplify(Index(drop, "expert", 1)) is Select(Index(chosen, "expert", 1), V, W)


def test_moments_are_taken_of_one_expert() -> None:
    e = Moment("std", Tile(W, "expert", 4), None, ("expert",))
    assert simplify(Index(e, "expert", 1)) is Moment("std", W)


def test_views_have_one_order() -> None:
    a = Index(Slice(Index(ROUTER, "expert", 2), "embed", 0, 3), "embed", 1)
    b = Index(Index(ROUTER, "embed", 1), "expert", 2)
    assert simplify(a) is simplify(b)
    c = Slice(Slice(W, "embed", 1, 3), "mlp", 2, 4)
    d = Slice(Slice(Slice(W, "mlp", 1, 5), "embed", 1, 3), "mlp", 1, 3)
    assert simplify(c) is simplify(d)


def test_inverse_movements_cancel() -> None:
    split = Split(W, "mlp", (("a", 2), ("b", 3)))
    assert simplify(Merge(split, ("a", "b"), "mlp")) is W
    merged = Merge(W, ("mlp", "embed"), "x")
    assert simplify(Split(merged, "x", (("mlp", 6), ("embed", 4)))) is W
    assert simplify(Permute(Permute(W, ("embed", "mlp")), ("mlp", "embed"))) is W
    assert simplify(Rename(Rename(W, "mlp", "x"), "x", "mlp")) is W
    swapped = Rename(Rename(Rename(W, "mlp", "x"), "embed", "mlp"), "x", "embed")
    assert simplify(swapped).type is not W.type
    back = Rename(Rename(Rename(swapped, "mlp", "y"), "embed", "mlp"), "y", "embed")
    assert simplify(back) is W


def test_casts_that_lose_nothing_go() -> None:
    assert simplify(Cast(Cast(W, F32), BF16)) is W
    assert simplify(Cast(Scale(W, 1.0), BF16)) is W
    assert simplify(Scale(Cast(W, F32), 3.0)) is Scale(W, 3.0)
    lossy = Cast(Cast(W, F16), F32)
    assert simplify(lossy) is lossy
    wide = Add(Cast(W, F64), V)
    assert simplify(wide) is wide


def test_factors_join_only_where_that_is_exact() -> None:
    assert simplify(Scale(Scale(W, 2.0), 3.0)) is Scale(W, 6.0)
    inexact = Scale(Scale(W, 3.0), 5.0)
    assert simplify(inexact) is inexact
    # Half of the smallest subnormal is zero, and twice that is zero still.
    small = Scale(Scale(W, 0.5), 2.0)
    assert simplify(small) is small


def test_constants_are_folded() -> None:
    one, mask = Full(1.5, W.type), Full(1, tensor(PRED, mlp=6))
    assert simplify(Scale(one, 2.0)) is Full(3.0, W.type.with_dtype(F32))
    assert simplify(Mul(W, one)) is Scale(W, 1.5)
    assert simplify(Add(one, one)) is Full(3.0, W.type.with_dtype(F32))
    assert simplify(Tile(one, "expert", 2)) is Full(1.5, Tile(W, "expert", 2).type)
    assert simplify(Select(mask, W, V)) is W
    assert simplify(Moment("mean", W, mask)) is Moment("mean", W)
    # Rounded in its own type first: 1 + 2^-9 is no bf16.
    fine = Full(1 + 2**-9, tensor(BF16, mlp=6))
    assert simplify(Cast(fine, F32)) is Full(1.0, tensor(F32, mlp=6))


def test_an_overflow_is_not_folded_away() -> None:
    huge = Scale(Full(3e38, tensor(F32, a=2)), 4.0)
    assert simplify(huge) is huge
