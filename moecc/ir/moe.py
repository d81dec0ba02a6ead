"""The routing around an expert block, shared by imported models and passes.

A mixture-of-experts layer is the router's product, ``route``, ``assign_slots``, ``dispatch``, the
expert's own operations lifted over the expert axis, and ``combine``.  Families and passes use the
same functions, so that an upcycled graph and the graph read back from its checkpoint are the same
graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Required, TypedDict, Unpack

from moecc.errors import InputError
from moecc.ir.attributes import Convention, Gates, Order, Rounding, Slots, Using
from moecc.ir.builder import Builder
from moecc.ir.graph import Value

Finish = Callable[[Value], Value]
"""Combines the experts' output rows into tokens."""

SlotOperands = Callable[[Value, Value, Value], Mapping[Using, Value]]
"""Makes further operands of ``assign_slots``, by word, from logits, experts and gates."""


class BoundOptions(TypedDict, total=False):
    """How tokens are cut into groups, and how a capacity becomes a whole number."""

    groups: int
    group_size: int
    rounding: Rounding
    minimum: int
    multiple: int
    cap: bool


class ExpertChoiceOptions(BoundOptions):
    """Attributes of ``expert_choice`` beside the axes and numbers that its operands decide."""

    capacity_factor: Required[float]


class SlotOptions(BoundOptions, total=False):
    """Attributes of ``assign_slots`` beside the axes and numbers that its operands decide."""

    slots: Slots
    capacity_factor: float
    convention: Convention
    order: Order


def emit_routing(
    builder: Builder,
    x: Value,
    router_weight: Value,
    *,
    experts: int,
    top_k: int,
    gates: Gates = "renormalised",
    scale: float = 1.0,
    tokens: tuple[str, ...] = ("batch", "seq"),
    operands: SlotOperands | None = None,
    bias: Value | None = None,
    shift: Value | None = None,
    **assignment: Unpack[SlotOptions],
) -> tuple[Value, Finish]:
    """Route `x` to `experts` experts; return their rows and the function that combines them.

    Args:
      builder: where operations are appended.
      x: the tokens, ``[*tokens, embed]``.
      router_weight: ``[expert, embed]``.
      experts: the number of experts, at least `top_k`.
      top_k: experts per token.
      gates: the gate convention, see ``route``.
      scale: a factor on the gates.
      tokens: the axes of `x` that number tokens, outermost first.
      operands: makes the operands of ``assign_slots`` after the experts: keep, priority, mask.
      bias: ``[expert]``, added for the choice and not for the gates (loss-free balancing).
      shift: ``[expert]``, added to the logits.
      assignment: further attributes of ``assign_slots``: slots, groups, capacity_factor and so on.

    Returns:
      The rows, ``[group, expert, slot, embed]``, and a function from the experts' output rows to
      ``[*tokens, embed]``; it emits ``combine`` at the builder's position when called.

    Raises:
      InputError: operands or attributes are inconsistent.
    """
    over = tuple(n for n in router_weight.type.names if n in x.type and n not in tokens)
    left = [a for a in router_weight.type.axes if a.name not in over]
    if [(a.name, a.size) for a in left] != [("expert", experts)]:
        raise InputError(
            "the router has one row per expert",
            where=f"%{router_weight.name}",
            expected=f"an axis expert={experts} besides those of the tokens, {x.type}",
            found=str(router_weight.type),
        )
    logits = builder.contract(x, router_weight, over=over, precision="f32", name="router")
    if shift is not None:
        logits = builder.add(logits, shift)
    biases = () if bias is None else (bias,)
    chosen, weights = builder.route(
        logits, *biases, top_k=top_k, gates=gates, scale=scale, using=("bias",) if biases else ()
    )
    more = operands(logits, chosen, weights) if operands is not None else {}
    return emit_chosen(
        builder, x, chosen, weights, experts=experts, tokens=tokens, operands=more,
        **assignment,
    )  # fmt: skip


def emit_chosen(
    builder: Builder,
    x: Value,
    chosen: Value,
    gates: Value,
    *,
    experts: int,
    tokens: tuple[str, ...] = ("batch", "seq"),
    operands: Mapping[Using, Value] | None = None,
    **assignment: Unpack[SlotOptions],
) -> tuple[Value, Finish]:
    """Assign slots to experts already chosen; return the rows and the function that combines them.

    Args:
      builder: where operations are appended.
      x: the tokens, ``[*tokens, embed]``.
      chosen: the experts of each token, ``[*tokens, choice]``.
      gates: the weights of their results, with the same axes.
      experts: the number of experts.
      tokens: the axes of `x` that number tokens, outermost first.
      operands: further operands of ``assign_slots``, by word.
      assignment: further attributes of ``assign_slots``: slots, groups, capacity_factor and so on.
    """
    more = operands or {}
    slots = builder.assign_slots(
        chosen, *more.values(), tokens=tokens, experts=experts, using=tuple(more), **assignment
    )
    rows = builder.dispatch(x, chosen, slots)

    def finish(rows_out: Value) -> Value:
        return builder.combine(rows_out, chosen, slots, gates)

    return rows, finish


def emit_shared_gate(builder: Builder, x: Value, gate_weight: Value, shared: Value) -> Value:
    """Return the output of a shared expert times sigmoid(x · gate), as Qwen2-MoE has it.

    Args:
      builder: where the operations go.
      x: the input of the shared expert, ``[batch, seq, embed]``.
      gate_weight: ``[embed]``.
      shared: its output, ``[batch, seq, embed]``.
    """
    gate = builder.sigmoid(builder.contract(x, gate_weight, over=gate_weight.type.names))
    return builder.mul(gate, shared)
