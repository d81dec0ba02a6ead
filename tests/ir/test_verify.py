"""The verifier accepts every graph that is built, and catches every way to break one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moecc.ir import BF16, F32, Graph, VerifyError, parse, tensor, verify
from moecc.ir.verify import MAX_PROBLEMS
from moecc.testing import graphs

TEXT = """moecc 1
graph g {
  input %x : f32[batch=B, embed=4]
  input %other : f32[batch=B, embed=4]
  param %w : f32[mlp=6, embed=4]
  param %r : f32[expert=3, embed=4]
  %h = contract %x, %w {over=embed} : f32[batch=B, mlp=6] @layers.0.ffn
  %a = silu %h : f32[batch=B, mlp=6] @layers.0.ffn by test/rule
  %s = add %a, %h : f32[batch=B, mlp=6]
  %l = contract %x, %r {over=embed} : f32[batch=B, expert=3]
  %e, %gates = route %l {top_k=2} : i32[batch=B, choice=2], f32[batch=B, choice=2]
  %p = assign_slots %e {tokens=batch, experts=3} : i32[batch=B, choice=2]
  %rows = dispatch %x, %e, %p : f32[group=1, expert=3, slot=ragged(%p), embed=4]
  %y = combine %rows, %e, %p, %gates : f32[batch=B, embed=4]
  output s = %s
  output y = %y
}
"""


def made_by(graph, name):
    return graph.value(name).node


def other_graph_value():
    return Graph().input("alien", tensor(F32, batch="B", mlp=6))


def use_before_definition(g):
    made_by(g, "a").move_before(made_by(g, "h"))


def use_of_another_graphs_value(g):
    made_by(g, "a").set_operand(0, other_graph_value())


def lost_use(g):
    del g.value("h").users[made_by(g, "a")]


def false_user(g):
    g.value("x").users[made_by(g, "s")] = 1


def dead_user(g):
    node = made_by(g, "s")
    g.drop_output("s")
    node.erase()
    g.value("a").users[node] = 1


def operand_changed_behind_the_back(g):
    made_by(g, "a").operands[0] = g.value("s")


def wrong_result_type(g):
    g.value("s").type = tensor(BF16, batch="B", mlp=6)


def stale_type_after_an_attribute_changed(g):
    made_by(g, "e").attrs["top_k"] = 1


def wrong_attribute_kind(g):
    made_by(g, "e").attrs["top_k"] = "two"


def unknown_attribute(g):
    made_by(g, "a").attrs["axis"] = "mlp"


def missing_attribute(g):
    del made_by(g, "h").attrs["over"]


def missing_default(g):
    del made_by(g, "e").attrs["gates"]


def too_few_operands(g):
    node = made_by(g, "s")
    del g.value("h").users[node]
    node.operands.pop()


def slots_of_nothing(g):
    g.value("e").users[made_by(g, "rows")] += 1
    del g.value("p").users[made_by(g, "rows")]
    made_by(g, "rows").operands[2] = g.value("e")


def no_output(g):
    g.drop_output("s")
    g.drop_output("y")


def wrong_count(g):
    g.node_count += 1


def broken_link(g):
    made_by(g, "s")._prev = g.terminator


def result_of_another_node(g):
    made_by(g, "s").results = (g.value("s"),)
    g.value("s").node = made_by(g, "a")


def renamed_behind_the_back(g):
    g.value("s").name = "h"


def name_of_nothing(g):
    g._names["ghost"] = other_graph_value()


def input_listed_under_another_name(g):
    g.inputs["z"] = g.inputs.pop("other")


def extent_of_another_graph(g):
    g.value("rows").type = parse(TEXT).value("rows").type


def unsayable_graph_name(g):
    g.name = "two words"


def unsayable_output_name(g):
    g.set_output("my output", g.value("s"))


def unsayable_location(g):
    made_by(g, "s").loc = "layers 0"


def unsayable_origin(g):
    made_by(g, "s").origin = "my pass"


CORRUPTIONS = [
    (use_before_definition, "%h is used before it is defined"),
    (use_of_another_graphs_value, "%alien is used before it is defined"),
    (lost_use, "the use list of %h is wrong"),
    (false_user, "%x lists a user that does not use it: %s = add"),
    (dead_user, "%a lists a user that is not in the graph"),
    (operand_changed_behind_the_back, "the use list of %s is wrong"),
    (wrong_result_type, "the type is not the one inferred from the operands"),
    (stale_type_after_an_attribute_changed, "the type is not the one inferred from the operands"),
    (wrong_attribute_kind, "attribute 'top_k' of route is wrong"),
    (unknown_attribute, "silu has no attribute 'axis'"),
    (missing_attribute, "contract needs the attribute 'over'"),
    (missing_default, "the attributes are not complete"),
    (too_few_operands, "add takes other operands"),
    (slots_of_nothing, "slots come from assign_slots or expert_choice"),
    (no_output, "the graph has no output"),
    (wrong_count, "the graph counts 9 nodes and has 8"),
    (broken_link, "the links of the list of nodes disagree"),
    (result_of_another_node, "a result belongs to another node"),
    (renamed_behind_the_back, "the name %h leads to another value"),
    (name_of_nothing, "names for values that are not in it"),
    (input_listed_under_another_name, "%other is listed as %z"),
    (extent_of_another_graph, "the type of %rows refers to %p, which is not in the graph"),
    (unsayable_graph_name, "'two words' is not a valid name of the graph"),
    (unsayable_output_name, "'my output' is not a valid name of the output"),
    (unsayable_location, "the location 'layers 0' has a space"),
    (unsayable_origin, "'my pass' is not a valid pass and rewrite"),
]


@pytest.mark.parametrize(
    ("corrupt", "message"), CORRUPTIONS, ids=lambda c: getattr(c, "__name__", "")
)
def test_each_corruption_is_named(corrupt, message):
    graph = parse(TEXT)
    corrupt(graph)
    with pytest.raises(VerifyError) as caught:
        verify(graph)
    assert any(message in str(p) for p in caught.value.problems), str(caught.value)


def test_all_problems_are_reported_up_to_a_limit():
    graph = Graph()
    x = graph.input("x", tensor(F32, batch="B"))
    for _ in range(3 * MAX_PROBLEMS):
        graph.append("relu", [x]).results[0].type = tensor(BF16, batch="B")
    graph.set_output("x", x)
    with pytest.raises(VerifyError) as caught:
        verify(graph)
    assert len(caught.value.problems) == MAX_PROBLEMS


def test_an_empty_graph_needs_an_output():
    with pytest.raises(VerifyError, match="no output"):
        verify(Graph())


@given(graphs(), st.data())
def test_a_random_graph_with_a_lost_use_is_caught(graph, data):
    used = [v for n in graph for v in n.operands] + list(graph.outputs.values())
    value = data.draw(st.sampled_from(used), label="value")
    user = data.draw(st.sampled_from(list(value.users)), label="user")
    del value.users[user]
    with pytest.raises(VerifyError, match="the use list of"):
        verify(graph)
