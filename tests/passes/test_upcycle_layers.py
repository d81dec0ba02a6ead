"""The option ``layers``, in all its forms."""

import re
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st
from moecc_passes.upcycle.options import check_layers
from moecc_passes.upcycle.upcycle import UpcyclePass

from moecc.errors import InputError

from .dense_blocks import Dense, applied
from .model_graphs import imported

MOST = 13


@cache
def model(layers):
    return Dense(embed=2, mlp=2, layers=layers).graph()


def converted(graph, layers):
    """Return the numbers of the layers that become sparse, in order."""
    sparse = dispatches(graph)
    after, result = upcycled(graph, layers)
    found = [loc for loc in dispatches(after) if loc not in sparse]
    blocks = {n.loc for n in graph}.difference(sparse)
    assert result.matched == len(found)
    assert result.stats == {"blocks found": len(blocks), "blocks converted": len(found)}
    return [int(loc.split(".")[1]) for loc in found]


def upcycled(graph, layers="all"):
    return applied(UpcyclePass(experts=2, top_k=1, layers=layers), graph)


def dispatches(graph):
    return [n.loc for n in graph if n.op.name == "dispatch"]


@given(st.integers(1, MOST), st.data())
def test_counted_forms(total, data):
    graph, layers = model(total), range(total)
    n = data.draw(st.integers(1, MOST))
    half = total // 2
    expected = {
        "all": list(layers),
        f"every:{n}": [i for i in layers if (i + 1) % n == 0],
        f"first:{n}": list(layers)[:n],
        f"last:{n}": list(layers)[-n:],
        "first:half": list(layers)[:half],
        "last:half": list(layers)[total - half :],
    }
    spec = data.draw(st.sampled_from(sorted(expected)))
    assert check_layers(spec) is None
    assert converted(graph, spec) == expected[spec]


@pytest.mark.parametrize(
    "spec",
    ["", "al", "every:0", "first:0", "every:half", "first:1.5", "3,", "3 7", "-1", "first",
     "9" * 5000],
)  # fmt: skip
def test_what_cannot_be_read_is_refused_with_the_forms(spec):
    (problem,) = UpcyclePass(layers=spec).validate()
    assert problem.found == spec
    assert "every:N" in problem.expected


@given(st.text(max_size=12))
def test_any_text_is_either_refused_or_selects(spec):
    if check_layers(spec) is not None:
        return
    numbers = [int(n) for n in spec.split(",")] if re.fullmatch("[0-9,]+", spec) else []
    if max(numbers, default=0) > 3:
        with pytest.raises(InputError, match="no feed-forward block to convert"):
            converted(model(4), spec)
    else:
        assert set(converted(model(4), spec)) <= set(range(4))


def test_layers_that_are_sparse_already_still_count():
    graph, _ = upcycled(model(8), "last:2")
    assert converted(graph, "every:4") == [3]
    assert converted(graph, "first:half") == [0, 1, 2, 3]
    assert converted(graph, "last:half") == [4, 5]
    with pytest.raises(InputError, match="in layer 6-7") as error:
        converted(graph, "5,6,7")
    assert error.value.problems[0].expected == "layers with a dense block: 0-5"


def test_a_dense_layer_that_cannot_be_converted_is_named():
    _, result = upcycled(imported("gemma3n_streams"))
    lines = [str(remark) for remark in result.remarks if "cannot" in remark.text]
    reason = "cannot be converted: mean is not elementwise"
    assert lines == [f"layers.{layer}.ffn: {reason}" for layer in (0, 2)]
