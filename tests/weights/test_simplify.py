"""Simplifications that conversions count on, in the form that they take."""

from itertools import permutations

import pytest

from moecc.types import BF16, F16, F32, F64, PRED, tensor
from moecc.weights.arithmetic import Add, Cast, Moment, Mul, Scale, Select
from moecc.weights.draws import Normal
from moecc.weights.expr import Full, Source
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
from moecc.weights.simplify import rename_all, simplify

W = Source("w", tensor(BF16, mlp=6, embed=4))
V = Source("v", tensor(BF16, mlp=6, embed=4))
ROUTER = Normal(tensor(F32, expert=4, embed=4), 0.02, 7)


def virtual_groups(w, groups, parts):
    """Give expert i the slice i mod `parts` of `w`."""
    size = w.type.shape[w.type.names.index("mlp")] // parts
    cut = Split(w, "mlp", (("part", parts), ("mlp", size)))
    first = Permute(cut, ("part", *(n for n in cut.type.names if n != "part")))
    return Merge(Tile(first, "group", groups), ("group", "part"), "expert")


@pytest.mark.parametrize("expert", range(4))
def test_an_expert_of_virtual_groups_is_a_slice(expert):
    part = expert % 2
    for w in (W, Permute(W, ("embed", "mlp"))):
        one = simplify(Index(virtual_groups(w, 2, 2), "expert", expert))
        assert one is simplify(Slice(w, "mlp", 3 * part, 3 * part + 3))


def test_stacked_experts_come_apart():
    assert simplify(Index(Stack((W, V), "expert"), "expert", 1)) is V
    assert simplify(Slice(Concat((W, V), "mlp"), "mlp", 6, 12)) is V
    stacked = Stack(tuple(Index(ROUTER, "expert", i) for i in range(4)), "expert")
    assert simplify(stacked) is ROUTER
    part = Stack(tuple(Index(ROUTER, "expert", i) for i in (2, 3)), "expert")
    assert simplify(part) is Slice(ROUTER, "expert", 2, 4)


def test_renames_to_whatever_names_are_written_in_one_way():
    x = Source("w", tensor(BF16, a=2, b=2, c=2, d=2))
    for names in permutations((*x.type.names, "e", "f"), 4):
        renamed = rename_all(x, names)
        assert renamed.type.names == names
        assert simplify(renamed) is renamed
        for name in ("e", "g"):
            if name not in names:
                last = Rename(renamed, names[-1], name)
                assert simplify(last).type.names == (*names[:-1], name)


def test_inverse_movements_cancel():
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


def test_casts_that_lose_nothing_go():
    assert simplify(Cast(Cast(W, F32), BF16)) is W
    assert simplify(Cast(Scale(W, 1.0), BF16)) is W
    assert simplify(Scale(Cast(W, F32), 3.0)) is Scale(W, 3.0)
    lossy = Cast(Cast(W, F16), F32)
    assert simplify(lossy) is lossy
    wide = Add(Cast(W, F64), V)
    assert simplify(wide) is wide


def test_factors_join_only_where_that_is_exact():
    assert simplify(Scale(Scale(W, 2.0), 3.0)) is Scale(W, 6.0)
    inexact = Scale(Scale(W, 3.0), 5.0)
    assert simplify(inexact) is inexact
    # Half of the smallest subnormal is zero, and twice that is zero still.
    small = Scale(Scale(W, 0.5), 2.0)
    assert simplify(small) is small


def test_constants_are_folded():
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
