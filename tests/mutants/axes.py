"""Wrong rewrites of what has an axis, a mask or a position."""

from __future__ import annotations

from moecc.ir import Node

from .rewriting import before, each, exchange, named, set_attr


def normalise_along_the_wrong_axis(node: Node) -> int:
    """The softmax of scores runs over the queries."""
    axes = [a.name for a in node.operands[0].type.axes if not a.is_ragged]
    others = [n for n in axes if n != node.attrs["axis"]]
    return set_attr(node, "axis", others[-1]) if others else 0


def rename_the_wrong_axis(node: Node) -> int:
    """Of two axes of one size, the other is renamed."""
    type, renamed = node.operands[0].type, node.attrs["axis"]
    twins = [a.name for a in type.axes if a.size == type[renamed].size and a.name != renamed]
    if not twins:
        return 0
    b, x, to = before(node), node.operands[0], node.attrs["to"]
    between = f"between_{node.graph.node_count}"
    swapped = b.rename(x, axis=twins[0], to=between)
    swapped = b.rename(swapped, axis=renamed, to=twins[0])
    swapped = b.rename(swapped, axis=between, to=to)
    # Nothing but the order of the axes is taken from what is right.
    return exchange(node, b.broadcast(swapped, b.rename(x, axis=renamed, to=to)))


def merge_in_the_wrong_order(node: Node) -> int:
    """The last axis becomes the outermost."""
    axes, b = node.attrs["axes"], before(node)
    wrong = b.merge(node.operands[0], axes=axes[::-1], into=node.attrs["into"])
    return exchange(node, wrong)


def let_a_query_see_one_key_less(node: Node) -> int:
    """key ≤ query becomes key < query."""
    one = before(node).constant(value=1.0, dtype=node.operands[0].type.dtype.name)
    node.set_operand(0, before(node).sub(node.operands[0], one))
    return 1


def exchange_cosine_and_sine(node: Node) -> int:
    """The rotary tables are swapped."""
    x, cos, sin = node.operands
    if cos.type != sin.type:
        return 0
    return exchange(node, before(node).rotate(x, sin, cos, axis=node.attrs["axis"]))


def subtract_the_other_way(node: Node) -> int:
    """Subtraction is taken for commutative."""
    return exchange(node, before(node).sub(*node.operands[::-1]))


def forget_eps(node: Node) -> int:
    """A large eps of a norm becomes the usual one."""
    return set_attr(node, "eps", 1e-6)


MUTANTS = named(
    each(normalise_along_the_wrong_axis, "softmax"),
    each(rename_the_wrong_axis, "rename"),
    each(merge_in_the_wrong_order, "merge"),
    each(let_a_query_see_one_key_less, "causal"),
    each(exchange_cosine_and_sine, "rotate"),
    each(subtract_the_other_way, "sub"),
    each(forget_eps, "rms_norm", "layer_norm"),
)
