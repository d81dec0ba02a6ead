"""What ``cse`` merges and ``dce`` erases, and what they leave."""

from hypothesis import given
from moecc_passes.cleanup import CsePass, DcePass

from moecc.ir import F32, Builder, Graph, clone, equal, parse, print_graph, tensor
from moecc.rewrite.passes import Context
from moecc.testing import assert_same, graphs

CONTEXT = Context()


def start():
    graph = Graph()
    return graph, Builder(graph), graph.input("x", tensor(F32, batch="B", embed=4))


def cse(graph):
    return CsePass().apply(graph, CONTEXT)


def ops(graph):
    return [n.op.name for n in graph]


def test_attributes_and_operands_count():
    graph, b, x = start()
    for value in (b.scale(x, by=2.0), b.scale(x, by=3.0), b.neg(x), b.sub(x, b.neg(x))):
        graph.set_output(value.name, value)
    graph.set_output("swapped", b.sub(b.neg(x), x))
    # −x is the only thing that is there more than once.
    assert cse(graph).matched == 2
    assert ops(graph).count("sub") == 2
    assert ops(graph).count("scale") == 2


def test_a_placement_is_merged_while_rows_stay_apart():
    graph, b, x = start()
    logits = graph.input("logits", tensor(F32, batch="B", expert=4))
    experts, gates = b.route(logits, top_k=2)
    other = graph.input("other", x.type)
    for name, tokens in (("y", x), ("z", other)):
        slots = b.assign_slots(experts, tokens="batch", experts=4)
        rows = b.tanh(b.silu(b.dispatch(tokens, experts, slots)))
        graph.set_output(name, b.combine(rows, experts, slots, gates))
    before = clone(graph)
    assert cse(graph).matched == 1
    assert_same(before, graph, exact=True)


def test_parameters_of_one_expression_are_merged_on_demand():
    text = """
moecc 1
graph g {
  input %x : f32[batch=B, embed=4]
  param %a : f32[embed=4] = source("w" : f32[embed=4]) @layers.0.ffn
  param %b : f32[embed=4] = source("w" : f32[embed=4]) @layers.1.ffn
  param %c : f32[embed=4] = source("v" : f32[embed=4]) @layers.1.ffn
  param %d : f32[embed=4]
  param %e : f32[embed=4]
  %p = mul %x, %a : f32[batch=B, embed=4]
  %q = mul %x, %b : f32[batch=B, embed=4]
  %r = mul %q, %c : f32[batch=B, embed=4]
  %s = mul %r, %d : f32[batch=B, embed=4]
  %t = mul %s, %e : f32[batch=B, embed=4]
  output p = %p
  output t = %t
}
"""
    apart, merged = parse(text), parse(text)
    assert cse(apart).matched == 0
    result = CsePass(parameters=True).apply(merged, CONTEXT)
    assert result.stats == {"nodes-merged": 1, "params-merged": 1}
    assert list(merged.params) == ["a", "c", "d", "e"]
    assert_same(apart, merged, exact=True)


def test_dce():
    graph, b, x = start()
    dead = graph.param("dead", x.type)
    graph.param("alone", x.type)
    b.exp(b.mul(b.silu(x), dead))
    graph.set_output("y", b.neg(x))
    result = DcePass().apply(graph, CONTEXT)
    assert ops(graph) == ["neg"]
    assert not graph.params
    assert result.stats == {"nodes-erased": 3, "params-erased": 2}
    assert list(graph.inputs) == ["x"]
    assert not DcePass().apply(graph, CONTEXT).changed


@given(graph=graphs())
def test_doubling_a_graph_is_undone(graph):
    """A second copy of every node, beside the first, is merged into it."""
    cse(graph)
    DcePass(keep_params=True).apply(graph, CONTEXT)
    before = clone(graph)
    image = {}
    for node in list(graph):
        operands = [image.get(v, v) for v in node.operands]
        made = graph.append(node.op, operands, node.attrs)
        image.update(zip(node.results, made.results, strict=True))
    for i, value in enumerate(graph.outputs.values()):
        graph.set_output(f"again{i}", image.get(value, value))
    cse(graph)
    for i, (name, value) in enumerate(before.outputs.items()):
        assert graph.outputs[f"again{i}"] is graph.outputs[name], print_graph(graph)
        assert value.name == graph.outputs[name].name
        graph.drop_output(f"again{i}")
    DcePass(keep_params=True).apply(graph, CONTEXT)
    assert equal(graph, before)
