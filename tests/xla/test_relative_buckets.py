"""The lowerings of biases by distance against the reference: of buckets, and of slopes."""

import numpy as np
import pytest

from moecc.backend import get_backend
from moecc.ir import F32, I32, Builder, Graph, tensor

CASES = [(True, 32, 128), (False, 32, 128), (True, 8, 20), (False, 6, 11), (False, 3, 40)]


def bias_graph(bidirectional, buckets, furthest):
    """Return the graph of a bias ``[seq, kv_seq, head]`` over queries and keys of other lengths."""
    graph = Graph("bias")
    queries = graph.input("queries", tensor(I32, seq="T"))
    keys = graph.input("keys", tensor(I32, kv_seq="S"))
    table = graph.param("table", tensor(F32, bucket=buckets, head=3))
    builder = Builder(graph)
    found = builder.relative_buckets(
        queries, keys, bidirectional=bidirectional, buckets=buckets, max_distance=furthest
    )
    graph.set_output("buckets", found)
    graph.set_output("bias", builder.embedding(table, found, axis="bucket"))
    return graph


@pytest.mark.parametrize("case", CASES)
def test_every_distance_has_the_bucket_of_the_reference(case):
    graph = bias_graph(*case)
    arrays = {"queries": np.array([0, 150, 300]), "keys": np.arange(301)}
    table = {"table": np.random.default_rng(0).normal(size=(case[1], 3)).astype(np.float32)}
    found, expected = (
        get_backend(name).compile(graph).run(table, arrays) for name in ("xla", "reference")
    )
    np.testing.assert_array_equal(found["buckets"], expected["buckets"])
    assert found["buckets"].dtype == np.int32
    np.testing.assert_allclose(found["bias"], expected["bias"], rtol=1e-7)


@pytest.mark.parametrize("heads", [3, 8])
def test_slopes_of_heads_are_those_of_the_reference(heads):
    graph = Graph("bias")
    queries = graph.input("queries", tensor(I32, batch="B", seq="T"))
    keys = graph.input("keys", tensor(I32, batch="B", kv_seq="S"))
    builder = Builder(graph)
    graph.set_output("bias", builder.alibi(queries, keys, axis="head", size=heads))
    arrays = {"queries": np.array([[0, 300], [7, 8]]), "keys": np.array([[0, 1, 300], [7, 8, 9]])}
    found, expected = (
        get_backend(name).compile(graph).run({}, arrays)["bias"] for name in ("xla", "reference")
    )
    np.testing.assert_allclose(found, expected, rtol=1e-7)
