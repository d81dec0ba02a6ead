"""The experts that are chosen, one after the other on all tokens: for a step of decoding.

An expert that no token chose is skipped, and each other one is read once and in place: nothing is
sorted, and no weight is gathered or sliced.  It costs the arithmetic of all tokens at each of these
experts, which for a few tokens is less than to read the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from moecc.ir.graph import Value
from moecc.ir.traits import RowMove
from moecc_backends.xla.dispatch.sorted_rows import (
    Deferral,
    rows_to_tokens,
    tokens_to_rows,
)
from moecc_backends.xla.trace.context import zeros_like_on_devices
from moecc_backends.xla.trace.values import (
    DeferredRows,
    ExpertArrays,
    Named,
    Names,
    Operand,
    Routing,
    RowLayout,
    Rows,
    accumulator,
    padded,
)


@dataclass(frozen=True)
class OneExpert(RowLayout):
    """All tokens as the rows of one expert; used are those that chose it.

    Attributes:
      expert: the number of the expert.
    """

    expert: Array

    @property
    def _is_choice(self) -> Array:
        is_mine = self.routing.experts == self.expert
        assigned = self.routing.assigned
        return is_mine if assigned is None else is_mine & assigned

    @property
    def is_used(self) -> Array:
        """Whether each token chose this expert and has a slot: bool ``[tokens]``."""
        return jnp.any(self._is_choice, axis=1)

    @property
    def row_tokens(self) -> Array:
        """The tokens in their order."""
        return jnp.arange(self.routing.num_tokens, dtype=jnp.int32)

    @property
    def row_experts(self) -> Array:
        """The expert, for each token."""
        return jnp.broadcast_to(self.expert, (self.routing.num_tokens,))

    def by_expert(self, values: Array) -> Array:
        """Repeat the entry of the expert for each token."""
        return jnp.take(values, self.row_experts, axis=0, mode="clip")

    def permute(self, x: Named) -> Rows:
        """Return the tokens as they are; a gradient comes from those that chose the expert."""
        rows = tokens_to_rows(self, x, lambda tokens: padded(tokens, self.is_used, None, 0))
        return replace(rows, are_tokens=True)

    def permute_gates(self, gates: Array) -> Rows:
        """Return the mean of the gates by which each token chose the expert, or zero."""
        total = jnp.sum(jnp.where(self._is_choice, gates, 0), axis=1)
        return Rows(total / jnp.maximum(jnp.sum(self._is_choice, axis=1), 1), (), self)

    def unpermute(self, rows: Operand | DeferredRows, gates: Array | None) -> Named:
        """Weight the rows of those who chose the expert; the result is float32 at least."""
        assert isinstance(rows, Rows), "`permute` made rows"

        def weighted(flat: Array) -> Array:
            kind = accumulator(flat.dtype)
            gate = 1 if gates is None else gates.astype(kind)
            weight = jnp.sum(jnp.where(self._is_choice, gate, 0).astype(kind), axis=1)
            return padded(flat, self.is_used, 0, 0).astype(kind) * weight[:, None]

        return rows_to_tokens(self.routing, rows.array, rows.axes, weighted)

    def of_experts(self, first: Array | int, count: int) -> OneExpert:
        """Return the same expert, as one of `count` from `first` on."""
        return OneExpert(self.routing.of_experts(first, count), self.expert - first)


def sliced_by_expert(rows: DeferredRows, outside: Mapping[Value, Named]) -> dict[Value, Named]:
    """Return the operands of deferred rows that have a part for each expert."""
    dispatched = {v for n in rows.nodes if n.op.moves is RowMove.TO_SLOTS for v in n.operands}
    return {v: x for v, x in outside.items() if "expert" in x.axes and v not in dispatched}


Stack = Array | tuple[Array, ...]
"""Arrays of all experts: one array ``[expert, …]``, or an array for each."""


class _SumOperands(NamedTuple):
    """All arrays that the sum depends on: a function with its own gradient closes over none.

    Attributes:
      routing: the experts of each token.
      stacks: operands with a part for each expert.
      shared: operands of all experts.
      gates: ``[tokens, choice]``; None where rows have weights.
    """

    routing: Routing
    stacks: list[Stack]
    shared: list[Array]
    gates: Array | None


@dataclass(frozen=True)
class UsedExperts(Deferral):
    """A routing whose rows are made expert by expert, for the experts that are used.

    Forward, weights are read where they are, within the branch of an expert.  The gradient of a
    branch has the shape of all that the branch reads, so where there is one, a branch is given the
    weights of its expert alone: else gradients of all experts would be added up for each of them.
    """

    def unpermute(self, rows: Operand | DeferredRows, gates: Array | None) -> Named:
        """Return the sum over the experts that are used of their gated rows."""
        assert isinstance(rows, DeferredRows), "`permute` makes no rows"
        outside = rows.outside()
        stacks = sliced_by_expert(rows, outside)
        shared = {v: x for v, x in outside.items() if v not in stacks}
        axes = (*self.routing.tokens, *rows.row_axes)

        def expert_sum(number: int, weights: list[Array], operands: _SumOperands) -> Array:
            pairs = zip(shared.items(), operands.shared, strict=True)
            of_expert = zip(stacks.items(), weights, strict=True)
            values = {v: Named(a, x.axes) for (v, x), a in pairs}
            values |= {v: Named(a, axes_of_expert(x)) for (v, x), a in of_expert}
            layout = OneExpert(operands.routing, jnp.asarray(number, jnp.int32))
            return layout.unpermute(rows.make(values, layout), operands.gates).to(axes).array

        def total(operands: _SumOperands, *, in_place: bool) -> Array:
            def weights(number: int) -> list[Array]:
                return [stack[number] for stack in operands.stacks]

            shape = jax.eval_shape(lambda: expert_sum(0, weights(0), operands))
            sums = zeros_like_on_devices(shape)
            for number in range(self.routing.num_experts):
                layout = OneExpert(operands.routing, jnp.asarray(number, jnp.int32))

                def add(sums: Array, *sliced: list[Array], number: int = number) -> Array:
                    expert_weights = sliced[0] if sliced else weights(number)
                    return sums + expert_sum(number, expert_weights, operands)

                sliced = () if in_place else (weights(number),)
                sums = jax.lax.cond(
                    jnp.any(layout.is_used), add, lambda sums, *_: sums, sums, *sliced
                )
            return sums

        # Which slot it is makes no difference here, and costs a count over all tokens.
        slots = jnp.zeros_like(self.routing.experts)
        operands = _SumOperands(
            replace(self.routing, slots=slots, wanted=self.routing.assigned, capacity=None),
            [
                x.parts
                if isinstance(x, ExpertArrays)
                else x.to(("expert", *axes_of_expert(x))).array
                for x in stacks.values()
            ],
            [x.array for x in shared.values()],
            gates,
        )
        differentiable = jax.custom_vjp(lambda operands: total(operands, in_place=True))
        differentiable.defvjp(
            lambda operands: jax.vjp(lambda o: total(o, in_place=False), operands),
            lambda pull, cotangent: pull(cotangent),
        )
        return Named(differentiable(operands), axes)


def axes_of_expert(x: Named) -> Names:
    """Return the axes of an operand without that of the experts."""
    return tuple(a for a in x.axes if a != "expert")
