"""Random numbers: their distributions, and that a key and a place decide them."""

import hashlib
import math

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
from moecc.weights.movement import Slice

KEY = 0x0123456789ABCDEF0123456789ABCDEF


def nothing(name, start=0, stop=None):
    raise AssertionError("a draw reads nothing")


def drawn(e):
    return evaluate(e, nothing)


@pytest.mark.parametrize(
    ("expr", "digest"),
    [
        (Normal(tensor(F32, a=50, b=41), 0.02, KEY, 1.0), "6614085809da521b"),
        (TruncatedNormal(tensor(F32, a=50, b=41), 0.02, KEY), "471007b31941cdd7"),
        (Uniform(tensor(F32, a=50, b=41), -1.0, 2.0, KEY), "9b3a6ac23a35e76f"),
        (Subset(tensor(PRED, a=50, b=41), "b", 20, KEY), "d13555f16e6a2f74"),
    ],
)
def test_bytes_are_those_of_every_platform_and_version(expr, digest):
    assert hashlib.sha256(drawn(expr).tobytes()).hexdigest()[:16] == digest


def test_words_are_those_of_philox():
    whole = np.random.Philox(key=KEY).random_raw(100)
    for start, count in ((0, 100), (1, 3), (4, 4), (7, 60), (99, 1), (50, 0)):
        assert (stream(KEY, start, count) == whole[start : start + count]).all()
    # Beyond 2^64 elements the counter carries.
    far = stream(KEY, 4 * (2**64 - 1), 8)
    assert (far[4:] == np.random.Philox(key=KEY, counter=2**64).random_raw(4)).all()


@given(st.data())
def test_a_box_of_words_is_a_box_of_the_stream(data):
    sizes = tuple(data.draw(st.lists(st.integers(1, 9), max_size=4)))
    box = []
    for size in sizes:
        start = data.draw(st.integers(0, size))
        box.append((start, data.draw(st.integers(start, size))))
    whole = stream(KEY, 0, math.prod(sizes)).reshape(sizes)
    part = box_words(KEY, sizes, tuple(box))
    assert (part == whole[tuple(slice(*ends) for ends in box)]).all()
    assert part.shape == tuple(b - a for a, b in box)


@pytest.mark.parametrize("count", [0, 1, 37, 74, 75])
def test_subsets_have_their_size(count):
    for axis, other in (("mlp", 0), ("embed", 1)):
        e = Subset(tensor(PRED, mlp=75, embed=75), axis, count, KEY)
        chosen = drawn(e)
        assert chosen.dtype == bool
        assert (chosen.sum(axis=other) == count).all()
        part = drawn(Slice(e, axis, 10, 20))
        assert (part == np.take(chosen, range(10, 20), axis=other)).all()
