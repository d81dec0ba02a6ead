"""Deliberately wrong passes, each a mistake that somebody has made or could make.

`test_mutants.py` shows that the public strategies and laws catch each of them within 200 examples,
and that the sound rewrites beside them pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

from moecc_passes.upcycle.upcycle import UpcyclePass

from moecc.errors import InputError
from moecc.ir import F32, Builder, Graph, Node, Value, clone
from moecc.ir.replace import infer_again, replace_value
from moecc.pipeline.passes import Context, Pass, PassResult, Preserves
from moecc.weights.arithmetic import Scale
from moecc.weights.draws import Normal

Rewrite = Callable[[Graph], int]
"""Changes a graph in place and returns at how many places."""

EXACT = Preserves("exact")
REASSOCIATION = Preserves("reassociation")
ACTIVATIONS = ("silu", "relu", "gelu", "gelu_tanh")


@dataclass(frozen=True)
class RewritePass(Pass):
    """A pass that applies a function, and promises what it is told to promise."""

    name: ClassVar[str] = "mutant"
    summary: ClassVar[str] = "apply a rewrite that may be wrong"
    rewrite: Rewrite
    promise: Preserves = REASSOCIATION

    @property
    def preserves(self) -> Preserves:
        return self.promise

    def apply(self, graph: Graph, ctx: Context) -> PassResult:
        try:
            self.rewrite(clone(graph))
        except InputError:
            # The types refuse the mistake here; elsewhere they will not.
            return PassResult(changed=False)
        count = self.rewrite(graph)
        return PassResult(changed=count > 0, matched=count)


def nodes(graph: Graph, *ops: str) -> Iterator[Node]:
    """Yield the nodes of the operations `ops`, as they are now."""
    yield from [n for n in graph if n.op.name in ops]


def maker(value: Value, *ops: str) -> Node | None:
    """Return the node that defines `value`, if it is one of the operations `ops`."""
    node = value.node
    return node if node is not None and node.op.name in ops else None


def before(node: Node) -> Builder:
    return Builder(node.graph, loc=node.loc, origin="mutant/rule", before=node)


def exchange(node: Node, value: Value) -> int:
    """Replace the result of `node` by `value`."""
    if value.type != node.result.type:
        return 0
    replace_value(node.result, value)
    node.erase()
    return 1


def set_attr(node: Node, name: str, value: object) -> int:
    """Change an attribute, and infer again what follows."""
    if node.attrs[name] == value:
        return 0
    node.attrs[name] = value
    infer_again(node.graph, [node], start=node)
    return 1


def each(rewrite: Callable[[Node], int], *ops: str) -> Rewrite:
    """Return the rewrite that applies `rewrite` to every node of the operations `ops`."""

    def apply(graph: Graph) -> int:
        return sum(rewrite(n) for n in nodes(graph, *ops) if n.alive)

    apply.__name__ = rewrite.__name__
    return apply


# --- feed-forward blocks


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
    seen: dict[object, Node] = {}
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


# --- axes, masks, positions


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


# --- experts


def gate_off_by_a_percent(node: Node) -> int:
    return set_attr(node, "scale", node.attrs["scale"] * 1.01)


def choose_one_expert_less(node: Node) -> int:
    return set_attr(node, "top_k", max(1, node.attrs["top_k"] - 1))


def do_not_renormalise(node: Node) -> int:
    """Mixtral's gates become Qwen2-MoE's."""
    return set_attr(node, "gates", "softmax") if node.attrs["gates"] == "renormalised" else 0


def reverse_the_experts_but_not_the_router(node: Node) -> int:
    """Choices go to the experts in reverse order."""
    experts = node.operands[0]
    b = before(node)
    last = b.constant(value=float(node.attrs["experts"] - 1), dtype=experts.type.dtype.name)
    reversed_ = b.sub(last, experts)
    if reversed_.type != experts.type:
        return 0
    for user in list(experts.users):
        for at, operand in enumerate(user.operands):
            if operand is experts and user.op.name in ("place", "dispatch", "combine"):
                user.set_operand(at, reversed_)
    return 1


def count_dropped_choices(node: Node) -> int:
    """A capacity is treated as if it dropped nothing."""
    return set_attr(node, "slots", "ragged")


def capacity_off_by_one(node: Node) -> int:
    """Rounded up where it is rounded down."""
    return set_attr(node, "rounding", "ceil") if node.attrs["slots"] == "capacity" else 0


def fill_in_another_order(node: Node) -> int:
    other = {"choice": "token", "token": "choice"}[node.attrs["order"]]
    return set_attr(node, "order", other) if node.attrs["slots"] == "capacity" else 0


def forget_the_groups(node: Node) -> int:
    """Capacities are counted over all tokens."""
    return set_attr(node, "groups", 1) if node.attrs["slots"] == "capacity" else 0


# --- promises


def reassociate(node: Node) -> int:
    """a + (b + c) becomes (a + b) + c: equal in real arithmetic, and not bit for bit."""
    for at in (0, 1):
        a, inner = node.operands[1 - at], maker(node.operands[at], node.op.name)
        if inner is not None and {v.type for v in (a, *inner.operands)} == {node.result.type}:
            b, op = before(node), node.op.name
            left = b.node(op, a, inner.operands[0]).result
            return exchange(node, b.node(op, left, inner.operands[1]).result)
    return 0


def say_nothing_changed(graph: Graph) -> int:
    """Commute an addition, and do not tell."""
    commute(graph)
    return 0


def say_something_changed(graph: Graph) -> int:
    return 1


def negate_twice(graph: Graph) -> int:
    """Sound, and never done."""
    for value in list(graph.outputs.values())[:1]:
        if value.type.dtype.is_float:
            b = Builder(graph)
            name = graph.output_names[0]
            graph.set_output(name, b.neg(b.neg(value)))
            return 1
    return 0


def leave_a_stale_type(graph: Graph) -> int:
    """Change an operand's type and infer nothing again."""
    for node in nodes(graph, "relu", "silu", "neg", "square"):
        x = node.operands[0]
        if x.type.axes:
            name = x.type.axes[0].name
            node.set_operand(0, before(node).rename(x, axis=name, to="stale_"))
            return 1
    return 0


