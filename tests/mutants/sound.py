"""Right passes: the laws must not cry wolf."""

from __future__ import annotations

from moecc.ir import BF16, F32, F64, Builder, Graph, Node
from moecc.rewrite import P, Pattern
from moecc.rewrite.passes import Pass
from moecc.weights.arithmetic import Cast, Scale

from .rewriting import EXACT, RewritePass, before, each, exchange, maker, named, nodes
from .upcycling import COPIES, PROTOTYPES, SCALED, SHIFTED, SLICES, TamperedUpcycle


def commute(graph: Graph) -> int:
    """a + b becomes b + a, once."""
    for node in nodes(graph, "add", "mul"):
        swapped = before(node).node(node.op.name, *node.operands[::-1])
        if node.operands[0] is not node.operands[1] and exchange(node, swapped.result):
            return 1
        if swapped.alive and swapped.is_dead:
            swapped.erase()
    return 0


def fold_a_scale_into_its_product(node: Node) -> int:
    """A factor moves into the weight of a product that nothing else uses."""
    product = maker(node.operands[0], "contract")
    if product is None or product.result.only_user is not node:
        return 0
    product.set_operand(1, before(product).scale(product.operands[1], by=node.attrs["by"]))
    return exchange(node, product.result)


def split_the_sum_of_a_product(node: Node) -> int:
    """A contraction becomes the sum of those over two halves of its axis."""
    x, w = node.operands
    over = node.attrs["over"]
    size = x.type[over[0]].size
    if len(over) != 1 or not isinstance(size, int) or size < 2:
        return 0
    parts, b = [], before(node)
    for start, stop in ((0, size // 2), (size // 2, size)):
        halves = [b.slice(v, axis=over[0], start=start, stop=stop) for v in (x, w)]
        parts.append(b.contract(*halves, over=over))
    return exchange(node, b.add(*parts))


def write_silu_out(node: Node) -> int:
    """silu(x) becomes x · sigmoid(x)."""
    x, b = node.operands[0], before(node)
    return exchange(node, b.mul(x, b.sigmoid(x)))


def write_softmax_out(node: Node) -> int:
    """softmax(x) becomes exp(x − logsumexp(x))."""
    x, b = node.operands[0], before(node)
    if maker(x, "mask") is not None:
        return 0
    total = b.logsumexp(x, axes=node.attrs["axis"])
    return exchange(node, b.exp(b.sub(x, total)))


def move_the_gate_before_the_combination(node: Node) -> int:
    """Gates times a factor, and rows divided by it."""
    rows, experts, slots, gates = node.operands
    b = before(node)
    scaled = b.combine(b.scale(rows, by=0.5), experts, slots, b.scale(gates, by=2.0))
    return exchange(node, scaled)


def reassociate(node: Node) -> int:
    """a + (b + c) becomes (a + b) + c: equal in real arithmetic, and not bit for bit."""
    for at in (0, 1):
        a, inner = node.operands[1 - at], maker(node.operands[at], node.op.name)
        # One of the two that are joined first has all the axes.
        if inner is not None and node.result.type in (a.type, inner.operands[0].type):
            b, op = before(node), node.op.name
            left = b.node(op, a, inner.operands[0])
            made = b.node(op, left.result, inner.operands[1])
            if exchange(node, made.result):
                return 1
            # The axes are in another order; `exchange` has erased the node.
            left.erase()
    return 0


def stop_before_the_scale(node: Node) -> int:
    """sg(c · x) becomes c · sg(x): no gradient flows either way."""
    scaled, b = maker(node.operands[0], "scale"), before(node)
    if scaled is None:
        return 0
    stopped = b.stop_gradient(scaled.operands[0])
    return exchange(node, b.scale(stopped, by=scaled.attrs["by"]))


def stop_what_has_no_gradient(node: Node) -> int:
    """A constant, or what was a whole number: a stop_gradient behind it changes nothing."""
    is_constant = not any(v.type.dtype.is_float for v in node.operands)
    is_stopped = any(user.op.name == "stop_gradient" for user in node.result.users)
    if not node.result.type.dtype.is_float or not is_constant or is_stopped:
        return 0
    b = Builder(node.graph, before=node._next)
    users = list(node.result.users)
    stopped = b.stop_gradient(node.result)
    for user in users:
        for at, operand in enumerate(user.operands):
            if operand is node.result:
                user.set_operand(at, stopped)
    return 1


def store_in_a_wider_type(graph: Graph) -> int:
    """Weights go through float64, which holds whatever they were."""
    changed = 0
    for param in graph.params.values():
        weight = param.weight
        if weight is None or isinstance(weight, Cast) or weight.type.dtype not in (F32, BF16):
            continue
        param.weight = Cast(Cast(weight, F64), weight.type.dtype)
        changed += 1
    return changed


def fold_a_scale_into_the_weight(node: Node) -> int:
    """A factor moves into the expression of the weight, where float32 rounds it."""
    product = maker(node.operands[0], "contract")
    if product is None or product.result.only_user is not node:
        return 0
    w = product.operands[1]
    if w.weight is None or not w.weight.type.dtype.is_float:
        return 0
    graph = node.graph
    scaled = graph.param(graph.fresh("scaled"), w.type, Scale(w.weight, node.attrs["by"]))
    product.set_operand(1, scaled)
    return exchange(node, product.result)


LIKE: dict[str, Pattern] = {
    "reassociate": P.add(P.any(), P.add(P.any(), P.any())),
    "fold_a_scale_into_its_product": P.scale(P.contract(P.any(), P.any())),
    "stop_what_has_no_gradient": P.mul(P.any(), P.constant()),
    "write_silu_out": P.silu(P.any()),
    "stop_before_the_scale": P.add(P.any(), P.stop_gradient(P.scale(P.any()))),
    "fold_a_scale_into_the_weight": P.scale(
        P.contract(P.any(), P.param(where=lambda w: w.weight is not None))
    ),
}
"""What the rarer ones look for, so that graphs have it."""

SOUND: dict[str, Pass] = {
    **named(
        commute,
        each(fold_a_scale_into_its_product, "scale"),
        each(split_the_sum_of_a_product, "contract"),
        each(write_silu_out, "silu"),
        each(write_softmax_out, "softmax"),
        each(move_the_gate_before_the_combination, "combine"),
        each(reassociate, "add", "mul"),
        each(stop_before_the_scale, "stop_gradient"),
        each(stop_what_has_no_gradient, "constant", "cast", "one_hot"),
        each(fold_a_scale_into_the_weight, "scale"),
    ),
    "store_in_a_wider_type": RewritePass(store_in_a_wider_type, EXACT),
    "commute_and_promise_exact": RewritePass(commute, EXACT),
    "upcycle": COPIES,
    **{
        f"upcycle_{name}": TamperedUpcycle(item, lambda graph: 0)
        for name, item in {
            "in_slices": SLICES,
            "into_prototypes": PROTOTYPES,
            "with_a_scale_and_a_sublayer": SCALED,
            "with_a_shift_and_a_sublayer": SHIFTED,
        }.items()
    },
}
"""Right passes by name."""
