"""What patterns match, what they capture, and what they say when they do not."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from moecc.errors import InputError, UsageError
from moecc.ir import F32, Builder, Graph, tensor
from moecc.rewrite import Misses, P, fits, match
from moecc.rewrite.pattern import LeafPattern, roots
from moecc.testing import graphs


def start(**axes):
    graph = Graph()
    return graph, Builder(graph), graph.input("x", tensor(F32, batch="B", **axes))


class Ffn:
    """A gated block whose product has the operands as the text says."""

    def __init__(self):
        self.graph, b, self.x = start(embed=4)
        self.gate, self.up = (
            self.graph.param(name, tensor(F32, mlp=8, embed=4)) for name in ("gate", "up")
        )
        self.a = b.contract(self.x, self.gate, over="embed", name="a")
        self.s = b.silu(self.a)
        self.u = b.contract(self.x, self.up, over="embed")
        self.m = b.mul(self.u, self.s)
        self.graph.set_output("y", self.m)


@pytest.fixture
def ffn():
    return Ffn()


X = P.any("x")
GLU = P.mul(
    P.silu(P.contract(X, P.param("gate"), over="embed")),
    P.contract(X, P.param("up"), over="embed").named("up_product"),
)


def reason(pattern, root):
    """Return why `pattern` does not match at `root`."""
    misses = Misses()
    assert match(pattern, root.node, misses, "rule") is None
    return misses.best["rule"].reason


def matched(pattern, root):
    return match(pattern, root.node) is not None


def test_captures_across_commutative_operands(ffn):
    found = match(GLU, ffn.m.node)
    assert found.value("x") is ffn.x
    assert found.value("gate") is ffn.gate
    assert found.value("up") is ffn.up
    assert found.node("up_product") is ffn.u.node
    assert found.value("up_product") is ffn.u
    assert set(found.nodes) == set(ffn.graph)
    assert found.root is found.nodes[0] is ffn.m.node


def test_a_name_of_two_attributes_is_one_attribute():
    _, b, x = start()
    same = b.scale(b.scale(x, by=2.0), by=2.0)
    other = b.scale(b.scale(x, by=2.0), by=3.0)
    twice = P.scale(P.scale(X, by=P.attr("by")), by=P.attr("by"))
    assert matched(twice, same)
    assert "expected 3.0 as elsewhere" in reason(twice, other)


def test_only_used_here_allows_users_inside_the_match():
    graph, b, x = start()
    inner = b.tanh(x, name="inner")
    root = b.mul(inner, b.sigmoid(inner))
    tanh = P.tanh(X).only_used_here().named("t")
    pattern = P.mul(tanh, P.sigmoid(tanh))
    assert matched(pattern, root)
    user = b.neg(inner)
    assert "%inner has 3 users, one of them elsewhere: %v" in reason(pattern, root)
    user.node.erase()
    graph.set_output("inner", inner)
    assert "%inner is also an output" in reason(pattern, root)


def test_attributes(ffn):
    assert matched(P.contract(P.any(), P.any(), over=("embed",)), ffn.a)
    assert matched(P.contract(P.any(), P.any(), over=lambda over: len(over) == 1), ffn.a)
    assert "('embed',), expected ('mlp',)" in reason(P.contract(..., over="mlp"), ffn.a)
    long = P.attr("over", where=lambda over: len(over) > 1, why="is too short")
    assert "is too short" in reason(P.contract(..., over=long), ffn.a)


def test_alternatives_are_tried_again_when_what_follows_fails(ffn):
    # The first alternative matches too, but binds x to what the second operand is not made of.
    choice = P.any("v") | P.contract(P.any("v"), P.any())
    pattern = P.mul(choice, P.silu(P.contract(P.any("v"), P.any())))
    found = match(pattern, ffn.m.node)
    assert found.value("v") is ffn.x


def test_alternatives_are_tried_in_their_order():
    _, b, x = start()
    scale, neg = b.scale(x, by=2.0), b.neg(x)
    either = P.scale(X, by=3.0) | P.scale(X, by=P.attr("by")) | P.neg(X)
    found = fits(either, scale.node)
    assert found.attr("by") == 2.0
    assert found.root is scale.node
    assert "by" not in fits(either, neg.node)
    assert fits(either, b.add(scale, neg).node) is None


def test_leaves(ffn):
    assert matched(P.contract(P.input(), P.param()), ffn.a)
    assert "is an input, expected a parameter" in reason(P.contract(P.param(), P.any()), ffn.a)
    assert "expected an input" in reason(P.silu(P.input()), ffn.s)
    wide = P.any(where=lambda v: v.type.rank > 2, why="has too few axes")
    assert reason(P.silu(wide), ffn.s) == "%a has too few axes"


def test_results_of_a_node():
    _, b, logits = start(expert=4)
    _, gates = b.route(logits, top_k=2)
    root = b.neg(gates)
    assert matched(P.neg(P.route(...).result(1)), root)
    assert "is result 1 of its node, expected 0" in reason(P.neg(P.route(...)), root)


def test_mistakes_in_a_pattern_are_told():
    with pytest.raises(UsageError, match="did you mean 'over'"):
        P.contract(P.any(), P.any(), ovr="embed")
    with pytest.raises(UsageError, match=r"expected: 2 \(a, b\)"):
        P.add(P.any())
    with pytest.raises(UsageError, match="found: 3"):
        P.add(P.any(), P.any(), P.any())
    with pytest.raises(InputError, match="unknown operation 'siluu'"):
        P.siluu(P.any())
    with pytest.raises(UsageError, match="are patterns"):
        P.add(P.any(), 3)
    with pytest.raises(UsageError, match="begins with an operation"):
        roots(P.any() | P.neg(P.any()))


@given(graph=graphs(), data=st.data())
def test_what_is_there_matches(graph, data):
    """A pattern read off a graph, operands exchanged at will, matches where it was read.

    The match need not be the one that was read (both operands of a sum may suit), but it is one.
    """
    nodes = list(graph)
    assume(nodes)
    root = data.draw(st.sampled_from(nodes))
    value = data.draw(st.sampled_from(root.results))
    pattern = _pattern_of(value, 3, data, {})
    found = match(pattern, root)
    assert found is not None
    assert _fits(pattern, value, found)


def _fits(pattern, value, found):
    """Whether what a match says holds, by the plainest reading of the pattern."""
    if isinstance(pattern, LeafPattern):
        return pattern.name is None or found.value(pattern.name) is value
    node = value.node
    if node is None or node.op not in pattern.ops or value.index != pattern.index:
        return False
    orders = [node.operands, node.operands[::-1]] if node.op.commutative else [node.operands]
    return any(
        all(_fits(p, v, found) for p, v in zip(pattern.operands, operands, strict=True))
        for operands in orders
    )


def _pattern_of(value, depth, data, names):
    """Return a pattern of the node of `value` and of some above it; `names` are of the others."""
    node, operands = value.node, []
    for operand in node.operands:
        if operand.node is not None and depth and data.draw(st.booleans()):
            operands.append(_pattern_of(operand, depth - 1, data, names))
        else:
            operands.append(P.any(names.setdefault(operand, f"v{len(names)}")))
    if node.op.commutative and data.draw(st.booleans()):
        operands.reverse()
    return P.op(node.op.name, *operands, **node.attrs).result(value.index)
