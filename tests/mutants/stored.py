"""Wrong rewrites of weights that real arithmetic does not see: they are stored otherwise."""

from __future__ import annotations

from collections.abc import Callable

from moecc.ir import BF16, F16
from moecc.rewrite.passes import Pass
from moecc.types import DType
from moecc.weights.arithmetic import Cast
from moecc.weights.expr import Expr, Source, transform
from moecc.weights.movement import Tile

from .rewriting import EXACT, Rewrite, RewritePass


def every_weight(change: Callable[[Expr], Expr]) -> Rewrite:
    """Return the rewrite that changes the expression of every parameter that has a float one."""

    def apply(graph):
        changed = 0
        for param in graph.params.values():
            if param.weight is None or not param.weight.type.dtype.is_float:
                continue
            made = change(param.weight)
            changed += made is not param.weight
            param.weight = made
        return changed

    apply.__name__ = change.__name__
    return apply


def rounded(weight: Expr, dtype: DType) -> Expr:
    """Return `weight` through a narrower type, once."""
    is_done = isinstance(weight, Cast) or weight.type.dtype is dtype
    return weight if is_done else Cast(Cast(weight, dtype), weight.type.dtype)


def round_to_bf16(weight: Expr) -> Expr:
    return rounded(weight, BF16)


def round_to_f16(weight: Expr) -> Expr:
    return rounded(weight, F16)


def round_copies_to_bf16(weight: Expr) -> Expr:
    """The experts' copies are kept in the type of the activations."""
    return rounded(weight, BF16) if isinstance(weight, Tile) else weight


def read_sources_as_bf16(weight: Expr) -> Expr:
    """Sources are taken for what the checkpoint of another model holds."""

    def change(part):
        if isinstance(part, Source) and part.type.dtype.is_float:
            return Source(part.name, part.type.with_dtype(BF16))
        return part

    return transform(weight, change)


MUTANTS: dict[str, Pass] = {
    "round_to_bf16_and_promise_exact": RewritePass(every_weight(round_to_bf16), EXACT),
    "round_to_bf16": RewritePass(every_weight(round_to_bf16)),
    "round_to_f16_and_promise_exact": RewritePass(every_weight(round_to_f16), EXACT),
    "round_copies_to_bf16": RewritePass(every_weight(round_copies_to_bf16)),
    "read_sources_as_bf16": RewritePass(every_weight(read_sources_as_bf16)),
}
