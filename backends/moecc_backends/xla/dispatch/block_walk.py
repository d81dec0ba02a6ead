"""A walk over blocks of rows sorted by expert, which adds up or writes what is made of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from moecc.ir.graph import Value
from moecc_backends.xla.dispatch.block_rows import BlockOfExpert
from moecc_backends.xla.dispatch.parts import Parts
from moecc_backends.xla.dispatch.sorted_rows import SortedRows
from moecc_backends.xla.kernels.row_blocks import cover_blocks, walk_experts, zeros_after
from moecc_backends.xla.trace.device_view import DeviceView
from moecc_backends.xla.trace.dtypes import load, store, stored_as
from moecc_backends.xla.trace.typed_jax import varying_axes
from moecc_backends.xla.trace.values import Named


class Made(NamedTuple):
    """What is made of a block, or of all: then of all rows, and some after them that mean nothing.

    Attributes:
      rows: arrays ``[rows, …]``, added up over the parts of an expert.
      kept: arrays ``[rows, …]`` of one part, or ``[parts, rows, …]``.
      own: what is added up for each expert: of its part, or ``[experts, …]`` of all.
      shared: what is added up over all blocks.
    """

    rows: Sequence[jax.Array] = ()
    kept: Sequence[jax.Array] = ()
    own: Sequence[jax.Array] = ()
    shared: Sequence[jax.Array] = ()


class BlockAt(NamedTuple):
    """Where a block is: its expert, the part of the expert, and its first row."""

    expert: jax.Array
    part: jax.Array | int
    first: jax.Array

    def of_kept(self, times: int, rank: int) -> list[jax.Array]:
        """Return where the block is in an array ``[parts, times * rows, …]`` of `rank` axes."""
        at = (self.part, self.first * times, *[0] * (rank - 2))
        return [jnp.asarray(i, self.first.dtype) for i in at]


Work = Callable[["BlockOfExpert", "Mapping[Value, jax.Array]", BlockAt], Made]
"""Makes something of a block and what its expert has of stacks, or a part of that."""


@dataclass(frozen=True)
class BlockWalk:
    """What `work` makes of all blocks.

    Attributes:
      layout: the rows, and some without a token where the last block may end.
      stacks: what has a part for each expert, with the experts in front.
      parts: of an expert, done one after the other.
      sizes: of blocks.
      work: makes something of a block.
      owners: the stacks that what is made for each expert is like.
    """

    layout: SortedRows
    stacks: Mapping[Value, Named]
    parts: Parts
    sizes: tuple[int, ...]
    work: Work
    owners: Sequence[Value]

    def run(self, tokens: jax.Array) -> Made:
        """Return it, made once there are `tokens`."""
        counts, ends = self.layout.group_sizes, jnp.cumsum(self.layout.group_sizes)

        def of_expert(expert: jax.Array, sums: Made) -> Made:
            end, count = ends[expert], counts[expert]
            return self.parts.each(lambda part, s: self._walk(expert, part, end, count, s), sums)

        def first_block() -> Made:
            return self._block_of(ends[0], 0, ends[0])(ends[0], self.sizes[0])

        shapes = jax.eval_shape(first_block)
        sums = walk_experts(counts, of_expert, self._zeros(tokens, shapes))
        rows = [load(x, s.dtype) for x, s in zip(sums.rows, shapes.rows, strict=True)]
        kept = [load(x, s.dtype) for x, s in zip(sums.kept, shapes.kept, strict=True)]
        return sums._replace(rows=rows, kept=kept)

    def _walk(
        self, expert: jax.Array, part: jax.Array | int, end: jax.Array, count: jax.Array, sums: Made
    ) -> Made:
        """Return `sums` and what is made of the blocks of an expert, or of a part of it."""
        block = self._block_of(expert, part, end)

        def step(first: jax.Array, size: int, sums: Made) -> Made:
            return self._with_block(sums, block(first, size), BlockAt(expert, part, first), size)

        return cover_blocks(end - count, count, self.sizes, step, sums)

    def _block_of(
        self, expert: jax.Array, part: jax.Array | int, end: jax.Array
    ) -> Callable[[jax.Array, int], Made]:
        own = {v: self.parts.of(x, expert, part) for v, x in self.stacks.items()}

        def block(first: jax.Array, size: int) -> Made:
            choices = self.layout.permutation.choice_of_row
            choice = jax.lax.dynamic_slice_in_dim(choices, first, size)
            is_used = first + jnp.arange(size, dtype=first.dtype) < end
            rows = BlockOfExpert(self.layout.routing, choice, is_used)
            return self.work(rows, own, BlockAt(expert, part, first))

        return block

    def _with_block(self, sums: Made, made: Made, place: BlockAt, size: int) -> Made:
        """Return what there is of all blocks so far, with one more."""

        def written(rows: jax.Array, block: jax.Array) -> jax.Array:
            at = place.first * (block.shape[0] // size)  # Each row may stand for several.
            before = jax.lax.dynamic_slice_in_dim(rows, at, block.shape[0])
            whole = self.parts.added(before, block, place.part)
            return jax.lax.dynamic_update_slice_in_dim(rows, store(whole), at, 0)

        def kept(rows: jax.Array, block: jax.Array) -> jax.Array:
            at = place.of_kept(block.shape[0] // size, rows.ndim)
            return jax.lax.dynamic_update_slice(rows, store(block)[None], at)

        like = [self.stacks[v] for v in self.owners]
        owns = zip(sums.own, made.own, like, strict=True)
        return Made(
            [written(*pair) for pair in zip(sums.rows, made.rows, strict=True)],
            [kept(*pair) for pair in zip(sums.kept, made.kept, strict=True)],
            [self.parts.with_own(*pair, place.expert, place.part) for pair in owns],
            [a + b for a, b in zip(sums.shared, made.shared, strict=True)],
        )

    def _zeros(self, tokens: jax.Array, block: Made) -> Made:
        """Return zeros of what is made of blocks like `block`, made once there are tokens."""
        rows = self.layout.permutation.choice_of_row.size
        salts = iter(range(1, 1 + sum(map(len, block))))

        def zeros(like: jax.Array, shape: tuple[int, ...], kind: DTypeLike) -> jax.Array:
            made = zeros_after(tokens, shape, kind, next(salts))
            return DeviceView().varying(made, varying_axes(like))

        def of_rows(x: jax.Array, *parts: int) -> jax.Array:
            shape = (*parts, rows * (x.shape[0] // self.sizes[0]), *x.shape[1:])
            return zeros(x, shape, stored_as(x.dtype))

        owns = zip(block.own, self.owners, strict=True)
        return Made(
            [of_rows(x) for x in block.rows],
            [of_rows(x, self.parts.count) for x in block.kept],
            [zeros(x, self.stacks[v].array.shape, x.dtype) for x, v in owns],
            [zeros(x, x.shape, x.dtype) for x in block.shared],
        )
