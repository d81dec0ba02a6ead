"""The experts of a routing as a function of arrays, which walks over blocks of an expert's rows.

Rows are sorted by expert.  A block is gathered from its tokens, and all operations between dispatch
and combine are lowered for it; what is made of it is written where its rows are, or added up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from moecc.ir.graph import Node, Value
from moecc.ir.traits import RowMove
from moecc_backends.xla.dispatch.all_experts import sliced_by_expert
from moecc_backends.xla.dispatch.flat import tokens_to_rows
from moecc_backends.xla.dispatch.permutation import Permutation
from moecc_backends.xla.dispatch.sorted_rows import Matrices, SortedRows, flat_matmul
from moecc_backends.xla.kernels.grouped_matmul import block_product
from moecc_backends.xla.kernels.row_blocks import (
    cover_blocks,
    cover_sizes,
    overhang,
    walk_experts,
    zeros_after,
)
from moecc_backends.xla.trace.device_view import DeviceView
from moecc_backends.xla.trace.dtypes import load, store, stored_as
from moecc_backends.xla.trace.padding_rows import with_masked_gradient
from moecc_backends.xla.trace.routing import Routing
from moecc_backends.xla.trace.typed_jax import varying_axes
from moecc_backends.xla.trace.values import (
    SLOT_AXES,
    DeferredRows,
    DispatchLayout,
    Named,
    Operand,
    Rows,
)


class Given(NamedTuple):
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

    experts: jax.Array | None
    slots: jax.Array | None
    wanted: jax.Array | None
    permutation: Permutation | None
    group_sizes: jax.Array | None
    arrays: list[jax.Array | None]
    gates: jax.Array | None


class Made(NamedTuple):
    """What is made of blocks.

    Attributes:
      rows: arrays ``[rows, …]``, of a block or of all rows and some that mean nothing after them.
      own: what is added up for each expert, ``[…]`` of one or ``[experts, …]`` of all.
      shared: what is added up over all blocks.
    """

    rows: list[jax.Array]
    own: list[jax.Array]
    shared: list[jax.Array]


Work = Callable[["BlockOfExpert", "Mapping[Value, jax.Array]", jax.Array], Made]
"""Makes something of a block, what its expert has of stacks, and the number of its first row."""


@dataclass(frozen=True)
class Layer:
    """The experts of a routing.

    Attributes:
      rows: what is combined.
      taken: what the rows are made of.
      like: the rows sorted, whose arrays stand in `Given`.
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

    @property
    def moves(self) -> list[Node]:
        """The operations that gather rows from tokens."""
        return [n for n in self.rows.nodes if n.op.moves is RowMove.TO_SLOTS]

    @property
    def sizes(self) -> tuple[int, ...]:
        """The sizes of blocks."""
        rows = self.like.permutation.choice_of_row.size
        return cover_sizes(rows, self.like.group_sizes.size)

    def layout(self, given: Given) -> SortedRows:
        """Return the sorted rows, and rows without a token where the last block may end."""
        assert given.experts is not None
        assert given.slots is not None
        assert given.permutation is not None
        assert given.group_sizes is not None
        routing = replace(
            self.like.routing, experts=given.experts, slots=given.slots, wanted=given.wanted
        )
        choices = given.permutation.choice_of_row
        choices = jnp.pad(choices, (0, overhang(self.sizes)), constant_values=-1)
        permutation = given.permutation._replace(choice_of_row=choices)
        return replace(
            self.like, routing=routing, permutation=permutation, group_sizes=given.group_sizes
        )

    def outside(self, given: Given) -> dict[Value, Named]:
        """Return what the rows are made of."""
        arrays = zip(self.taken.items(), given.arrays, strict=True)
        return {v: Named(array, x.axes) for (v, x), array in arrays if array is not None}

    def stacks(self, given: Given) -> dict[Value, Named]:
        """Return what has a part for each expert, with the experts in front."""
        found = sliced_by_expert(self.rows, self.outside(given))
        return {v: x.to(("expert", *_rest(x))) for v, x in found.items()}

    def made(self, values: Mapping[Value, Operand], layout: DispatchLayout) -> jax.Array:
        """Return the rows ``[rows, *row_axes]``, made of `values` in a layout."""
        made = self.rows.make(values, layout)
        assert isinstance(made, Rows), "`permute` made rows"
        return made.inner().to(("rows", *self.row_axes)).array

    def combined(self, given: Given, rows: jax.Array) -> jax.Array:
        """Return what each token gets of the rows of all experts."""
        layout = self.layout(given)
        return layout.unpermute(Rows(rows, self.row_axes, layout), given.gates).to(self.axes).array

    def at_once(self, given: Given) -> jax.Array:
        """Return what each token gets, by one operation on all rows after the other."""
        return self.combined(given, self.made(self.outside(given), self.layout(given)))

    def by_block(self, given: Given) -> jax.Array:
        """Return what each token gets, by one block after the other."""
        outside = self.outside(given)

        def work(block: BlockOfExpert, own: Mapping[Value, jax.Array], first: jax.Array) -> Made:
            return Made([self.made({**outside, **self.named(own)}, block)], [], [])

        return self.combined(given, self.walk(given, work).rows[0])

    def named(self, own: Mapping[Value, jax.Array]) -> dict[Value, Named]:
        """Return what one expert has, with an axis of one expert.

        Where there is one of groups as well, rows pick by both, so that it has none.
        """
        rest = {v: _rest(self.taken[v]) for v in own}
        return {
            v: Named(x, rest[v]) if "group" in rest[v] else Named(x[None], ("expert", *rest[v]))
            for v, x in own.items()
        }

    def walk(self, given: Given, work: Work) -> Made:
        """Return what `work` makes of all blocks."""
        layout, stacks = self.layout(given), self.stacks(given)
        counts, ends = layout.group_sizes, jnp.cumsum(layout.group_sizes)
        choices = layout.permutation.choice_of_row

        def block_of(expert: jax.Array) -> Callable[[jax.Array, int], Made]:
            own = {v: _picked(x.array, expert) for v, x in stacks.items()}

            def block(first: jax.Array, size: int) -> Made:
                choice = jax.lax.dynamic_slice_in_dim(choices, first, size)
                is_used = first + jnp.arange(size, dtype=first.dtype) < ends[expert]
                return work(BlockOfExpert(layout.routing, choice, is_used), own, first)

            return block

        def of_expert(expert: jax.Array, sums: Made) -> Made:
            block = block_of(expert)

            def step(first: jax.Array, size: int, sums: Made) -> Made:
                return _with_block(sums, block(first, size), expert, first, size)

            return cover_blocks(
                ends[expert] - counts[expert], counts[expert], self.sizes, step, sums
            )

        shapes = jax.eval_shape(lambda: block_of(ends[0])(ends[0], self.sizes[0]))
        sums = walk_experts(counts, of_expert, self._zeros(given, shapes))
        return Made(
            [load(x, s.dtype) for x, s in zip(sums.rows, shapes.rows, strict=True)], *sums[1:]
        )

    def _zeros(self, given: Given, block: Made) -> Made:
        """Return zeros of what is made of blocks like `block`, made once there are tokens."""
        tokens = self.outside(given)[self.moves[0].operands[0]].array
        layout = self.layout(given)
        rows = layout.permutation.choice_of_row.size
        salts = iter(range(1, 1 + sum(map(len, block))))

        def zeros(like: jax.Array, shape: tuple[int, ...], kind: DTypeLike) -> jax.Array:
            made = zeros_after(tokens, shape, kind, next(salts))
            return DeviceView().varying(made, varying_axes(like))

        def of_rows(x: jax.Array) -> jax.Array:
            return zeros(
                x, (rows * (x.shape[0] // self.sizes[0]), *x.shape[1:]), stored_as(x.dtype)
            )

        return Made(
            [of_rows(x) for x in block.rows],
            [zeros(x, (layout.group_sizes.size, *x.shape), x.dtype) for x in block.own],
            [zeros(x, x.shape, x.dtype) for x in block.shared],
        )


def _rest(x: Named) -> tuple[str, ...]:
    return tuple(a for a in x.axes if a != "expert")


def _picked(stack: jax.Array, expert: jax.Array) -> jax.Array:
    own = jax.lax.dynamic_index_in_dim(store(stack), expert, 0, keepdims=False)
    return load(own, stack.dtype)


def _with_block(sums: Made, made: Made, expert: jax.Array, first: jax.Array, size: int) -> Made:
    """Return what there is of all blocks so far, with one more."""

    def written(rows: jax.Array, block: jax.Array) -> jax.Array:
        # Each row may stand for several.
        at = first * (block.shape[0] // size)
        return jax.lax.dynamic_update_slice_in_dim(rows, store(block), at, 0)

    def added(stack: jax.Array, own: jax.Array) -> jax.Array:
        total = jax.lax.dynamic_index_in_dim(stack, expert, 0, keepdims=False) + own
        updated: jax.Array = jax.lax.dynamic_update_index_in_dim(stack, total, expert, 0)
        return updated

    return Made(
        [written(*pair) for pair in zip(sums.rows, made.rows, strict=True)],
        [added(*pair) for pair in zip(sums.own, made.own, strict=True)],
        [a + b for a, b in zip(sums.shared, made.shared, strict=True)],
    )


def matrix_product(rows: jax.Array, matrix: jax.Array, axis: int) -> jax.Array:
    """Multiply rows ``[rows, a]`` with a matrix, summing over its axis `axis`."""
    return block_product(rows, matrix, axis).astype(rows.dtype)


@dataclass(frozen=True)
class BlockOfExpert:
    """Some rows of one expert, which has all to itself what there is of an expert.

    Attributes:
      routing: what was routed.
      choice_of_row: i32 ``[rows]``, the choice in each row; of another expert, or negative, in
        rows that are not used.
      is_used: whether each row is one of the expert: bool ``[rows]``.
      product: multiplies rows with the matrix of the expert, see `matrix_product`.
    """

    routing: Routing
    choice_of_row: jax.Array
    is_used: jax.Array
    product: Callable[[jax.Array, jax.Array, int], jax.Array] = matrix_product

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
        """Repeat what the expert has for each row; a gradient comes from rows that are used."""
        rows = jnp.broadcast_to(values, (self.choice_of_row.size, *values.shape[1:]))
        is_float = jnp.issubdtype(rows.dtype, jnp.floating)
        return with_masked_gradient(rows, self.is_used) if is_float else rows

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
            return self.product(flat, matrices[0].astype(flat.dtype), axis - 1)

        return flat_matmul(x, weight, over, product)
