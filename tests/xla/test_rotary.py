"""Rotary positions of part of a head, by divisors that depend on the length of the sequence."""

import numpy as np
import pytest

from moecc.backend import get_backend
from moecc.ir import F32, Builder, Graph, tensor, verify


def rotated():
    """Return a graph that rotates four of six entries, by other divisors beyond four positions."""
    graph = Graph("rotated")
    x = graph.input("x", tensor(F32, seq="S", head_dim=6))
    b = Builder(graph)
    cos, sin = b.rope(
        b.positions(x, axis="seq"), axis="head_dim", size=4, scaling="longrope",
        original_context=4, short_factors=(1.0, 1.5), long_factors=(2.0, 7.0),
        attention_factor=1.25,
    )  # fmt: skip
    turned = b.rotate(b.slice(x, axis="head_dim", start=0, stop=4), cos, sin, axis="head_dim")
    graph.set_output("y", b.join(turned, b.slice(x, axis="head_dim", start=4, stop=6),
                                 axis="head_dim"))  # fmt: skip
    verify(graph)
    return graph


@pytest.mark.parametrize("length", [4, 5])
def test_part_of_a_head_is_rotated_as_the_reference_does(length):
    graph = rotated()
    x = np.random.default_rng(0).standard_normal((length, 6)).astype(np.float32)
    wanted = get_backend("reference").compile(graph).run({}, {"x": x})["y"]
    found = get_backend("xla").compile(graph).run({}, {"x": x})["y"]
    np.testing.assert_allclose(found, wanted, atol=2e-6)
    np.testing.assert_array_equal(found[:, 4:], x[:, 4:])
    first = 1.25 * (x[1, 0] * np.cos(1 / (2 if length > 4 else 1)))
    first -= 1.25 * (x[1, 2] * np.sin(1 / (2 if length > 4 else 1)))
    assert found[1, 0] == pytest.approx(first, abs=1e-5)
