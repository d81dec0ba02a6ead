"""Blocks of an expert's rows, each from its tokens to its results: for programs of a CPU.

Rows are sorted by expert, but none of what experts make of them is an array of all rows: a block is
gathered, goes through all operations up to the combine, and only its results are written.  What is
made in between stays in the caches, and nothing is masked.

A gradient needs what blocks do not keep.  Where there is one, all rows go through one operation
after the other, as `SortedRows` do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from moecc.ir.graph import Value
from moecc.ir.traits import RowMove
from moecc_backends.xla.dispatch.all_experts import sliced_by_expert
from moecc_backends.xla.dispatch.deferral import Deferral
from moecc_backends.xla.dispatch.flat import tokens_to_rows
from moecc_backends.xla.dispatch.permutation import Permutation
from moecc_backends.xla.dispatch.sorted_rows import Matrices, SortedRows, flat_matmul
from moecc_backends.xla.kernels.grouped_matmul import block_product, grouped_matmul
from moecc_backends.xla.kernels.row_blocks import (
    cover_blocks,
    cover_sizes,
    overhang,
    walk_experts,
    zeros_after,
)
from moecc_backends.xla.trace.device_view import DeviceView
from moecc_backends.xla.trace.dtypes import load, store, stored_as
from moecc_backends.xla.trace.routing import Routing
from moecc_backends.xla.trace.typed_jax import varying_axes
from moecc_backends.xla.trace.values import SLOT_AXES, DeferredRows, Named, Operand, RowLayout, Rows


@dataclass(frozen=True)
class ExpertBlocks(Deferral):
    """A routing whose rows are made block by block."""

    def unpermute(self, rows: Operand | DeferredRows, gates: jax.Array | None) -> Named:
        """Return the sum of each token's rows, which are made here."""
        assert isinstance(rows, DeferredRows), "`permute` makes no rows"
        layout = SortedRows.of(self.routing, grouped_matmul)
        layer = _Layer(rows, rows.outside(), layout)
        given = _Given(
            self.routing.experts,
            self.routing.slots,
            self.routing.wanted,
            layout.permutation,
            layout.group_sizes,
            [x.array for x in layer.taken.values()],
            gates,
        )
        return Named(layer(given), layer.axes)

    def of_experts(self, first: jax.Array | int, count: int) -> ExpertBlocks:
        """Return the blocks of `count` experts from `first` on."""
        return ExpertBlocks(self.routing.of_experts(first, count))


class _Given(NamedTuple):
    """All arrays that a layer is made of: a function with a gradient of its own closes over none.

    Attributes:
      experts: i32 ``[tokens, choice]``.
      slots: of the routing, likewise.
      wanted: which choices ask for a slot; None if all do.
      permutation: the map between choices and rows, sorted by expert.
      group_sizes: i32 ``[experts]``, how many rows each expert has.
      arrays: what the rows are made of.
      gates: ``[tokens, choice]``; None where rows have weights.
    """

    experts: jax.Array
    slots: jax.Array
    wanted: jax.Array | None
    permutation: Permutation
    group_sizes: jax.Array
    arrays: list[jax.Array]
    gates: jax.Array | None


