"""A bound on the tokens of one sequence that an expert takes, as switch_transformers has it.

The capacity of ``place`` counts in groups of so many tokens, and the length of a sequence is not
known when a graph is built.  So the count is made of other operations: a token's turn at its expert
is the number of tokens up to it that chose the same one, and ``place`` keeps turns up to the bound.
"""

from __future__ import annotations

from moecc.families.configs import Experts
from moecc.ir.builder import Builder
from moecc.ir.graph import Node, Value

NEXT = "kv_seq"


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


def sequence_capacity_of(place: Node) -> int:
    """Return the bound that the choices of a ``place`` are kept within, or 0."""
    kept = next((v.node for v in place.operands[1:] if v.node is not None), None)
    if kept is None or kept.op.name != "broadcast":
        return 0
    less = kept.operands[0].node
    bound = less.operands[1].node if less is not None and less.op.name == "less" else None
    if bound is None or bound.op.name != "constant":
        return 0
    return int(bound.attrs["value"])
