"""Positions against the reference: rotations of part of a head, biases by distance, by slopes."""

import numpy as np
import pytest

from moecc.ir import F32, I32, Builder, Graph, tensor, verify

from .models import run_both


@pytest.mark.parametrize(
    "case", [(True, 32, 128), (False, 32, 128), (True, 8, 20), (False, 6, 11), (False, 3, 40)]
)
def test_every_distance_has_the_bucket_of_the_reference(case):
    """A bias ``[seq, kv_seq, head]`` over queries and keys of other lengths."""
    bidirectional, buckets, furthest = case
    graph = Graph("bias")
    queries = graph.input("queries", tensor(I32, seq="T"))
    keys = graph.input("keys", tensor(I32, kv_seq="S"))
    table = graph.param("table", tensor(F32, bucket=buckets, head=3))
    b = Builder(graph)
    bucket = b.relative_buckets(
        queries, keys, bidirectional=bidirectional, buckets=buckets, max_distance=furthest
    )
    graph.set_output("buckets", bucket)
    graph.set_output("bias", b.embedding(table, bucket, axis="bucket"))
    inputs = {"queries": np.array([0, 150, 300]), "keys": np.arange(301)}
    params = {"table": np.random.default_rng(0).normal(size=(buckets, 3)).astype(np.float32)}
    found, expected = run_both(graph, params, inputs, F32)
    np.testing.assert_array_equal(found["buckets"], expected["buckets"])
    assert found["buckets"].dtype == np.int32
    np.testing.assert_allclose(found["bias"], expected["bias"], rtol=1e-7)


@pytest.mark.parametrize("heads", [3, 8])
def test_slopes_of_heads_are_those_of_the_reference(heads):
    graph = Graph("bias")
    queries = graph.input("queries", tensor(I32, batch="B", seq="T"))
    keys = graph.input("keys", tensor(I32, batch="B", kv_seq="S"))
    graph.set_output("bias", Builder(graph).alibi(queries, keys, axis="head", size=heads))
    inputs = {"queries": np.array([[0, 300], [7, 8]]), "keys": np.array([[0, 1, 300], [7, 8, 9]])}
    found, expected = run_both(graph, {}, inputs, F32)
    np.testing.assert_allclose(found["bias"], expected["bias"], rtol=1e-7)


@pytest.mark.parametrize(("length", "divisor"), [(4, 1), (5, 2)])
def test_part_of_a_head_is_rotated_as_the_reference_does(length, divisor):
    """Four of six entries, by other divisors beyond four positions."""
    graph = Graph("rotated")
    x = graph.input("x", tensor(F32, seq="S", head_dim=6))
    b = Builder(graph)
    cos, sin = b.rope(
        b.positions(x, axis="seq"), axis="head_dim", size=4, scaling="longrope",
        original_context=4, short_factors=(1.0, 1.5), long_factors=(2.0, 7.0),
        attention_factor=1.25,
    )  # fmt: skip
    rotated, passed = (
        b.slice(x, axis="head_dim", start=start, stop=stop) for start, stop in ((0, 4), (4, 6))
    )
    rotated = b.rotate(rotated, cos, sin, axis="head_dim")
    graph.set_output("y", b.join(rotated, passed, axis="head_dim"))
    verify(graph)
    x = np.random.default_rng(0).standard_normal((length, 6)).astype(np.float32)
    found, expected = run_both(graph, {}, {"x": x}, F32)
    np.testing.assert_allclose(found["y"], expected["y"], atol=2e-6)
    np.testing.assert_array_equal(found["y"][:, 4:], x[:, 4:])
    first = 1.25 * (x[1, 0] * np.cos(1 / divisor) - x[1, 2] * np.sin(1 / divisor))
    assert found["y"][1, 0] == pytest.approx(first, abs=1e-5)
