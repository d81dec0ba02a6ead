"""Random numbers: the published vectors of Threefry, places, and distributions."""

import math
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moecc.errors import InputError
from moecc.ir import F64, OPS, Builder, Graph, tensor
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


def drawn(op, key, **attrs):
    """Return 40,000 numbers."""
    graph = Graph()
    operands = graph.input("key", tensor(KEY)), graph.input("like", tensor(F64, n=40000))
    graph.set_output("y", Builder(graph).value(op, *operands, **attrs))
    return run_reference(graph, inputs={"key": np.uint64(key), "like": np.zeros(40000)})["y"]


@given(KEYS, st.integers(0, 2**32 - 1))
def test_keys_that_differ_give_other_numbers(key, by):
    other = folded(key, by)
    assert 0 <= other < 2**64
    assert folded(key, by) == other
    assert folded(key, (by + 1) % 2**32) != other
    assert (uniform(key, (8,)) != uniform(other, (8,))).any()


def test_uniform_numbers_are_uniform():
    found = drawn("random_uniform", 7, low=-1.0, high=3.0)
    assert found.min() >= -1
    assert found.max() < 3
    counts, _ = np.histogram(found, 20, (-1, 3))
    # χ² with 19 degrees of freedom is below 43.8 but once in a thousand keys.
    assert ((counts - 2000) ** 2 / 2000).sum() < 43.8


def test_normal_numbers_are_normal():
    found = drawn("random_normal", 8, std=2.0) / 2
    assert abs(found.mean()) < 4 / 200
    assert abs(found.var() - 1) < 4 * math.sqrt(2) / 200
    for x in (-2.0, -1.0, 0.0, 1.0, 2.0):
        assert (found < x).mean() == pytest.approx(NormalDist().cdf(x), abs=0.01)


@pytest.mark.parametrize(
    ("op", "key", "attrs", "message"),
    [
        ("random_uniform", tensor(F64, a=3), {}, "key"),
        ("random_uniform", tensor(KEY, a=3), {}, "one key"),
        ("random_uniform", tensor(KEY), {"high": math.inf}, "high must be finite"),
        ("fold_key", tensor(KEY), {"by": 2**32}, "32 bits"),
    ],
)
def test_what_makes_no_random_numbers(op, key, attrs, message):
    graph = Graph()
    operands = graph.input("key", key), graph.input("like", tensor(F64, a=3))
    with pytest.raises(InputError, match=message):
        Builder(graph).node(op, *operands[: len(OPS[op].operands)], **attrs)
