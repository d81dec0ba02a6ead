"""Wrong rewrites of routing: who goes where, and with what weight."""

from __future__ import annotations

from moecc.ir import Node

from .rewriting import before, each, named, set_attr


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
            if operand is experts and user.op.name in ("assign_slots", "dispatch", "combine"):
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


MUTANTS = named(
    each(gate_off_by_a_percent, "route"),
    each(choose_one_expert_less, "route"),
    each(do_not_renormalise, "route"),
    each(reverse_the_experts_but_not_the_router, "assign_slots"),
    each(count_dropped_choices, "assign_slots"),
    each(capacity_off_by_one, "assign_slots"),
    each(fill_in_another_order, "assign_slots"),
    each(forget_the_groups, "assign_slots"),
)
