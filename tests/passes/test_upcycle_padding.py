"""Widths that do not divide: neurons that add nothing are added, and the function stays."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from .dense_blocks import EXACT, Dense, Tensors, error, tokens, upcycled


@given(
    width=st.integers(5, 13),
    slices=st.integers(1, 4),
    pad=st.integers(1, 4),
    shared=st.booleans(),
    gated=st.booleans(),
    biased=st.booleans(),
    seed=st.integers(0, 3),
)
def test_the_function_stays(width, slices, pad, shared, gated, biased, seed):
    dense = Dense(mlp=width, gated=gated, bias_in=biased, bias_out=biased)
    options = {
        "experts": 2 * slices, "top_k": slices, "granularity": slices, "pad": pad,
        "shared": 1 / width if shared else 0.0,
    }  # fmt: skip
    added = -(width - shared) % (slices * pad)
    if added > width:
        return
    graph = dense.graph()
    after, result = upcycled(graph, seed, **options, router_std=1.0)
    params = Tensors(graph, seed).params(after)
    up, down = params["layers.0.up"], params["layers.0.down"]
    assert result.preserves.kind == "reassociation"
    assert up.shape[1] == down.shape[2] == (width + added - shared) / slices
    assert (down == 0).all(1).sum() == 2 * added  # in each copy of the block
    assert (up != 0).all()  # so that what is added learns
    assert error(graph, after, tokens(dense), seed) <= EXACT


def test_each_neuron_is_stored_once():
    graph = Dense(mlp=11).graph()
    tensors = Tensors(graph)
    after, _ = upcycled(graph, experts=4, top_k=2, gates="ones", split="random", pad=1)
    columns = np.moveaxis(tensors.params(after)["layers.0.down"], 0, 1).reshape(8, 12).T
    for column in tensors.arrays["layers.0.down"].T:
        assert (np.abs(columns - column).max(1) == 0).sum() == 1
