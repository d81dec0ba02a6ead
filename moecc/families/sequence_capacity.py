"""A bound on the tokens of one sequence that an expert takes, as switch_transformers has it.

The capacity of ``assign_slots`` counts in groups of so many tokens, and the length of a sequence is
not known when a graph is built.  So the count is made of other operations: a token's turn at its
expert is the number of tokens up to it that chose the same one, and ``assign_slots`` keeps turns up
to the bound.
"""

from __future__ import annotations

from moecc.families.configs import Experts
from moecc.ir.builder import Builder
from moecc.ir.graph import Node, Value
from moecc.rewrite import P, match

NEXT = "kv_seq"

_WITHIN = P.broadcast(P.less(P.any("turn"), P.constant(value=P.attr("bound"))), P.any("like"))
"""Whether a turn lies within the bound."""


def emit_sequence_capacity(builder: Builder, experts: Experts, chosen: Value) -> Value:
    """Return which choices lie within the bound, ``pred[batch, seq, choice=1]``.

    Args:
      builder: where the operations go.
      experts: with top-1 routing and a `sequence_capacity`.
      chosen: the expert of each token, ``[batch, seq, choice=1]``.
    """
    hot = builder.one_hot(chosen, into=(("expert", experts.count),))
    # Numbers of some hundred tokens are no whole numbers in bfloat16.
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
    """Return the bound that the choices of an ``assign_slots`` are kept within, or 0."""
    kept = next((v.node for v in slots.operands[1:] if v.node is not None), None)
    found = None if kept is None else match(_WITHIN, kept)
    if found is None:
        return 0
    return int(found.attr("bound"))
