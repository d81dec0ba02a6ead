"""Wrong rewrites that keep every value and lose, or gain, a gradient."""

from __future__ import annotations

from moecc.ir import Node
from moecc.rewrite import P

from .rewriting import before, each, exchange, maker, named


def let_the_gradient_through(node: Node) -> int:
    """A stop_gradient is taken for the identity that its values show."""
    return exchange(node, node.operands[0])


def stop_the_gradient_of_the_residual(node: Node) -> int:
    """x + f(x) trains f alone."""
    a, b = node.operands
    if maker(a, "stop_gradient") or not a.type.dtype.is_float:
        return 0
    return exchange(node, before(node).add(before(node).stop_gradient(a), b))


def stop_the_gradient_of_the_gates(node: Node) -> int:
    """What combine weighs by is held, so that the router learns nothing."""
    rows, experts, place, gates = node.operands
    if maker(gates, "stop_gradient"):
        return 0
    b = before(node)
    return exchange(node, b.combine(rows, experts, place, b.stop_gradient(gates)))


def stop_the_gradient_of_dispatched_rows(node: Node) -> int:
    """Rows in slots are constants to the experts, so that tokens learn nothing through them."""
    if any(user.op.name == "stop_gradient" for user in node.result.users):
        return 0
    b = before(node)
    return exchange(node, b.stop_gradient(b.dispatch(*node.operands)))


def stop_the_gradient_of_the_experts(node: Node) -> int:
    """What experts make of rows in slots is held, so that they learn nothing."""
    rows, *others = node.operands
    if maker(rows, "stop_gradient"):
        return 0
    b = before(node)
    return exchange(node, b.combine(b.stop_gradient(rows), *others))


def stop_the_other_factor(node: Node) -> int:
    """sg(a) · b becomes a · sg(b)."""
    for at in (0, 1):
        stopped = maker(node.operands[at], "stop_gradient")
        if stopped is not None and maker(node.operands[1 - at], "stop_gradient") is None:
            pair = [stopped.operands[0], before(node).stop_gradient(node.operands[1 - at])]
            return exchange(node, before(node).mul(*(pair if at == 0 else pair[::-1])))
    return 0


def stop_the_whole_sum(node: Node) -> int:
    """sg(a) + b becomes sg(a + b)."""
    for at in (0, 1):
        stopped = maker(node.operands[at], "stop_gradient")
        if stopped is not None:
            operands = list(node.operands)
            operands[at] = stopped.operands[0]
            b = before(node)
            return exchange(node, b.stop_gradient(b.add(*operands)))
    return 0


_stopped = P.stop_gradient(P.any())

LIKE = (P.add(_stopped, P.any()), P.mul(P.any(), _stopped), P.sum(P.square(_stopped)))
"""Where the mutants find a stop_gradient, which random operations alone make now and then."""

MUTANTS = named(
    each(let_the_gradient_through, "stop_gradient"),
    each(stop_the_gradient_of_the_residual, "add"),
    each(stop_the_gradient_of_the_gates, "combine"),
    each(stop_the_gradient_of_dispatched_rows, "dispatch"),
    each(stop_the_gradient_of_the_experts, "combine"),
    each(stop_the_other_factor, "mul"),
    each(stop_the_whole_sum, "add"),
)
