"""Wrong rewrites of feed-forward blocks, and of values that have other users."""

from __future__ import annotations

from moecc.ir import Graph, Node
from moecc.ir.structure import replace_value

from .rewriting import before, each, exchange, maker, named

ACTIVATIONS = ("silu", "relu", "gelu", "gelu_tanh")


def swap_gate_and_up(node: Node) -> int:
    """act(gate) · up becomes gate · act(up)."""
    for act_at in (0, 1):
        act, other = node.operands[act_at], node.operands[1 - act_at]
        made, up = maker(act, *ACTIVATIONS), maker(other, "contract")
        if made is not None and up is not None:
            b = before(node)
            swapped = b.mul(b.node(made.op.name, other).result, made.operands[0])
            return exchange(node, swapped)
    return 0


def drop_the_output_bias(node: Node) -> int:
    """A bias added after a contraction is forgotten."""
    for at in (0, 1):
        product, bias = node.operands[at], node.operands[1 - at]
        if bias.is_param and maker(product, "contract") is not None:
            return exchange(node, product)
    return 0


def double_the_residual(node: Node) -> int:
    """x + f(x) becomes x + (x + f(x))."""
    a, _ = node.operands
    again = before(node).add(*node.operands)
    return exchange(node, before(node).add(a, again)) if again.type == node.result.type else 0


def scale_the_gate_instead_of_down(node: Node) -> int:
    """A factor on the block's output moves inside its activation, which is not homogeneous."""
    down = maker(node.operands[0], "contract")
    hidden = maker(down.operands[0], *ACTIVATIONS, "mul") if down is not None else None
    act = hidden
    if hidden is not None and hidden.op.name == "mul":
        act = next((m for v in hidden.operands if (m := maker(v, *ACTIVATIONS))), None)
    if down is None or act is None:
        return 0
    act.set_operand(0, before(act).scale(act.operands[0], by=node.attrs["by"]))
    return exchange(node, down.result)


def approximate_the_activation(node: Node) -> int:
    """GELU becomes its tanh approximation."""
    return exchange(node, before(node).gelu_tanh(node.operands[0]))


def transpose_a_square_weight(node: Node) -> int:
    """The contraction runs over the other axis of a square weight, as sizes allow it."""
    x, w = node.operands
    over = node.attrs["over"]
    others = [a for a in w.type.axes if a.name not in x.type]
    if len(over) != 1 or len(others) != 1 or others[0].size != w.type[over[0]].size:
        return 0
    other, b = others[0].name, before(node)
    wrong = b.contract(b.rename(x, axis=over[0], to=other), w, over=other)
    return exchange(node, b.rename(wrong, axis=over[0], to=other))


# --- users


def fold_a_scale_into_a_shared_product(node: Node) -> int:
    """A factor moves into a product's weight although the product has another user."""
    product = maker(node.operands[0], "contract")
    if product is None:
        return 0
    w = before(product).scale(product.operands[1], by=node.attrs["by"])
    product.set_operand(1, w)
    return exchange(node, product.result)


def activate_a_product_for_all_its_users(node: Node) -> int:
    """An activation is fused into the product before it, which has another user."""
    product = maker(node.operands[0], "contract")
    if product is None or product.result.only_user is node:
        return 0
    fused = before(product).contract(*product.operands, over=product.attrs["over"])
    fused = before(product).node(node.op.name, fused).result
    return exchange(node, product.result) + exchange(product, fused)


def merge_nodes_with_other_attributes(graph: Graph) -> int:
    """Common subexpressions, attributes not compared."""
    seen = {}
    merged = 0
    for node in graph:
        first = seen.setdefault((node.op, *map(id, node.operands)), node)
        same_types = [v.type for v in first.results] == [v.type for v in node.results]
        if first is not node and same_types:
            for old, new in zip(node.results, first.results, strict=True):
                replace_value(old, new)
            node.erase()
            merged += 1
    return merged


def remove_an_output(graph: Graph) -> int:
    """Dead-code elimination that takes an output's node for dead."""
    for name, value in list(graph.outputs.items())[1:]:
        graph.drop_output(name)
        if value.node is not None and value.node.is_dead:
            value.node.erase()
        return 1
    return 0


MUTANTS = named(
    each(swap_gate_and_up, "mul"),
    each(drop_the_output_bias, "add"),
    each(double_the_residual, "add"),
    each(scale_the_gate_instead_of_down, "scale"),
    each(approximate_the_activation, "gelu"),
    each(transpose_a_square_weight, "contract"),
    each(fold_a_scale_into_a_shared_product, "scale"),
    each(activate_a_product_for_all_its_users, *ACTIVATIONS),
    merge_nodes_with_other_attributes,
    remove_an_output,
)