@dataclass(frozen=True)
class _Layer:
    """The experts of a routing, as a function of arrays.

    Attributes:
      rows: what is combined.
      taken: what the rows are made of.
      like: the rows sorted, whose arrays stand in `_Given`.
    """

    rows: DeferredRows
    taken: Mapping[Value, Named]
    like: SortedRows

    @property
    def row_axes(self) -> tuple[str, ...]:
        """The axes of a row."""
        return tuple(a for a in self.rows.value.type.names if a not in SLOT_AXES)

    @property
    def axes(self) -> tuple[str, ...]:
        """The axes of the result."""
        return (*self.like.routing.tokens, *self.row_axes)

    def __call__(self, given: _Given) -> jax.Array:
        """Return what each token gets, with a gradient."""
        if not self.like.routing.num_choices:
            return self._at_once(given)
        made = jax.custom_vjp(self._by_block)
        made.defvjp(
            lambda given: jax.vjp(self._at_once, given), lambda pull, cotangent: pull(cotangent)
        )
        return made(given)

    def _layout(self, given: _Given) -> SortedRows:
        routing = replace(
            self.like.routing, experts=given.experts, slots=given.slots, wanted=given.wanted
        )
        return replace(
            self.like,
            routing=routing,
            permutation=given.permutation,
            group_sizes=given.group_sizes,
        )

    def _outside(self, given: _Given) -> dict[Value, Named]:
        arrays = zip(self.taken.items(), given.arrays, strict=True)
        return {v: Named(array, x.axes) for (v, x), array in arrays}

    def _at_once(self, given: _Given) -> jax.Array:
        layout = self._layout(given)
        made = self.rows.make(self._outside(given), layout)
        return layout.unpermute(made, given.gates).to(self.axes).array

    def _by_block(self, given: _Given) -> jax.Array:
        layout, outside = self._layout(given), self._outside(given)
        rows = Rows(self._walk(layout, outside), self.row_axes, layout)
        return layout.unpermute(rows, given.gates).to(self.axes).array

    def _made(self, values: Mapping[Value, Named], layout: RowLayout) -> jax.Array:
        """Return the rows ``[rows, *row_axes]``, made of `values` in a layout."""
        made = self.rows.make(values, layout)
        assert isinstance(made, Rows), "`permute` made rows"
        return made.inner().to(("rows", *self.row_axes)).array

    def _walk(self, layout: SortedRows, outside: Mapping[Value, Named]) -> jax.Array:
        """Return the rows in their order, and rows without a meaning after them."""
        stacks = sliced_by_expert(self.rows, outside)
        choices = layout.permutation.choice_of_row
        sizes = cover_sizes(choices.size, layout.group_sizes.size)
        choices = jnp.pad(choices, (0, overhang(sizes)), constant_values=-1)
        ends = jnp.cumsum(layout.group_sizes)

        def block_of(expert: jax.Array) -> Callable[[jax.Array, int], jax.Array]:
            own = {v: _of_expert(x, expert) for v, x in stacks.items()}

            def block(first: jax.Array, size: int) -> jax.Array:
                choice = jax.lax.dynamic_slice_in_dim(choices, first, size)
                is_used = first + jnp.arange(size, dtype=first.dtype) < ends[expert]
                part = BlockOfExpert(layout.routing, choice, is_used)
                return self._made({**outside, **own}, part)

            return block

        def walk(expert: jax.Array, output: jax.Array) -> jax.Array:
            block, count = block_of(expert), layout.group_sizes[expert]

            def step(first: jax.Array, size: int, output: jax.Array) -> jax.Array:
                made = store(block(first, size))
                return jax.lax.dynamic_update_slice_in_dim(output, made, first, 0)

            return cover_blocks(ends[expert] - count, count, sizes, step, output)

        shape = jax.eval_shape(lambda: block_of(ends[0])(ends[0], sizes[0]))
        zeros = self._zeros(outside, choices.size, shape)
        return load(walk_experts(layout.group_sizes, walk, zeros), shape.dtype)

    def _zeros(
        self, outside: Mapping[Value, Named], rows: int, block: jax.ShapeDtypeStruct
    ) -> jax.Array:
        """Return zeros for the results of all rows, made once there are tokens."""
        moved = next(n for n in self.rows.nodes if n.op.moves is RowMove.TO_SLOTS).operands[0]
        shape, kind = (rows, *block.shape[1:]), stored_as(block.dtype)
        zeros = zeros_after(outside[moved].array, shape, kind, salt=1)
        return DeviceView().varying(zeros, varying_axes(block))


@dataclass(frozen=True)
class BlockOfExpert:
    """Some rows of one expert, which has all to itself what there is of an expert.

    Attributes:
      routing: what was routed.
      choice_of_row: i32 ``[rows]``, the choice in each row; of another expert, or negative, in
        rows that are not used.
      is_used: whether each row is one of the expert: bool ``[rows]``.
    """

    routing: Routing
    choice_of_row: jax.Array
    is_used: jax.Array

    @property
    def is_full(self) -> bool:
        """False: a block may end beyond the rows of its expert."""
        return False

    @property
    def row_experts(self) -> jax.Array:
        """The only expert, for each row."""
        return jnp.zeros_like(self.choice_of_row)

    @property
    def row_groups(self) -> jax.Array:
        """The group of the token of each row."""
        return self.routing.row_groups(self._tokens)

    @property
    def _tokens(self) -> jax.Array:
        return self.choice_of_row // self.routing.experts.shape[1]

    def by_expert(self, values: jax.Array) -> jax.Array:
        """Repeat what the expert has for each row."""
        return jnp.broadcast_to(values, (self.choice_of_row.size, *values.shape[1:]))

    def permute(self, x: Named) -> Rows:
        """Gather rows from tokens."""
        rows = tokens_to_rows(
            self,
            x,
            lambda tokens: load(
                jnp.take(store(tokens), self._tokens, axis=0, mode="clip"), tokens.dtype
            ),
        )
        return replace(rows, are_tokens=True)

    def permute_gates(self, gates: jax.Array) -> Rows:
        """Gather the gates of rows from those of choices."""
        return Rows(jnp.take(gates.reshape(-1), self.choice_of_row, mode="clip"), (), self)

    def unpermute(self, rows: Operand | DeferredRows, gates: jax.Array | None) -> Named:
        """Not for a block: a token has rows in several."""
        raise AssertionError("all blocks are combined at once")

    def of_experts(self, first: jax.Array | int, count: int) -> BlockOfExpert:
        """Return the same rows: they have an expert already."""
        return self

    def matmul(self, x: Rows, weight: Named, over: tuple[str, ...], kind: DTypeLike) -> Rows:
        """Multiply rows with the matrix of the expert."""

        def product(flat: jax.Array, matrices: Matrices, axis: int) -> jax.Array:
            made = block_product(flat, matrices[0].astype(flat.dtype), axis - 1)
            return made.astype(flat.dtype)

        return flat_matmul(x, weight, over, product)


def _of_expert(x: Named, expert: jax.Array) -> Named:
    """Return what one expert has of `x`, with an axis of one expert.

    Where there is one of groups as well, rows pick by both, so that it has none.
    """
    rest = tuple(a for a in x.axes if a != "expert")
    stack = x.to(("expert", *rest)).array
    own = jax.lax.dynamic_index_in_dim(store(stack), expert, 0, keepdims="group" not in rest)
    return Named(load(own, stack.dtype), rest if "group" in rest else ("expert", *rest))
