"""Sums over tokens and the statistics that follow, against the plainest formulas."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from moecc.model.initialise import BlockSums, ExpertSums

from .rounding import UNIT, assert_within, bounds_of_block

SEEDS = st.integers(0, 10_000)


@given(SEEDS, st.integers(1, 3), st.integers(1, 4))
def test_a_block(seed, texts, batches):
    rng = np.random.default_rng(seed)
    sums = BlockSums(texts, 5, 8, 0.25)
    parts = []
    for _ in range(batches):
        text = int(rng.integers(texts))
        x = rng.normal(1, 2, (int(rng.integers(1, 9)), 5)).astype(np.float32)
        hidden = rng.normal(size=(len(x), 8)).astype(np.float32)
        sums.add(text, x, hidden)
        parts.append((np.full(len(x), text), x, hidden))
    text, x, hidden = (np.concatenate(part) for part in zip(*parts, strict=True))
    found = sums.statistics()
    wide, size = x.astype(np.float64), np.abs(hidden.astype(np.float64))
    centred = wide - wide.mean(0)
    is_text = (text[:, None] == np.arange(texts)).astype(np.float64)
    active = np.argsort(np.argsort(-size, axis=1), axis=1) < 2
    expected = {
        "input.mean": wide.mean(0),
        "input.covariance": centred.T @ centred / len(x),
        "hidden.mean": size.mean(0),
        "hidden.cross": centred.T @ (size - size.mean(0)) / len(x),
        "texts.cross": (is_text - is_text.mean(0)).T @ centred / len(x),
    }
    for name, bound in bounds_of_block(x, hidden).items():
        assert_within(found[name], expected[name], bound)
    np.testing.assert_array_equal(found["hidden.pairs"], active.T.astype(int) @ active.astype(int))


@given(SEEDS, st.integers(1, 3))
def test_experts(seed, batches):
    rng = np.random.default_rng(seed)
    sums = ExpertSums(4, 3)
    parts = []
    for _ in range(batches):
        count = int(rng.integers(1, 9))
        one = (
            rng.integers(0, 3, count), rng.random(count).astype(np.float32),
            rng.normal(size=(count, 3)).astype(np.float32),
        )  # fmt: skip
        sums.add(*one)
        parts.append(one)
    chosen, gates, result = (np.concatenate(part) for part in zip(*parts, strict=True))
    found = sums.statistics()
    for expert in range(4):
        own = chosen == expert
        assert np.isclose(found["experts.share"][expert], own.mean())
        if not own.any():
            assert not found["experts.saliency"][expert]
            continue
        wide, weight = result[own].astype(np.float64), gates[own].astype(np.float64)
        expected = {
            "experts.gate": weight.mean(),
            "experts.saliency": (weight * np.linalg.norm(wide, axis=1)).mean(),
            "experts.result": wide.mean(0),
        }
        for name, value in expected.items():
            assert_within(found[name][expert], value, UNIT * np.abs(value))
