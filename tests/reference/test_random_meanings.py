"""Random numbers: the published vectors of Threefry, places, and distributions."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moecc.errors import InputError
from moecc.ir import F64, Axis, Builder, Graph, TensorType, tensor
from moecc.ir.ops.random import folded, threefry, uniform
from moecc.testing import run_reference
from moecc.types import KEY

KEYS = st.integers(0, 2**64 - 1)


@pytest.mark.parametrize(
    ("key", "count", "expected"),
    [
        (0, 0, 0x6B20015999BA4EFE),
        (2**64 - 1, 2**64 - 1, 0x1CB996FCBB002BE7),
        (0x13198A2E03707344, 0x243F6A8885A308D3, 0xC4923A9C483DF7A0),
    ],
)
def test_the_vectors_of_random123(key, count, expected):
    """``kat_vectors`` of Random123 1.14 for threefry2x32 with 20 rounds."""
    (found,) = threefry(key, np.asarray([count], np.uint64))
    assert int(found) == expected


def drawn(op, key, axes, **attrs):
    graph = Graph()
    like = graph.input("like", TensorType(F64, axes))
    numbers = getattr(Builder(graph), op)(graph.input("key", TensorType(KEY)), like, **attrs)
    graph.set_output("y", numbers)
    shape = [int(str(a.size)) for a in axes]
    return run_reference(graph, inputs={"key": np.uint64(key), "like": np.zeros(shape)})["y"]


@given(KEYS, st.integers(0, 2**32 - 1))
def test_keys_that_differ_give_other_numbers(key, by):
    other = folded(key, by)
    assert 0 <= other < 2**64
    assert folded(key, by) == other
    assert folded(key, (by + 1) % 2**32) != other
    assert (uniform(key, (8,)) != uniform(other, (8,))).any()


def test_uniform_numbers_are_uniform():
    found = drawn("random_uniform", 7, (Axis("n", 40000),), low=-1.0, high=3.0)
    assert found.min() >= -1
    assert found.max() < 3
    counts, _ = np.histogram(found, 20, (-1, 3))
    # χ² with 19 degrees of freedom is below 43.8 but once in a thousand keys.
    assert ((counts - 2000) ** 2 / 2000).sum() < 43.8


def test_normal_numbers_are_normal():
    found = drawn("random_normal", 8, (Axis("n", 40000),), std=2.0) / 2
    assert abs(found.mean()) < 4 / 200
    assert abs(found.var() - 1) < 4 * math.sqrt(2) / 200
    below = [(found < x).mean() for x in (-2.0, -1.0, 0.0, 1.0, 2.0)]
    exact = [(1 + math.erf(x / math.sqrt(2))) / 2 for x in (-2.0, -1.0, 0.0, 1.0, 2.0)]
    np.testing.assert_allclose(below, exact, atol=0.01)


def test_what_makes_no_random_numbers():
    graph = Graph()
    b, key = Builder(graph), graph.input("key", TensorType(KEY))
    x = graph.input("x", tensor(F64, a=3))
    keys = graph.input("keys", tensor(KEY, a=3))
    for make, message in (
        (lambda: b.random_uniform(x, x), "key"),
        (lambda: b.random_uniform(keys, x), "one key"),
        (lambda: b.random_uniform(key, x, high=math.inf), "high must be finite"),
        (lambda: b.fold_key(key, by=2**32), "32 bits"),
    ):
        with pytest.raises(InputError, match=message):
            make()
