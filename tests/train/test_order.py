"""The order of a mixture: each row once in an epoch, shares as asked, nothing but arguments."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from moecc.train.batches import PERIOD, Mixture, permuted


@given(st.integers(1, 700), st.integers(0, 2**64 - 1))
def test_a_permutation_has_each_number_once(size, key):
    assert sorted(permuted(np.arange(size), size, key)) == list(range(size))


@given(st.integers(1, 2**40), st.integers(0, 2**64 - 1), st.data())
def test_numbers_of_a_large_range_stay_in_it(size, key, data):
    some = np.array(data.draw(st.lists(st.integers(0, size - 1), max_size=5, unique=True)), int)
    found = permuted(some, size, key)
    assert ((found >= 0) & (found < size)).all()
    assert len(set(found.tolist())) == len(some)


@settings(max_examples=12)
@given(
    st.lists(st.tuples(st.integers(100, 4000), st.floats(0.01, 10)), min_size=1, max_size=4),
    st.integers(0, 99),
    st.integers(0, 2 * PERIOD),
)
def test_shares_hold_in_every_stretch(corpora, seed, start):
    rows, weights = zip(*corpora, strict=True)
    mixture = Mixture(rows, weights, seed)
    corpus, _, _ = mixture.find(range(start, start + 1000))
    for number, weight in enumerate(weights):
        share = weight / sum(weights)
        off = abs(int((corpus == number).sum()) - 1000 * share)
        rounded = 1000 * len(rows) / PERIOD  # shares are whole rows of a period
        assert off < 2 * (1 - share) + 2 * share * (len(rows) - 1) + rounded


def test_an_epoch_has_each_row_once_and_the_next_another_order():
    mixture = Mixture((7, 12), (1.0, 3.0), 5)
    corpus, epoch, row = mixture.find(range(200))
    orders = {}
    for c, size in ((0, 7), (1, 12)):
        for e in range(int(epoch[corpus == c].max())):
            order = row[(corpus == c) & (epoch == e)].tolist()
            assert sorted(order) == list(range(size))
            orders[c, e] = tuple(order)
    assert len(orders) == len(set(orders.values()))
    assert orders[0, 0] != tuple(Mixture((7, 12), (1.0, 3.0), 6).find(range(28))[2][:7])


def test_numbers_may_be_asked_for_in_any_order():
    mixture = Mixture((70, 30), (0.6, 0.4), 1)
    whole = mixture.find(range(500))
    some = np.random.default_rng(0).permutation(500)[:100]
    for a, b in zip(whole, mixture.find(some), strict=True):
        assert (a[some] == b).all()


def test_the_order_stays_what_it_was():
    """Resuming under a later version of moecc needs the same rows."""
    corpus, epoch, row = Mixture((10, 4), (0.7, 0.3), 42).find(range(16))
    assert corpus.tolist() == [0, 1, 0, 0, 1, 0, 0, 0, 1, 0, 1, 0, 0, 0, 1, 0]
    assert epoch.tolist() == [0] * 14 + [1, 1]
    assert row.tolist() == [0, 0, 7, 2, 1, 6, 1, 5, 3, 9, 2, 8, 4, 3, 0, 6]
