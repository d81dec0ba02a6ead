"""Wrong rewrites of what ST-MoE adds: policies, priorities, biases, losses of weight, buckets."""

from __future__ import annotations

from collections.abc import Callable

from moecc.ir import Node, Value
from moecc.ir.moe import emit_rescaled
from moecc.ir.ops.slots import operands_by_word
from moecc.ir.structure import replace_value

from .rewriting import before, each, exchange, named, set_attr

# --- slots


def without(word: str, reason: str) -> Callable[[Node], int]:
    """Return the rewrite that leaves out what ``assign_slots`` is given under `word`."""

    def rewrite(node):
        given = operands_by_word(node.operands, node.attrs)
        if word not in given:
            return 0
        left = {n: v for n, v in given.items() if n != word}
        attrs = {**node.attrs, "using": tuple(left)}
        made = before(node).assign_slots(node.operands[0], *left.values(), **attrs)
        return swap(node, made)

    rewrite.__doc__ = reason
    rewrite.__name__ = f"place_without_{word}"
    return rewrite


def swap(node: Node, *values: Value) -> int:
    """Replace all results of `node` by `values`; ragged extents follow."""
    for old, new in zip(node.results, values, strict=True):
        replace_value(old, new)
    node.erase()
    return 1


def capacity_of_assignments(node: Node) -> int:
    """The factor multiplies choices where it should multiply tokens, as in V-MoE."""
    bounded = node.attrs["slots"] == "capacity"
    return set_attr(node, "convention", "assignments") if bounded else 0


def no_least_capacity(node: Node) -> int:
    """Small groups have no minimum of slots."""
    return set_attr(node, "minimum", 1) if node.attrs["slots"] == "capacity" else 0


def no_multiple(node: Node) -> int:
    """The capacity is not raised to a multiple."""
    return set_attr(node, "multiple", 1) if node.attrs["slots"] == "capacity" else 0


def experts_take_twice_as_many(node: Node) -> int:
    """The capacity of expert choice is that of two experts a token."""
    return set_attr(node, "capacity_factor", 2 * node.attrs["capacity_factor"])


# --- choices and gates


def threshold_of_the_raw_ratio(node: Node) -> int:
    """A threshold on renormalised gates is read as a ratio to the first: 0.2 becomes 1/6."""
    threshold = node.attrs["threshold"]
    return set_attr(node, "threshold", threshold / (1 + threshold))


def choose_without_the_bias(node: Node) -> int:
    """The bias of loss-free balancing is forgotten."""
    if not node.attrs["using"]:
        return 0
    attrs = {**node.attrs, "using": ()}
    return swap(node, *before(node).node("route", node.operands[0], **attrs).results)


def weigh_by_the_bias(node: Node) -> int:
    """The bias is added to the logits, so that the gates have it, too."""
    if not node.attrs["using"]:
        return 0
    b = before(node)
    attrs = {**node.attrs, "using": ()}
    return swap(node, *b.node("route", b.add(*node.operands), **attrs).results)


def softmax_before_the_router(node: Node) -> int:
    """Logits are made probabilities twice: by the caller, and by route."""
    if node.attrs["using"]:
        return 0
    b, logits = before(node), node.operands[0]
    attrs = dict(node.attrs)
    probabilities = b.softmax(logits, axis=attrs["axis"])
    return swap(node, *b.node("route", probabilities, **attrs).results)


def hash_with_another_seed(node: Node) -> int:
    return set_attr(node, "seed", node.attrs["seed"] + 1)


def combine_without_gates(node: Node) -> int:
    """Every expert that saw a token counts fully."""
    rows, experts, slots, gates = node.operands
    b = before(node)
    ones = b.broadcast(b.constant(value=1.0, dtype=gates.type.dtype.name), gates)
    return exchange(node, b.combine(rows, experts, slots, ones))


def rescale_after_a_drop(node: Node) -> int:
    """What is left of the gates is scaled up, as the paper does not."""
    rows, experts, slots, gates = node.operands
    b = before(node)
    return exchange(node, b.combine(rows, experts, slots, emit_rescaled(b, gates, slots)))


# --- T5's buckets


def distances_the_other_way(node: Node) -> int:
    """The bucket of query minus key becomes that of key minus query."""
    b = before(node)
    zero = b.constant(value=0.0, dtype=node.operands[0].type.dtype.name)
    negated = [b.sub(zero, v) for v in node.operands]
    return exchange(node, b.relative_buckets(*negated, **node.attrs))


def one_direction_for_both(node: Node) -> int:
    """An encoder's buckets are counted as a decoder's."""
    return set_attr(node, "bidirectional", False)


def buckets_up_to_another_distance(node: Node) -> int:
    return set_attr(node, "max_distance", 2 * node.attrs["max_distance"])


MUTANTS = named(
    each(without("keep", "What the policy left out gets a slot."), "assign_slots"),
    each(without("mask", "Padding takes slots."), "assign_slots"),
    each(without("priority", "Tokens take their turns by position."), "assign_slots"),
    each(capacity_of_assignments, "assign_slots"),
    each(no_least_capacity, "assign_slots"),
    each(no_multiple, "assign_slots"),
    each(experts_take_twice_as_many, "expert_choice"),
    each(threshold_of_the_raw_ratio, "keep_choices"),
    each(choose_without_the_bias, "route"),
    each(weigh_by_the_bias, "route"),
    each(softmax_before_the_router, "route"),
    each(hash_with_another_seed, "hash_experts"),
    each(combine_without_gates, "combine"),
    each(rescale_after_a_drop, "combine"),
    each(distances_the_other_way, "relative_buckets"),
    each(one_direction_for_both, "relative_buckets"),
    each(buckets_up_to_another_distance, "relative_buckets"),
)
