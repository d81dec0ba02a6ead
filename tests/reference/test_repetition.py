"""What repeating a body means, against a loop written out."""

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from moecc.errors import InputError
from moecc.ir import F32, I32, Builder, Graph, parse, tensor
from moecc.testing import run_reference

TEXT = """moecc 1
graph g {
  input %x : f32[batch=B, embed=4]
  param %w : f32[layer=3, embed=4]
  param %u : f32[embed=4, layer=3]
  param %g : f32[embed=4]
  %y, %s = scan %x, %w, %u, %g {over=(layer=3), carries=1, stacked=2} : f32[batch=B, embed=4], f32[layer=3, batch=B] {
    input %h : f32[batch=B, embed=4]
    input %w : f32[embed=4]
    input %u : f32[embed=4]
    input %g : f32[embed=4]
    %b = mul %h, %g : f32[batch=B, embed=4]
    %n = add %b, %w : f32[batch=B, embed=4]
    %o = mul %n, %u : f32[batch=B, embed=4]
    %m = sum %o {axes=embed} : f32[batch=B]
    output h = %o
    output m = %m
  }
  output y = %y
  output s = %s
}
"""  # noqa: E501


def test_a_scan_is_a_loop():
    rng = np.random.default_rng(3)
    x, w, u, g = (rng.normal(size=s) for s in ((2, 4), (3, 4), (4, 3), (4,)))
    found = run_reference(parse(TEXT), params={"w": w, "u": u, "g": g}, inputs={"x": x})
    sums = []
    for at in range(3):
        x = (x * g + w[at]) * u[:, at]
        sums.append(x.sum(axis=1))
    assert_array_equal(found["y"], x)
    assert_array_equal(found["s"], np.stack(sums))


def test_a_wrong_index_in_a_body_is_told_with_its_node():
    body = Graph("body")
    table = body.input("table", tensor(F32, vocab=4, embed=2))
    ids = body.input("ids", tensor(I32, batch=3))
    body.set_output("y", Builder(body, loc="layers.{0..1}.ffn").embedding(table, ids, axis="vocab"))
    graph = Graph()
    inputs = [graph.input(name, value.type) for name, value in body.inputs.items()]
    graph.set_output("y", Builder(graph).scan(*inputs, over=(("layer", 2),), body=body)[0])
    arrays = {"table": np.zeros((4, 2)), "ids": np.array([0, 1, 4])}
    with pytest.raises(InputError, match="an index is outside the table") as caught:
        run_reference(graph, inputs=arrays)
    assert "embedding" in str(caught.value.problems[0].where)
