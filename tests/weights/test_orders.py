"""Orders, what is taken in them, and fitted routers."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moecc.errors import InputError
from moecc.weights.fits import cluster_order, fitted_rows
from moecc.weights.text import parse_expr


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('take(source("w" : f32[mlp=4]), mlp=source("o" : f32[mlp=4]))', "whole numbers"),
        ('take(source("w" : f32[mlp=4]), mlp=source("o" : i32[a=4]))', "i32[mlp"),
        ('take(source("w" : f32[a=4]), mlp=source("o" : i32[mlp=4]))', "no axis 'mlp'"),
        ("permutation(f32[mlp=4], key=0x1)", "whole numbers"),
        ("permutation(i32[mlp=4, a=2], key=0x1)", "whole numbers"),
        ('clusters(source("p" : i32[mlp=6, a=5]), axis=mlp, first=0, groups=2)', "square"),
        ('clusters(source("p" : i32[mlp=6, a=6]), axis=mlp, first=1, groups=2)', "divide"),
        ('clusters(source("p" : i32[mlp=6, a=6]), axis=mlp, first=6, groups=1)', "divide"),
        ('aligned(source("a" : f32[mlp=6]), source("b" : f32[mlp=5]), axis=mlp)', "the shapes"),
        ('aligned(source("a" : f32[mlp=6]), axis=mlp)', "the shapes"),
        ('aligned(source("a" : f32[e=6]), source("b" : f32[e=6]), axis=mlp)', "no axis 'mlp'"),
        ('aligned(source("a" : i32[mlp=6]), source("b" : i32[mlp=6]), axis=mlp)', "same neurons"),
        (
            'fitted(source("c" : f32[e=3, o=4]), source("m" : f32[e=3]), '
            'source("x" : f32[expert=3, e=3]), ridge=0.01, std=0.5)',
            "square",
        ),
        (
            'fitted(source("c" : f32[e=3, o=3]), source("m" : f32[e=3]), '
            'source("x" : f32[expert=3, e=3]), ridge=-0.01, std=0.5)',
            "ridge is not a size",
        ),
        (
            'fitted(source("c" : f32[e=3, o=3]), source("m" : f32[o=3, e=3]), '
            'source("x" : f32[expert=3, e=3]), ridge=0.01, std=0.5)',
            "the covariances are of the input",
        ),
        (
            'fitted(source("c" : f32[e=3, o=3]), source("m" : f32[e=3]), '
            'source("x" : f32[expert=3, o=3]), ridge=0.01, std=0.5)',
            "the covariances are of the input",
        ),
    ],
)
def test_wrong_types_are_reported(text, words):
    with pytest.raises(InputError) as caught:
        parse_expr(text)
    assert words in str(caught.value)


# --- clusters


def planted(rng, groups, size, tokens):
    """Return the counts of pairs of shuffled neurons of which those of a group go together."""
    of_group = rng.random((groups, tokens)) < 0.3
    noise = rng.random((groups * size, tokens)) < 0.02
    active = np.repeat(of_group, size, axis=0) ^ noise
    return (active.astype(np.int64) @ active.T.astype(np.int64)).astype(np.int32)


@given(st.integers(0, 10_000), st.integers(2, 5), st.integers(2, 8))
def test_planted_clusters_are_found(seed, groups, size):
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(groups * size)
    pairs = planted(rng, groups, size, 400)[np.ix_(shuffled, shuffled)]
    order = cluster_order(lambda a, b: pairs[a:b], groups * size, 0, groups)
    found = {frozenset(part.tolist()) for part in np.split(shuffled[order] // size, groups)}
    assert all(len(members) == 1 for members in found)
    assert sorted(order.tolist()) == list(range(groups * size))


# --- fitted routers


@given(st.integers(0, 10_000), st.integers(2, 5), st.sampled_from((0.0, 0.01, 1.0)))
def test_logits_have_the_spread_and_no_preference(seed, experts, ridge):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(500, 8)) @ rng.normal(size=(8, 8)) + rng.normal(size=8)
    target = rng.normal(size=(500, experts)) + x @ rng.normal(size=(8, experts))
    mean = x.mean(0)
    cross = (target - target.mean(0)).T @ (x - mean) / len(x)
    rows = fitted_rows(np.cov(x.T, bias=True), mean, cross, ridge=ridge, std=0.5)
    assert np.array_equal(rows, rows.astype(ml_dtypes.bfloat16).astype(np.float32))
    logits = x @ rows.T.astype(np.float64)
    # Rounding to bf16 leaves 2⁻⁹ of each row.
    assert np.sqrt((logits - logits.mean(0)).var(0).mean()) == pytest.approx(0.5, rel=0.01)
    assert np.abs(logits.mean(0)).max() < 0.01 * np.abs(rows).sum() * np.abs(mean).max()
    assert np.abs(rows.sum(0)).max() < 0.02 * np.abs(rows).max()