def use_before_definition(graph: Graph) -> int:
    """Insert a node behind its user."""
    for node in nodes(graph, "add", "mul", "contract"):
        made = node.graph.append("stop_gradient", [node.operands[0]])
        node.set_operand(0, made.result)
        return 1
    return 0


MUTANTS: dict[str, Pass] = {
    **{
        m.__name__: RewritePass(m)
        for m in (
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
            each(normalise_along_the_wrong_axis, "softmax"),
            each(rename_the_wrong_axis, "rename"),
            each(merge_in_the_wrong_order, "merge"),
            each(let_a_query_see_one_key_less, "causal"),
            each(exchange_cosine_and_sine, "rotate"),
            each(subtract_the_other_way, "sub"),
            each(forget_eps, "rms_norm", "layer_norm"),
            each(gate_off_by_a_percent, "route"),
            each(choose_one_expert_less, "route"),
            each(do_not_renormalise, "route"),
            each(reverse_the_experts_but_not_the_router, "place"),
            each(count_dropped_choices, "place"),
            each(capacity_off_by_one, "place"),
            each(fill_in_another_order, "place"),
            each(forget_the_groups, "place"),
            say_nothing_changed,
            say_something_changed,
            negate_twice,
            leave_a_stale_type,
            use_before_definition,
        )
    },
    "reassociate_and_promise_exact": RewritePass(each(reassociate, "add", "mul"), EXACT),
}
"""Wrong passes by name; each promises `reassociation` unless its name says otherwise."""

CAUGHT_BY_IDEMPOTENCE = ("negate_twice",)
"""The others may well change their own result."""


# --- upcycling, the pass itself with one thing wrong


