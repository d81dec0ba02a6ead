"""The dense way: one expert after the other works on all tokens, and the gates pick.

It costs as many times the arithmetic as there are experts for each choice, and moves no row: the
oracle of the other ways.  What lies between dispatch and combine is put off until the combine,
which repeats it for each expert.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod

import jax
import jax.numpy as jnp

from moecc.ir.graph import Node, Value
from moecc_backends.xla.dispatch.layout import Routing, RowPacking
from moecc_backends.xla.trace.dtypes import accumulator
from moecc_backends.xla.trace.padding_rows import with_masked_gradient, zeroed
from moecc_backends.xla.trace.values import Named, Operand, Rows


@dataclass(frozen=True)
class Dense:
    """A routing whose rows are not made at once.

    Attributes:
      routing: what was routed.
      nodes: the operations that were put off, in order.
    """

    routing: Routing
    nodes: list[Node] = field(default_factory=list)

    def leading_to(self, rows: Value) -> list[Node]:
        """Return the operations put off that `rows` is made of, in order."""
        mine, wanted, left = set(self.nodes), set(), [rows]
        while left:
            node = left.pop().node
            if node in mine and node not in wanted:
                wanted.add(node)
                left.extend(node.operands)
        return [node for node in self.nodes if node in wanted]


@dataclass(frozen=True)
class OneExpert(RowPacking):
    """All tokens as the rows of one expert; used are those that chose it.

    Attributes:
      expert: its number, which the scan counts.
    """

    expert: jax.Array

    @property
    def _is_choice(self) -> jax.Array:
        is_mine = self.routing.experts == self.expert
        placed = self.routing.placed
        return is_mine if placed is None else is_mine & placed

    @property
    def is_used(self) -> jax.Array:
        """Whether each token chose this expert and has a slot: bool ``[tokens]``."""
        return jnp.any(self._is_choice, axis=1)

    @property
    def row_tokens(self) -> jax.Array:
        """The number of each token."""
        return jnp.arange(self.routing.num_tokens, dtype=jnp.int32)

    @property
    def row_experts(self) -> jax.Array:
        """The expert, for each token."""
        return jnp.broadcast_to(self.expert, (self.routing.num_tokens,))

    def by_expert(self, values: jax.Array) -> jax.Array:
        """Repeat what the expert has for each token."""
        return jnp.take(values, self.row_experts, axis=0, mode="clip")

    def dispatch(self, tokens: jax.Array) -> jax.Array:
        """Return the tokens as they lie; a gradient comes from those that chose the expert."""
        return with_masked_gradient(tokens, self.is_used)

    def combine(self, rows: jax.Array, gates: jax.Array) -> jax.Array:
        """Weight the rows of those who chose the expert; the result is float32 at least."""
        kind = accumulator(rows.dtype)
        weight = jnp.sum(jnp.where(self._is_choice, gates.astype(kind), 0), axis=1)
        return zeroed(rows, self.is_used).astype(kind) * weight[:, None]


Lower = Callable[[list[Node], dict[Value, Operand], OneExpert], None]
"""Lower nodes into values by name, with the rows of one expert."""


def sum_over_experts(
    dense: Dense, rows: Value, values: dict[Value, Operand], gates: jax.Array, lower: Lower
) -> Named:
    """Return the sum over experts of their gated rows, ``[tokens, *axes]``, axis ``rows`` first.

    Args:
      dense: the routing, with what was put off.
      rows: what the experts made.
      values: everything lowered so far.
      gates: ``[tokens, choice]``.
      lower: makes what was put off.
    """
    nodes = dense.leading_to(rows)
    given = _given(nodes, values)
    told = {v for node in nodes if node.op.name == "dispatch" for v in node.operands}
    own = [v for v, x in given.items() if "expert" in x.axes and v not in told]
    sliced = {v: _leading(given[v]) for v in own}

    def run(expert: jax.Array, slices: dict[Value, jax.Array]) -> Rows:
        packing = OneExpert(dense.routing, expert)
        local: dict[Value, Operand] = dict(given)
        local |= {v: Named(a, sliced[v].axes[1:]) for v, a in slices.items()}
        lower(nodes, local, packing)
        made = local[rows]
        assert isinstance(made, Rows), "what is combined is made of rows"
        return made

    axes: tuple[str, ...] = ()

    def weighted(expert: jax.Array, slices: tuple[jax.Array, ...]) -> jax.Array:
        nonlocal axes
        made = run(expert, dict(zip(sliced, slices, strict=True)))
        axes, shape = made.axes, made.array.shape
        flat = made.array.reshape(shape[0], prod(shape[1:]))
        result: jax.Array = made.packing.combine(flat, gates).reshape(shape)
        return result

    arrays = tuple(x.array for x in sliced.values())
    number = jnp.arange(dense.routing.num_experts, dtype=jnp.int32)
    shape = jax.eval_shape(weighted, number[0], tuple(a[0] for a in arrays))
    zeros = jnp.zeros(shape.shape, shape.dtype)
    total, _ = jax.lax.scan(
        lambda total, now: (total + weighted(*now), None), zeros, (number, arrays)
    )
    return Named(total, ("rows", *axes))


def _given(nodes: list[Node], values: dict[Value, Operand]) -> dict[Value, Named]:
    """Return what `nodes` take from outside."""
    made = {v for node in nodes for v in node.results}
    taken: dict[Value, Named] = {}
    for value in (v for node in nodes for v in node.operands if v not in made):
        found = values[value]
        assert isinstance(found, Named), "rows of two routings never meet"
        taken[value] = found
    return taken


def _leading(x: Named) -> Named:
    return x.to(("expert", *(a for a in x.axes if a != "expert")))
