"""The kinds of routing of ``upcycle``: what is emitted around the experts of a block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from moecc.analysis.ffn import FFNBlock
from moecc.ir.attributes import Gates
from moecc.ir.builder import Builder
from moecc.ir.graph import Value
from moecc.ir.mixtures import (
    emit_expert_choice,
    emit_hash_routing,
    emit_prototypes,
    emit_rescaled,
    emit_soft_slots,
    emit_unit,
)
from moecc.ir.moe import Finish, SlotOptions, emit_chosen, emit_routing
from moecc.types.tensor import tensor
from moecc.weights.expr import Expr, Full
from moecc_passes.inputs import token_ids

LOOKS_AHEAD = ("expert-choice", "soft")
"""Kinds of routing in which later tokens affect earlier ones; in encoders only."""

NAMES = {"expert-choice": "expert choice", "soft": "a soft mixture"}


@dataclass(frozen=True)
class Router:
    """How the tokens of a block are routed to the experts.

    Attributes:
      kind: token-choice, prototypes, hash, expert-choice or soft.
      weight: the router's weight, ``[expert, embed]``; of a soft mixture ``[expert, slot, embed]``;
        a hash has none.
      experts: the number of experts.
      top_k: experts per token, if the kind has a fixed number.
      gates: the gate convention, as in ``route``.
      gate_scale: the factor on the gates.
      has_bias: whether a bias for loss-free balancing takes part in the choice.
      seed: the seed of the hash.
      assignment: the attributes of ``assign_slots``: slots, capacity_factor and so on.
    """

    kind: str
    weight: Expr | None
    experts: int
    top_k: int
    gates: Gates
    gate_scale: float
    has_bias: bool
    seed: int
    assignment: SlotOptions

    def emit(self, builder: Builder, block: FFNBlock, prefix: str) -> tuple[Value, Finish]:
        """Emit the routing; return the experts' rows and the function that combines their results.

        Args:
          builder: where operations are appended.
          block: the dense block, not yet rewritten.
          prefix: the prefix of the names of new parameters.
        """
        return _EMIT[self.kind](_Place(builder, block, prefix), self)


@dataclass(frozen=True)
class _Place:
    """The position and inputs of an emitted routing."""

    builder: Builder
    block: FFNBlock
    prefix: str

    @property
    def x(self) -> Value:
        return self.block.x

    @property
    def tokens(self) -> tuple[str, ...]:
        return tuple(n for n in self.x.type.names if n != self.block.outer)

    def param(self, name: str, weight: Expr) -> Value:
        graph = self.builder.graph
        type = weight.type.with_dtype(self.x.type.dtype)
        return graph.param(graph.fresh(f"{self.prefix}.{name}"), type, weight, loc=self.block.loc)

    def router(self, router: Router) -> Value:
        assert router.weight is not None, "only a hash has no weight"
        return self.param("router.weight", router.weight)


def _token_choice(at: _Place, router: Router) -> tuple[Value, Finish]:
    weight = at.router(router)
    bias = None
    if router.has_bias:
        type = tensor(at.x.type.dtype, expert=router.experts)
        bias = at.param("router.balance_bias", Full(0.0, type))
    return emit_routing(
        at.builder, at.x, weight, experts=router.experts, top_k=router.top_k, gates=router.gates,
        scale=router.gate_scale, tokens=at.tokens, bias=bias, **router.assignment,
    )  # fmt: skip


def _prototypes(at: _Place, router: Router) -> tuple[Value, Finish]:
    b, weight = at.builder, at.router(router)
    logits = b.contract(at.x, weight, over=at.block.outer, precision="f32", name="router")
    chosen, gates = emit_prototypes(b, logits, router.top_k, gates="softmax")
    if router.gates == "renormalised":
        gates = b.div(gates, b.sum(gates, axes="choice"))
    if router.gate_scale != 1:
        gates = b.scale(gates, by=router.gate_scale)
    return _placed(at, router, chosen, gates)


def _hash(at: _Place, router: Router) -> tuple[Value, Finish]:
    ids = token_ids(at.builder.graph, at.x.type, at.tokens, at.block.loc)
    assert ids is not None, "checked before anything was changed"
    chosen, gates = emit_hash_routing(
        at.builder, ids, at.x, experts=router.experts, top_k=router.top_k, seed=router.seed
    )
    return _placed(at, router, chosen, gates)


def _placed(at: _Place, router: Router, chosen: Value, gates: Value) -> tuple[Value, Finish]:
    return emit_chosen(
        at.builder, at.x, chosen, gates, experts=router.experts, tokens=at.tokens,
        **router.assignment,
    )  # fmt: skip


def _expert_choice(at: _Place, router: Router) -> tuple[Value, Finish]:
    """Let experts choose tokens; the gates of a token that is taken at all add up to one."""
    b, weight = at.builder, at.router(router)
    factor, groups = router.assignment["capacity_factor"], router.assignment["groups"]
    chosen, scores, slots = emit_expert_choice(
        b, at.x, weight, tokens=at.tokens, capacity_factor=factor, groups=groups
    )
    gates = emit_rescaled(b, scores, slots)
    rows = b.dispatch(at.x, chosen, slots)

    def finish(rows_out: Value) -> Value:
        return b.combine(rows_out, chosen, slots, gates)

    return rows, finish


def _soft(at: _Place, router: Router) -> tuple[Value, Finish]:
    """Mix the tokens of a sequence into slots; the logits are cosines times a learned scale."""
    b, weight = at.builder, at.router(router)
    scale = at.param("router.scale", Full(1.0, tensor(at.x.type.dtype)))
    slots = b.mul(emit_unit(b, weight, at.block.outer), scale)
    logits_of = emit_unit(b, at.x, at.block.outer)
    rows, weights = emit_soft_slots(
        b, at.x, slots, tokens=at.tokens[-1], embed=at.block.outer, like=logits_of
    )

    def finish(rows_out: Value) -> Value:
        return b.contract(weights, rows_out, over=("expert", "slot"))

    return rows, finish


_EMIT: dict[str, Callable[[_Place, Router], tuple[Value, Finish]]] = {
    "token-choice": _token_choice,
    "prototypes": _prototypes,
    "hash": _hash,
    "expert-choice": _expert_choice,
    "soft": _soft,
}
"""The functions that emit each kind, by the words of the option ``routing``."""