@dataclass(frozen=True)
class TamperedUpcycle(Pass):
    """Upcycle, then make a mistake; the promise stays that of upcycle."""

    name: ClassVar[str] = "tampered-upcycle"
    summary: ClassVar[str] = "upcycle wrongly"
    upcycle: UpcyclePass
    tamper: Rewrite

    @property
    def preserves(self) -> Preserves:
        return self.upcycle.preserves

    def apply(self, graph: Graph, ctx: Context) -> PassResult:
        try:
            self.upcycle.apply(clone(graph), ctx)
        except InputError:
            # Neurons that do not divide into slices, for one.
            return PassResult(changed=False)
        result = self.upcycle.apply(graph, ctx)
        if result.changed:
            self.tamper(graph)
        return result


def experts_weights(graph: Graph) -> list[Value]:
    """Return the parameters that upcycling has made or lifted."""
    return [p for p in graph.params.values() if "expert" in p.type and p.weight is not None]


def swap_the_weights_of_gate_and_up(graph: Graph) -> int:
    """Of two lifted weights of one type, each gets what belongs to the other."""
    for a in experts_weights(graph):
        for b in experts_weights(graph):
            if a is not b and a.type == b.type and a.loc == b.loc:
                a.weight, b.weight = b.weight, a.weight
                return 1
    return 0


def forget_the_factor_of_down(graph: Graph) -> int:
    """Slices are not scaled, so that a group adds up to less than the block."""
    scaled = [p for p in experts_weights(graph) if isinstance(p.weight, Scale)]
    for param in scaled:
        param.weight = param.weight.operands[0]
    return len(scaled)


def scale_another_weight_instead_of_down(graph: Graph) -> int:
    """The factor goes to the first weight of the block, before the activation."""
    if not forget_the_factor_of_down(graph):
        return 0
    param = next(p for p in experts_weights(graph) if "mlp" in p.name or "w_" in p.name)
    param.weight = Scale(param.weight, 2.0)
    return 1


def route_members_of_a_group_apart(graph: Graph) -> int:
    """The router's rows are drawn for each expert, not for each virtual group."""
    routers = [p for p in graph.params.values() if p.name.endswith("router.weight")]
    for param in routers:
        param.weight = Normal(param.type.with_dtype(F32), 1.0, 7)
    return len(routers)


COPIES = UpcyclePass(experts=4, top_k=2)
SLICES = UpcyclePass(experts=4, top_k=2, granularity=2)

MUTANTS |= {
    f"upcycle_and_{tamper.__name__}": TamperedUpcycle(upcycle, tamper)
    for upcycle, tamper in (
        (COPIES, swap_the_weights_of_gate_and_up),
        (COPIES, each(do_not_renormalise, "route")),
        (COPIES, each(drop_the_output_bias, "add")),
        (SLICES, forget_the_factor_of_down),
        (SLICES, scale_another_weight_instead_of_down),
        (SLICES, route_members_of_a_group_apart),
        (SLICES, each(choose_one_expert_less, "route")),
    )
}


# --- what is right


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
    rows, experts, place, gates = node.operands
    b = before(node)
    scaled = b.combine(b.scale(rows, by=0.5), experts, place, b.scale(gates, by=2.0))
    return exchange(node, scaled)


SOUND: dict[str, Pass] = {
    **{
        r.__name__: RewritePass(r)
        for r in (
            commute,
            each(fold_a_scale_into_its_product, "scale"),
            each(split_the_sum_of_a_product, "contract"),
            each(write_silu_out, "silu"),
            each(write_softmax_out, "softmax"),
            each(move_the_gate_before_the_combination, "combine"),
            each(reassociate, "add", "mul"),
        )
    },
    "commute_and_promise_exact": RewritePass(commute, EXACT),
    "upcycle": COPIES,
    "upcycle_in_slices": TamperedUpcycle(SLICES, lambda graph: 0),
}
"""Right passes by name: the laws must not cry wolf."""
