"""Rotary tables and buckets against transformers' numbers, masks against their definition."""

import cmath

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from moecc.errors import InputError

from .evaluation import evaluate

ROPE = {"axis": "head_dim", "size": 8, "theta": 100.0}

# transformers 5.24.0, LlamaRotaryEmbedding, head_dim 8, rope_theta 100, max_position_embeddings 32
# (original_max_position_embeddings of llama3 and yarn likewise): the first half of the cosines at
# positions 0, 1, 5, 40, and the sines at 40; frequencies there are float32.
GOLDEN = {
    "default": (
        {},
        [
            [1.0, 1.0, 1.0, 1.0],
            [0.540302, 0.950415, 0.995004, 0.9995],
            [0.283662, -0.010342, 0.877583, 0.987526],
            [-0.666938, 0.996579, -0.653644, 0.301137],
        ],
        [0.745113, 0.082646, -0.756802, 0.953581],
    ),
    "linear": (
        {"factor": 4.0},
        [
            [1.0, 1.0, 1.0, 1.0],
            [0.968912, 0.996877, 0.999687, 0.999969],
            [0.315322, 0.922887, 0.992198, 0.999219],
            [-0.839072, -0.999786, 0.540302, 0.950415],
        ],
        [-0.544021, -0.020684, 0.841471, 0.310984],
    ),
    "dynamic": (
        {"factor": 2.0, "original_context": 32},
        [
            [1.0, 1.0, 1.0, 1.0],
            [0.540302, 0.963097, 0.997244, 0.999795],
            [0.283662, 0.206711, 0.931847, 0.994884],
            [-0.666938, -0.094759, -0.985419, 0.689829],
        ],
        [0.745113, -0.9955, 0.170144, 0.723972],
    ),
    "llama3": (
        {"factor": 8.0, "original_context": 32, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        [
            [1.0, 1.0, 1.0, 1.0],
            [0.540302, 0.995411, 0.999922, 0.999992],
            [0.283662, 0.887364, 0.998048, 0.999805],
            [-0.666938, -0.769967, 0.877583, 0.987526],
        ],
        [0.745113, -0.638083, 0.479426, 0.157456],
    ),
    "yarn": (
        {"factor": 4.0, "original_context": 32, "attention_factor": 1.25},
        [
            [1.25, 1.25, 1.25, 1.25],
            [0.675378, 1.225665, 1.249609, 1.249961],
            [0.354578, 0.68773, 1.240247, 1.249024],
            [-0.833673, -0.064612, 0.675378, 1.188019],
        ],
        [0.931391, 1.248329, 1.051839, 0.38873],
    ),
    "yarn, not truncated": (
        {
            "factor": 4.0,
            "original_context": 32,
            "truncate": False,
            "beta_fast": 4.0,
            "beta_slow": 0.5,
        },
        [
            [1.0, 1.0, 1.0, 1.0],
            [0.540302, 0.977513, 0.999671, 0.999969],
            [0.283662, 0.486827, 0.991778, 0.999219],
            [-0.666938, -0.601011, 0.517751, 0.950415],
        ],
        [0.745113, 0.799241, 0.855531, 0.310984],
    ),
}


@pytest.mark.parametrize("case", GOLDEN)
def test_rope_gives_the_numbers_of_transformers(case):
    attrs, cosines, sines = GOLDEN[case]
    positions = [[0, 1, 5, 40]], "batch seq"
    cos, sin = evaluate("rope", positions, **ROPE, scaling=case.split(",")[0], **attrs)
    assert cos.shape == (1, 4, 8)
    assert_array_equal(cos[..., :4], cos[..., 4:])
    assert_array_equal(sin[..., :4], sin[..., 4:])
    assert_allclose(cos[0, :, :4], cosines, atol=5e-6)
    assert_allclose(sin[0, 3, :4], sines, atol=5e-6)


def test_longrope_divides_by_other_numbers_beyond_the_original_context():
    short, long = (1.0, 1.0, 1.0, 1.0), (1.0, 2.0, 4.0, 8.0)
    attrs = {"scaling": "longrope", "original_context": 32, "attention_factor": 1.5}
    attrs |= {**ROPE, "short_factors": short, "long_factors": long}
    for count, divisors in ((32, short), (33, long)):
        positions = np.arange(count)
        cos, sin = evaluate("rope", (positions, "seq"), **attrs)
        angles = positions[:, None] * 100.0 ** -(np.arange(4) / 4) / divisors
        assert_allclose(cos[:, :4], 1.5 * np.cos(angles), atol=1e-12)
        assert_allclose(sin[:, 4:], 1.5 * np.sin(angles), atol=1e-12)


def test_dynamic_scaling_starts_beyond_the_original_context():
    dynamic = {**ROPE, "scaling": "dynamic", "factor": 8.0, "original_context": 32}
    positions = np.arange(32), "seq"
    within = evaluate("rope", positions, **dynamic)
    assert_array_equal(within, evaluate("rope", positions, **ROPE))
    beyond = evaluate("rope", (np.arange(33), "seq"), **dynamic)
    assert not np.allclose(beyond[0][:32], within[0])


def test_rotate_turns_pairs_as_complex_numbers():
    x = np.random.default_rng(1).normal(size=(2, 5, 3, 8))
    positions = np.array([0, 3, 1, 7, 2])
    cos, sin = evaluate("rope", (positions, "seq"), **ROPE)
    tables = (cos, "seq head_dim"), (sin, "seq head_dim")
    found = evaluate("rotate", (x, "batch seq head head_dim"), *tables, axis="head_dim")
    for s, i in np.ndindex(5, 4):
        turn = cmath.exp(1j * positions[s] * 100.0 ** (-2 * i / 8))
        expected = (x[:, s, :, i] + 1j * x[:, s, :, i + 4]) * turn
        assert_allclose(found[:, s, :, i], expected.real, rtol=1e-12, atol=1e-12)
        assert_allclose(found[:, s, :, i + 4], expected.imag, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("window", [0, 1, 3])
def test_causal(window):
    queries, keys = [0, 1, 5], [5, 0, 3, 4]
    found = evaluate("causal", ([queries], "batch seq"), (keys, "kv_seq"), window=window)
    expected = [[k <= q and (window == 0 or q - k < window) for k in keys] for q in queries]
    assert found.dtype == bool
    assert_array_equal(found, [expected])


def test_same_segment():
    queries, keys = np.array([[1, 2, 0], [3, 3, 0]]), np.array([[1, 2, 2, 0], [3, 0, 0, 0]])
    found = evaluate("same_segment", (queries, "batch seq"), (keys, "batch kv_seq"))
    expected = [[[q in (k, 0) for k in keys[row]] for q in queries[row]] for row in range(2)]
    assert found.dtype == bool
    assert_array_equal(found, expected)
    crossed = evaluate("same_segment", (queries, "batch seq"), (keys[0], "kv_seq"))
    assert_array_equal(crossed[1], [[False] * 4, [False] * 4, [True] * 4])


# transformers 5.24.0, T5Attention._relative_position_bucket, key position minus query position.
DISTANCES = [
    -1000, -130, -128, -127, -65, -64, -63, -33, -32, -31, -17, -16, -15, -9, -8, -7, -1, 0,
    1, 7, 8, 9, 12, 15, 16, 23, 31, 32, 33, 63, 64, 90, 91, 127, 128, 129, 1000,
]  # fmt: skip
BUCKETS = {
    (True, 32, 128): [
        15, 15, 15, 15, 14, 14, 13, 12, 12, 11, 10, 10, 9, 8, 8, 7, 1, 0,
        17, 23, 24, 24, 25, 25, 26, 27, 27, 28, 28, 29, 30, 30, 31, 31, 31, 31, 31,
    ],
    (False, 32, 128): [
        31, 31, 31, 31, 26, 26, 26, 21, 21, 21, 16, 16, 15, 9, 8, 7, 1, *[0] * 20,
    ],
    (True, 8, 20): [*[3] * 16, 1, 0, 5, *[7] * 18],
    (False, 6, 11): [*[5] * 15, 4, 1, *[0] * 20],
}  # fmt: skip


def buckets_of(op, distances, **attrs):
    """Return the buckets of key positions minus query positions."""
    keys = np.array(distances) + 1000
    return evaluate(op, ([1000], "seq"), (keys, "kv_seq"), **attrs)


@pytest.mark.parametrize("case", BUCKETS)
def test_buckets_are_those_of_transformers(case):
    bidirectional, count, furthest = case
    attrs = {"bidirectional": bidirectional, "buckets": count, "max_distance": furthest}
    found = buckets_of("relative_buckets", DISTANCES, **attrs)
    assert found.tolist() == [BUCKETS[case]]
    assert found.dtype == np.int32


@pytest.mark.parametrize(
    ("attrs", "message"),
    [
        ({"bidirectional": True, "buckets": 7}, "odd number"),
        ({"bidirectional": True, "buckets": 2}, "too few"),
        ({"bidirectional": False, "buckets": 1}, "too few"),
        ({"bidirectional": False, "buckets": 32, "max_distance": 16}, "max_distance"),
    ],
)
def test_impossible_buckets_are_refused(attrs, message):
    with pytest.raises(InputError, match=message):
        buckets_of("relative_buckets", [0], **attrs)


@pytest.mark.parametrize(
    ("heads", "exponents"), [(1, [8]), (4, [2, 4, 6, 8]), (6, [2, 4, 6, 8, 1, 3]), (3, [4, 8, 2])]
)
def test_alibi_has_the_slopes_of_the_paper(heads, exponents):
    found = evaluate("alibi", ([5], "seq"), ([2, 5, 6], "kv_seq"), axis="head", size=heads)
    slopes = 2.0 ** -np.array(exponents)
    assert_array_equal(found, [np.array([[-3], [0], [1]]) * slopes])


@pytest.mark.parametrize(
    ("furthest", "expected"),
    [(0, [7, 7, 7, 7, 6, 5, 4, 3, 2, 1, 0, 0, 0]), (6, [7, 7, 7, 7, 6, 5, 4, 3, 2, 1, 1, 1, 0])],
)
def test_signed_buckets_are_those_of_deberta(furthest, expected):
    found = buckets_of("signed_buckets", range(-6, 7), buckets=8, max_distance=furthest)
    assert found.tolist() == [expected]
