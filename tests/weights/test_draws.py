"""Random numbers: their distributions, and that a key and a place decide them."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moecc.types import F32, PRED, tensor
from moecc.weights.draws import (
    Normal,
    Subset,
    TruncatedNormal,
    Uniform,
    box_words,
    stream,
)
from moecc.weights.evaluate import evaluate
from moecc.weights.expr import Expr
from moecc.weights.movement import Index, Permute, Slice

KEY = 0x0123456789ABCDEF0123456789ABCDEF
MANY = tensor(F32, expert=8, mlp=125, embed=400)
COUNT = 400_000


def nothing(name: str, start: int = 0, stop: int | None = None) -> np.ndarray[Any, Any]:
    raise AssertionError("a draw reads nothing")


def drawn(e: Expr) -> np.ndarray[Any, Any]:
    return evaluate(e, nothing)


def moments(x: np.ndarray[Any, Any]) -> tuple[float, float, float, float]:
    """Return mean, standard deviation, skewness and kurtosis."""
    x = x.astype(np.float64).ravel()
    mean, std = x.mean(), x.std()
    z = (x - mean) / std
    return float(mean), float(std), float((z**3).mean()), float((z**4).mean())


def test_truncated_normal_numbers_stay_within_their_bound() -> None:
    for bound in (0.5, 2.0, 3.0):
        z = drawn(TruncatedNormal(MANY, 0.5, KEY, bound))
        assert np.abs(z).max() <= np.float32(0.5 * bound)
        mean, std, skew, _ = moments(z)
        # Var = 1 - 2 b phi(b) / (1 - 2 Phi(-b)) for the bounds -b and b.
        density = math.exp(-bound * bound / 2) / math.sqrt(2 * math.pi)
        variance = 1 - 2 * bound * density / math.erf(bound / 2**0.5)
        assert abs(mean) < 4 * 0.5 * variance**0.5 / COUNT**0.5
        assert abs(std / (0.5 * variance**0.5) - 1) < 4 / (2 * COUNT) ** 0.5
        assert abs(skew) < 4 * (6 / COUNT) ** 0.5


@pytest.mark.parametrize(
    ("expr", "digest"),
    [
        (Normal(tensor(F32, a=50, b=41), 0.02, KEY, 1.0), "6614085809da521b"),
        (TruncatedNormal(tensor(F32, a=50, b=41), 0.02, KEY), "471007b31941cdd7"),
        (Uniform(tensor(F32, a=50, b=41), -1.0, 2.0, KEY), "9b3a6ac23a35e76f"),
        (Subset(tensor(PRED, a=50, b=41), "b", 20, KEY), "d13555f16e6a2f74"),
    ],
)
def test_bytes_are_those_of_every_platform_and_version(expr: Expr, digest: str) -> None:
    assert hashlib.sha256(drawn(expr).tobytes()).hexdigest()[:16] == digest


def test_words_are_those_of_philox() -> None:
    whole = np.random.Philox(key=KEY).random_raw(100)
    for start, count in ((0, 100), (1, 3), (4, 4), (7, 60), (99, 1), (50, 0)):
        assert (stream(KEY, start, count) == whole[start : start + count]).all()
    # Beyond 2^64 elements the counter carries.
    far = stream(KEY, 4 * (2**64 - 1), 8)
    assert (far[4:] == np.random.Philox(key=KEY, counter=2**64).random_raw(4)).all()


@given(st.data())
def test_a_box_of_words_is_a_box_of_the_stream(data: st.DataObject) -> None:
    sizes = tuple(data.draw(st.lists(st.integers(1, 9), max_size=4)))
    box = []
    for size in sizes:
        start = data.draw(st.integers(0, size))
        box.append((start, data.draw(st.integers(start, size))))
    whole = stream(KEY, 0, math.prod(sizes)).reshape(sizes)
    part = box_words(KEY, sizes, tuple(box))
    assert (part == whole[tuple(slice(*ends) for ends in box)]).all()
    assert part.shape == tuple(b - a for a, b in box)


def test_cutting_and_turning_changes_no_byte() -> None:
    e = Normal(tensor(F32, expert=4, mlp=30, embed=20), 1.0, KEY)
    whole = drawn(e)
    one = drawn(Slice(Index(e, "expert", 2), "embed", 3, 9))
    assert one.tobytes() == whole[2, :, 3:9].tobytes()
    turned = drawn(Index(Permute(e, ("embed", "expert", "mlp")), "embed", 7))
    assert turned.tobytes() == whole[:, :, 7].tobytes()


@pytest.mark.parametrize("count", [0, 1, 37, 74, 75])
def test_subsets_have_their_size(count: int) -> None:
    for axis, other in (("mlp", 0), ("embed", 1)):
        e = Subset(tensor(PRED, mlp=75, embed=75), axis, count, KEY)
        chosen = drawn(e)
        assert chosen.dtype == bool
        assert (chosen.sum(axis=other) == count).all()
        part = drawn(Slice(e, axis, 10, 20))
        assert (part == np.take(chosen, range(10, 20), axis=other)).all()
