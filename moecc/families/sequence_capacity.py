"""A bound on the tokens of one sequence per expert, as in switch_transformers.

The capacity of ``assign_slots`` counts in groups of a fixed number of tokens, but the length of a
sequence is unknown when a graph is built.  So it is built of other operations: a token's position
at its expert is the number of tokens up to it that chose the same one, and ``assign_slots`` keeps
positions up to the bound.
"""

from __future__ import annotations

from moecc.families.configs import Experts
from moecc.ir.builder import Builder
from moecc.ir.graph import Node, Value
from moecc.rewrite import P, match

NEXT = "kv_seq"

_WITHIN = P.broadcast(P.less(P.any("turn"), P.constant(value=P.attr("bound"))), P.any("like"))
"""Whether a position is within the bound."""


def emit_sequence_capacity(builder: Builder, experts: Experts, chosen: Value) -> Value:
    """Return which choices are within the bound, ``pred[batch, seq, choice=1]``.

    Args:
      builder: where operations are appended.
      experts: with top-1 routing and a `sequence_capacity`.
      chosen: the expert of each token, ``[batch, seq, choice=1]``.
    """
    hot = builder.one_hot(chosen, into=(("expert", experts.count),))
    # bfloat16 does not represent all integers above 256 exactly.
    mine = builder.cast(builder.sum(hot, axes="choice"), dtype="f32")
    here = builder.positions(chosen, axis="seq", name="positions")
    there = builder.rename(here, axis="seq", to=NEXT)
    before = builder.cast(builder.causal(here, there), dtype="f32")
    others = builder.rename(mine, axis="seq", to=NEXT)
    counts = builder.contract(others, before, over=NEXT, name="counts")
    turn = builder.sum(builder.mul(counts, mine), axes="expert", name="turn")
    bound = builder.constant(value=experts.sequence_capacity + 0.5, dtype="f32")
    return builder.broadcast(builder.less(turn, bound), chosen, name="kept")


def sequence_capacity_of(slots: Node) -> int:
    """Return the bound on the choices of an ``assign_slots``, or 0."""
    kept = next((v.node for v in slots.operands[1:] if v.node is not None), None)
    found = None if kept is None else match(_WITHIN, kept)
    if found is None:
        return 0
    return int(found.attr("bound"))
