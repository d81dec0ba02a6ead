"""Hidden spans can be put back exactly; as much is hidden as asked."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moecc.train.objectives import Masking, Spans

from .tiny import restored

SENTINELS = tuple(range(1000, 1100))


@st.composite
def corruptions(draw):
    spans = Spans(
        draw(st.floats(0.02, 0.9)),
        draw(st.floats(1, 9)),
        SENTINELS[: draw(st.integers(1, 100))],
        draw(st.sampled_from([None, 999])),
    )
    ids = draw(st.lists(st.integers(0, 998), min_size=2, max_size=80))
    return spans, np.array(ids, np.int32), draw(st.integers(0, 2**32))


@given(corruptions())
def test_the_text_comes_back_from_encoder_and_decoder(case):
    spans, ids, seed = case
    encoder, decoder = spans.apply(ids, np.random.default_rng(seed))
    assert restored(encoder, decoder, spans.sentinels, spans.end).tolist() == ids.tolist()
    sizes = spans.sizes(np.array([len(ids)]))
    assert (len(encoder), len(decoder)) == (sizes[0][0], sizes[1][0])
    marks = [t for t in encoder.tolist() if t >= 1000]
    # Sentinels come in their order, each once, and the first token of the decoder is one.
    assert marks == list(SENTINELS[: len(marks)])
    assert [t for t in decoder.tolist() if t >= 1000] == marks
    assert encoder[0] < 999 <= decoder[0]
    if spans.end is not None:
        assert encoder[-1] == decoder[-1] == spans.end


def decoder_of(length, seed=0):
    """Return what the decoder reads of T5's spans of a text of the ids 0 to `length`."""
    spans, ids = Spans(0.15, 3.0, SENTINELS, None), np.arange(length, dtype=np.int32)
    return spans.apply(ids, np.random.default_rng(seed))[1]


def test_density_and_span_lengths_are_as_asked():
    lengths, where = [], np.zeros(500)
    for seed in range(300):
        decoder = decoder_of(500, seed)
        hidden = decoder < 1000
        where[decoder[hidden]] += 1
        edges = np.flatnonzero(np.append(~hidden, True))
        lengths += (np.diff(edges) - 1).tolist()
    assert where.sum() / (300 * 500) == 0.15
    assert abs(np.mean(lengths) - 3.0) < 0.01
    # Lengths of a random partition into 25 parts of 75: nearly geometric, 1 the likeliest.
    counts = np.bincount(lengths) / len(lengths)
    assert abs(counts[1] - 24 / 74) < 0.02
    assert counts[1] > counts[2] > counts[3]
    # The first token is always kept; in the middle all are hidden equally often.
    assert where[0] == 0
    assert abs(where[50:450].mean() / 300 - 0.15) < 0.01


@pytest.mark.parametrize(
    ("length", "hidden", "spans"),
    [(512, 77, 26), (102, 15, 5), (106, 16, 5)],  # 76.8 and 25.7; 15.3; 15.9 and 5.3
)
def test_counts_are_rounded_as_t5_rounds_them(length, hidden, spans):
    decoder = decoder_of(length)
    assert ((decoder < 1000).sum(), (decoder >= 1000).sum()) == (hidden, spans)


def test_masking_is_that_of_bert():
    masking = Masking(0.15, 7777, 1000)
    ids = np.arange(2000, 2200, dtype=np.int32)
    kinds, chosen_at = np.zeros(3), np.zeros(200)
    for seed in range(500):
        seen, chosen = masking.apply(ids, np.random.default_rng(seed))
        assert chosen.sum() == 30
        assert (seen[~chosen] == ids[~chosen]).all()
        chosen_at += chosen
        # Masked, drawn at random, kept.
        kinds += [(chosen & kind).sum() for kind in (seen == 7777, seen < 1000, seen == ids)]
    assert np.allclose(kinds / kinds.sum(), [0.8, 0.1, 0.1], atol=0.01)
    assert np.allclose(chosen_at / 500, 0.15, atol=0.08)
