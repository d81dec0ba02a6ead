"""The gated delta rule: a state that keys write and queries read (Yang et al. 2412.06464)."""

from __future__ import annotations

from moecc.errors import InputError
from moecc.ir.arrays import Array
from moecc.ir.graph import Value
from moecc.ir.operand import Operand
from moecc.ir.operation import AxisName, Op, operation
from moecc.ir.ops.attention import CausalOp
from moecc.ir.ops.axes import PositionsOp, RenameOp
from moecc.ir.ops.contraction import contract_type
from moecc.ir.ops.repetition import picked
from moecc.ir.ops.rules import (
    axis_of,
    by_name,
    need_float,
    need_kind,
    need_order,
    same_dtype,
    widest,
)
from moecc.ir.traits import Residual
from moecc.support.lazy import np
from moecc.terms.tensor import Tensor
from moecc.terms.term import Algebra, Head
from moecc.types import TensorType


@operation(
    "delta_rule",
    "query key value decay rate seen",
    results=("read",),
    linear=(0, 2),
    recurs=True,
    residual=Residual((0, 1, 2, 3, 4, 5)),
    sharding=by_name,
)
class DeltaRuleOp(Op):
    """What queries read of a state S that keys have written, one after the other along an axis.

    S is 0 before the first key.  Each key k that the query sees multiplies S by its decay, and then
    moves what S has for k towards its value v: S + k ⊗ rate · (v − Sᵀ k).  The result is Sᵀ query.
    `decay` and `rate` have axes of the values.
    """

    over = AxisName("the axis of queries and keys that is summed over")
    along = AxisName("the axis along which keys, values, decays and rates are in order")

    def infer(self, *operands: Operand) -> TensorType:
        query, key, value, decay, rate, seen = (v.type for v in operands)
        need_order(operands, query, key, self.along, ", values, decays and rates")
        scores = contract_type(query, key, (self.over,))
        if self.over in value:
            raise InputError(
                f"values have the axis {self.over!r}, over which keys meet queries",
                found=str(value),
                hint="rename it",
            )
        read = contract_type(scores, value, (self.along,))
        same_dtype((query, value, decay, rate))
        _need_axes(key.without(self.over), value, "keys are for values")
        for type, noun in ((decay, "the decay"), (rate, "the rate")):
            need_float(type, noun)
            axis_of(type, self.along, noun)
            _need_axes(type, value, f"{noun} is a number for each value")
        need_kind(seen, "bool", "what a query sees")
        axis_of(seen, self.along, "what a query sees")
        _need_axes(seen, scores, "a query sees a key or does not")
        return read

    def mixes(self, *operands: Operand) -> tuple[str, ...]:
        return (self.over, self.along)

    def meaning(
        self, query: Array, key: Array, value: Array, decay: Array, rate: Array, seen: Array
    ) -> Array:
        """Return what each query reads of the state that it sees."""
        of_query = [a for a in query.axes if a not in (self.over, *value.axes)]
        axes = (*(a for a in value.axes if a != self.along), *of_query, self.over)
        sizes = {a: x.size(a) for x in (query, value) for a in x.axes}
        state = np.zeros([sizes[a] for a in axes])
        for at in range(key.size(self.along)):
            parts = (picked(x, self.along, at) for x in (key, value, decay, rate, seen))
            k, v, factor, share, is_seen = (part.to(axes) for part in parts)
            decayed = factor * state
            error = v - (decayed * k).sum(-1, keepdims=True)
            state = np.where(is_seen, decayed + k * share * error, state)
        result = Array((state * query.to(axes)).sum(-1), axes[:-1])
        names = result_names(query.axes, key.axes, value.axes, self)
        return Array(result.to(names), names)

    def term(
        self,
        algebra: Algebra,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        decay: Tensor,
        rate: Tensor,
        seen: Tensor,
    ) -> Tensor:
        """Return an uninterpreted function of a query, all keys and what belongs to them."""
        functions = [query.along(self.over), key.along(self.along, self.over)]
        functions += [x.along(self.along) for x in (value, decay, rate, seen)]
        names = result_names(query.names, key.names, value.names, self)
        axes = {v.name: v for x in (value, key, query) for v in x.axes}
        body = algebra.apply(Head("delta_rule"), functions)
        return Tensor(algebra, tuple(axes[n] for n in names), body)


def result_names(
    query: tuple[str, ...], key: tuple[str, ...], value: tuple[str, ...], attrs: DeltaRuleOp
) -> tuple[str, ...]:
    """Return the axes of the result from those of the operands, in order."""
    scores = [a for a in (*query, *(a for a in key if a not in query)) if a != attrs.over]
    names = (*scores, *(a for a in value if a not in scores))
    return tuple(a for a in names if a != attrs.along)


def reads_as_it_goes(seen: Value, along: str) -> str | None:
    """Return the axis of queries each of which sees the keys up to its own place; None if none is.

    The state that such a query reads is one of those that the keys go through, so that a single
    state serves all queries.

    Args:
      seen: the mask.
      along: the axis of the keys.
    """
    causal = seen.node
    if causal is None or causal.op.name != "causal" or CausalOp.of_node(causal).window:
        return None
    queries, keys = (v.node for v in causal.operands)
    if (
        queries is None
        or keys is None
        or (queries.op.name, keys.op.name)
        != (
            "positions",
            "rename",
        )
    ):
        return None
    axis, renamed = PositionsOp.of_node(queries).axis, RenameOp.of_node(keys)
    is_own = keys.operands[0] is queries.result and renamed.axis == axis
    return axis if is_own and renamed.to == along else None


def _need_axes(type: TensorType, within: TensorType, message: str) -> None:
    """Raise InputError unless `within` has all axes of `type`."""
    missing = [a for a in type.axes if a.name not in within]
    if missing:
        raise InputError(message, expected=f"axes of {within}", found=str(type))
    widest((within, type))
