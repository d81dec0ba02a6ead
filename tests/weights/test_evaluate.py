"""The evaluator beyond what random expressions show: errors, memory, what is read."""

from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moecc.types import BF16, DTYPES, F16, F32, F64, PRED, tensor
from moecc.weights import evaluate as evaluator
from moecc.weights.arithmetic import (
    Add,
    Cast,
    Moment,
    Mul,
    Scale,
    first_nonfinite,
    round_to,
)
from moecc.weights.evaluate import Evaluator, ValuesOverflow, blocks, evaluate
from moecc.weights.expr import Source
from moecc.weights.movement import Concat, Split

W = Source("w", tensor(F32, a=4))
E8M4 = Source("w", tensor(F32, expert=8, mlp=4))


class Reader:
    """Holds arrays, and counts the elements that are read."""

    def __init__(self, **arrays):
        self.arrays = arrays
        self.read = 0

    def __call__(self, name, start=0, stop=None):
        values = self.arrays[name]
        got = values[start:stop] if values.ndim else values
        self.read += got.size
        return got


def ramp(*shape, dtype=np.float32):
    return np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype)


def test_only_the_rows_wanted_are_read():
    reader = Reader(w=ramp(8, 4))
    got = evaluate(Concat((E8M4, E8M4), "expert"), reader, rows=(6, 10))
    assert reader.read == 4 * 4
    assert (got == ramp(8, 4)[[6, 7, 0, 1]]).all()


def test_a_shared_moment_is_computed_once():
    e = Add(E8M4, Moment("std", E8M4))
    reader = Reader(w=ramp(8, 4))
    assert len(list(blocks(e, reader, block_bytes=16))) == 8
    assert reader.read == 3 * 32  # the mean, the deviation, and the sum itself


@pytest.mark.parametrize(
    "expr",
    [
        Cast(W, F16),
        Cast(W, DTYPES["f8e4m3fn"]),
        Cast(Scale(W, 4e33), BF16),
        Scale(W, 1e34),
        Add(*2 * [Scale(W, 2e33)]),
        Mul(*2 * [Scale(W, 1e15)]),
        Cast(Mul(*2 * [Cast(Scale(W, 1e20), F64)]), F32),
    ],
)
def test_an_overflow_is_an_error(expr):
    with pytest.raises(ValuesOverflow, match="values overflow") as caught:
        evaluate(expr, Reader(w=np.array([1.0, 2.0, 85_000.0, -90_000.0], np.float32)))
    assert 'source("w"' in str(caught.value)


@given(st.data())
def test_a_strided_axis_is_cut_the_same_row_by_row(data):
    sizes = data.draw(st.lists(st.integers(1, 4), min_size=2, max_size=3))
    w = Source("w", tensor(F32, x=2, mlp=int(np.prod(sizes)), y=2))
    e = Split(w, "mlp", tuple(zip("abc", sizes, strict=False)))
    whole = ramp(2, w.type.shape[1], 2).reshape(e.type.shape)
    box = []
    for size in e.type.shape:
        start = data.draw(st.integers(0, size - 1))
        box.append((start, data.draw(st.integers(start + 1, size))))
    with mock.patch.object(evaluator, "WIDE_BYTES", data.draw(st.sampled_from((0, 64, 1 << 20)))):
        got = Evaluator(Reader(w=ramp(*w.type.shape))).block(e, tuple(box))
    assert (got == whole[tuple(slice(*ends) for ends in box)]).all()


def test_moments_are_those_of_numpy():
    rng = np.random.default_rng(0)
    values = rng.normal(3.0, 0.5, (40, 50, 30)).astype(np.float32)
    mask = rng.random((40, 30)) < 0.3
    mask[7] = False
    w, m = Source("w", tensor(F32, a=40, b=50, c=30)), Source("m", tensor(PRED, a=40, c=30))
    reader = Reader(w=values, m=mask)
    wide = values.astype(np.float64)
    np.testing.assert_allclose(evaluate(Moment("mean", w), reader), wide.mean(), rtol=1e-7)
    np.testing.assert_allclose(
        evaluate(Moment("std", w, None, ("b",)), reader), wide.std(axis=(0, 2)), rtol=1e-7
    )
    got = evaluate(Moment("std", w, m, ("a",)), reader)
    for a in range(40):
        expected = wide[a][:, mask[a]].std() if mask[a].any() else 0.0
        np.testing.assert_allclose(got[a], expected, rtol=1e-7)


FLOATS = (F64, F32, F16, BF16, DTYPES["f8e4m3fn"], DTYPES["f8e5m2"])


@pytest.mark.parametrize("source", [F64, F32])
def test_rounding_to_bf16_is_to_nearest_even(source):
    rng = np.random.default_rng(1)
    values = rng.standard_normal(4000) * 2.0 ** rng.integers(-130, 120, 4000)
    # Halfway between two bf16, and just beside it.
    odd = (1 + (2 * np.arange(64) + 1) * 2.0**-8) * 2.0 ** rng.integers(-20, 20, 64)
    values = np.concatenate([values, odd, odd * (1 + 2.0**-40), odd * (1 - 2.0**-40), -odd])
    values = values.astype(source.numpy)
    got = round_to(values, BF16)
    bits = got.view(np.uint16)
    for step in (-1, 1):
        other = (bits + np.uint16(step % 65536)).view(BF16.numpy).astype(np.float64)
        here, there = (np.abs(v - values) for v in (got.astype(np.float64), other))
        even = bits & 1 == 0
        sure = np.isfinite(other) & (got != 0)
        assert ((here < there) | ((here == there) & even))[sure].all()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("at", [0, 1, 70_000, 99_999])
def test_the_first_value_that_is_not_finite_is_found(dtype, at):
    values = np.full(100_000, -1.5, dtype.numpy)
    assert first_nonfinite(values) is None
    values[99_999] = np.nan
    values[at] = np.nan if dtype.name == "f8e4m3fn" else -np.inf
    assert first_nonfinite(values) == at
    assert first_nonfinite(values.reshape(1000, 100)) == at
