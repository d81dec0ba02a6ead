"""Rows: every piece once, none too full, and nearly full ones."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from moecc.train.rows import PackedPlan, StreamPlan, pack

LENGTHS = st.lists(st.integers(0, 40), min_size=1, max_size=30).map(lambda x: np.array(x, np.int64))


def tokens(plan):
    """Return the tokens of each row, as numbers of documents and places in them."""
    return [
        [(p.document, at) for p in plan.pieces(row) for at in range(p.start, p.stop)]
        for row in range(plan.rows)
    ]


def all_tokens(lengths):
    return [(n, at) for n, length in enumerate(lengths) for at in range(length)]


@given(LENGTHS, st.integers(1, 20))
def test_a_stream_is_cut_into_full_rows(lengths, row):
    found = tokens(StreamPlan(lengths, row))
    assert [t for each in found for t in each] == all_tokens(lengths)
    assert all(len(each) == row for each in found[:-1])


@given(LENGTHS, st.integers(1, 20), st.integers(0, 3))
def test_packed_rows_have_every_token_once(lengths, most, around):
    plan = PackedPlan(lengths, most)
    assert sorted(t for each in tokens(plan) for t in each) == all_tokens(lengths)
    plan.pack((plan.sizes + around)[None], np.array([most + around]))
    found = tokens(plan)
    assert sorted(t for each in found for t in each) == all_tokens(lengths)
    for row, each in enumerate(found):
        pieces = plan.pieces(row)
        assert 0 < len(each) + around * len(pieces) <= most + around
        assert [p.document for p in pieces] == sorted(p.document for p in pieces)


@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(0, 9)), min_size=1, max_size=60),
    st.integers(9, 20),
)
def test_every_budget_is_kept(pairs, second):
    costs, budgets = np.array(pairs).T, np.array([30, second])
    packed = pack(costs, budgets)
    assert sorted(packed.order.tolist()) == list(range(len(pairs)))
    for row in range(packed.rows):
        assert (costs[:, packed.pieces(row)].sum(1) <= budgets).all()
