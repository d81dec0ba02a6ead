"""Gate and up as one product: where it is done, where it is left, and that nothing else changes."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moecc_passes.fuse import FuseGateUpPass, Fusion, find_siblings, fuse_siblings
from tiers import examples

from moecc.ir import clone, equal, parse
from moecc.testing import laws
from moecc.testing.generate import random_graph
from moecc.testing.steps import experts, feed_forward
from moecc.weights.expr import Source
from moecc.weights.movement import Concat

from .dense_blocks import Dense, applied, error, relative, run, tokens, upcycled

ITEM = FuseGateUpPass()


def with_sources(graph):
    """Give each parameter that has none an expression: what has none is not fused."""
    for name, value in graph.params.items():
        value.weight = value.weight or Source(name, value.type)
    return graph


def contractions(graph):
    return [n.operands[1].name for n in graph if n.op.name == "contract"]


def test_a_gated_block_has_two_products_instead_of_three():
    dense = Dense(layers=2, residual=True, bias_in=True)
    before = dense.graph()
    after, _ = applied(ITEM, before)
    assert contractions(before)[:3] == ["layers.0.gate", "layers.0.up", "layers.0.down"]
    assert contractions(after) == [
        f"layers.{i}.{n}" for i in range(2) for n in ("gate.fused", "down")
    ]
    whole = after.params["layers.0.gate.fused"]
    assert str(whole.type) == "f64[mlp=24, embed=8]"
    assert isinstance(whole.weight, Concat)
    assert [x.name for x in whole.weight.xs] == ["layers.0.gate", "layers.0.up"]
    # It stands where the first of its parts stood.
    assert [*after.params].index("layers.0.gate.fused") == 1
    assert error(before, after, tokens(dense)) < 1e-14


@pytest.mark.parametrize("options", [{}, {"slots": "capacity", "capacity_factor": 1.0}])
@pytest.mark.parametrize("transposed", [False, True])
def test_experts_have_two_products_instead_of_three(options, transposed):
    dense = Dense(transposed=transposed)
    sparse, _ = upcycled(dense.graph(), experts=4, init="noise", shared=0.5, **options)
    assert [s.axis for s in find_siblings(sparse)] == ["mlp", "mlp"]
    after, _ = applied(ITEM, sparse)
    whole = after.params["layers.0.gate.fused"]
    assert set(whole.type.names) == {"expert", "mlp", "embed"}
    assert error(sparse, after, tokens(dense)) < 1e-14


GATED = """
moecc 1
graph g {
  input %x : f32[batch=B, embed=4]
  param %gate : f32[mlp=6, embed=4] = source("gate" : f32[mlp=6, embed=4])
  param %up : f32[mlp=6, embed=4] = source("up" : f32[mlp=6, embed=4])
  param %down : f32[embed=4, mlp=6] = source("down" : f32[embed=4, mlp=6])
  %a = contract %x, %gate {over=embed} : f32[batch=B, mlp=6]
  %u = contract %x, %up {over=embed} : f32[batch=B, mlp=6]
  %s = silu %a : f32[batch=B, mlp=6]
  %m = mul %s, %u : f32[batch=B, mlp=6]
  %y = contract %m, %down {over=mlp} : f32[batch=B, embed=4]
  output y = %y
}
"""


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("  output y = %y", "  output y = %y\n  output w = %up"),
        ("%u = contract %x, %up", "%u = contract %x, %gate"),
        ('source("up" : f32[', 'source("up" : bf16['),
        (' = source("up" : f32[mlp=6, embed=4])', ""),
        ('%up : f32[mlp=6, embed=4] = source("up" : f32[mlp=6, embed=4])',
         '%up : f32[embed=4, mlp=6] = source("up" : f32[embed=4, mlp=6])'),
        ("%u = contract %x, %up", "%v = neg %x : f32[batch=B, embed=4]\n  %u = contract %v, %up"),
        ("%m = mul %s, %u : f32[batch=B, mlp=6]", "%m = silu %s : f32[batch=B, mlp=6]"),
        ("%s = silu %a : ", "%s = softmax %a {axis=mlp} : "),
    ],
    ids=["an output", "shared", "element types", "no weight", "orders", "values", "apart", "mixed"],
)  # fmt: skip
def test_what_cannot_be_one_product_stays_as_it_is(old, new):
    assert old in GATED
    graph = parse(GATED.replace(old, new))
    assert find_siblings(graph) == []
    assert equal(applied(ITEM, graph)[0], graph)


@pytest.mark.parametrize(("at", "count"), [("mlp", 0), ("embed", 1)])
def test_a_shard_of_the_whole_is_not_the_shards_of_the_parts(at, count):
    graph = parse(GATED.replace("graph g {", 'graph g {\n  attr mesh = {"model": 2}'))
    for name in ("gate", "up"):
        value = graph.params[name]
        value.type = value.type.with_axes(
            replace(a, mesh=("model",)) if a.name == at else a for a in value.type
        )
    assert len(find_siblings(graph)) == count


def test_whoever_has_values_is_told_how_to_join_them():
    graph = parse(GATED)
    for value in graph.params.values():
        value.weight = None
    after = clone(graph)
    assert fuse_siblings(after, origin="here") == []
    assert fuse_siblings(after, origin="here", need_weights=False) == [
        Fusion("gate.fused", ("gate", "up"), "mlp")
    ]
    rng = np.random.default_rng(0)
    params = {n: rng.normal(size=[a.size for a in v.type]) for n, v in graph.params.items()}
    fused = np.concatenate([params["gate"], params["up"]])
    joined = {"down": params["down"], "gate.fused": fused}
    inputs = {"x": rng.normal(size=(3, 4))}
    assert relative(run(after, joined, inputs)["y"], run(graph, params, inputs)["y"]) < 1e-14


# --- laws


@settings(max_examples=examples(20, 100))
@given(seed=st.integers(0, 2**24 - 1))
def test_laws(seed):
    laws.check_pass(ITEM, with_sources(random_graph(seed, steps=(feed_forward, experts))))
