"""Rewrites in place that ask who else uses the value inside, and forget that it may be returned."""

from __future__ import annotations

from moecc.ir import Node, Value
from moecc.ir.structure import replace_value
from moecc.rewrite import P, Pattern

from .rewriting import before, each, exchange, maker, named, set_attr


def used_by(value: Value, node: Node) -> bool:
    """Whether no other node uses `value`: the question of these mutants, who forget outputs."""
    return all(user in (node, value.graph.terminator) for user in value.users)


def fold_a_factor_into_what_is_returned(node: Node) -> int:
    """The factor goes to the product's weight, in place."""
    product = maker(node.operands[0], "contract")
    if product is None or not used_by(product.result, node):
        return 0
    product.set_operand(1, before(product).scale(product.operands[1], by=node.attrs["by"]))
    return exchange(node, product.result)


def join_two_factors_in_the_first(node: Node) -> int:
    """scale(scale(x)) becomes the inner one, with the product of the factors."""
    inner = maker(node.operands[0], "scale")
    if inner is None or not used_by(inner.result, node):
        return 0
    set_attr(inner, "by", inner.attrs["by"] * node.attrs["by"])
    return exchange(node, inner.result)


def activate_what_is_returned(node: Node) -> int:
    """An activation is fused into its product: whoever returns the product gets it activated."""
    product = maker(node.operands[0], "contract")
    if product is None or not (used_by(product.result, node) and product.result.is_output):
        return 0
    replace_value(product.result, node.result)
    node.set_operand(0, product.result)
    return 1


def drop_a_bias_that_cancels(node: Node) -> int:
    """(a + b) − b becomes a, and so does the sum itself."""
    total = maker(node.operands[0], "add")
    if total is None or not used_by(total.result, node):
        return 0
    a, b = total.operands
    if b is not node.operands[1] or a.type != total.result.type:
        return 0
    return exchange(node, a) + exchange(total, a)


MUTANTS = named(
    each(fold_a_factor_into_what_is_returned, "scale"),
    each(join_two_factors_in_the_first, "scale"),
    each(activate_what_is_returned, "silu", "relu", "gelu", "gelu_tanh"),
    each(drop_a_bias_that_cancels, "sub"),
)

_product = P.contract(P.any("x"), P.param("w"))

LIKE: dict[str, Pattern] = {
    "fold_a_factor_into_what_is_returned": P.scale(_product),
    "join_two_factors_in_the_first": P.scale(P.scale(P.any("x"))),
    "activate_what_is_returned": P.op(("silu", "relu", "gelu", "gelu_tanh"), _product),
    "drop_a_bias_that_cancels": P.sub(P.add(P.any("a"), P.any("b")), P.any("b")),
}
"""What each of them looks for, so that graphs have it."""
