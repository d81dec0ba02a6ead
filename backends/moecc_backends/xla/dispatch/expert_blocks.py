"""Blocks of an expert's rows, each from its tokens to its results: for programs of a CPU.

Rows are sorted by expert, but none of what experts make of them is an array of all rows: a block is
gathered, goes through all operations up to the combine, and only its results are written.  What is
made in between stays in the caches, and nothing is masked.  For a gradient the products with
weights are written as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax

from moecc_backends.xla.dispatch.block_gradient import backward, forward, has_gradient_by_block
from moecc_backends.xla.dispatch.block_layer import Given, Layer
from moecc_backends.xla.dispatch.deferral import Deferral
from moecc_backends.xla.dispatch.parts import parts_of
from moecc_backends.xla.dispatch.sorted_rows import SortedRows
from moecc_backends.xla.kernels.grouped_matmul import grouped_matmul
from moecc_backends.xla.trace.values import DeferredRows, Named, Operand


@dataclass(frozen=True)
class ExpertBlocks(Deferral):
    """A routing whose rows are made block by block."""

    def unpermute(self, rows: Operand | DeferredRows, gates: jax.Array | None) -> Named:
        """Return the sum of each token's rows, which are made here."""
        assert isinstance(rows, DeferredRows), "`permute` makes no rows"
        sorted_rows = SortedRows.of(self.routing, grouped_matmul)
        taken = rows.outside()
        layer = Layer(rows, taken, sorted_rows, parts_of(rows, taken))
        given = Given(
            self.routing.experts,
            self.routing.slots,
            self.routing.wanted,
            sorted_rows.permutation,
            sorted_rows.group_sizes,
            [x.array for x in layer.taken.values()],
            gates,
        )
        return Named(_with_gradient(layer, given), layer.axes)

    def of_experts(self, first: jax.Array | int, count: int) -> ExpertBlocks:
        """Return the blocks of `count` experts from `first` on."""
        return ExpertBlocks(self.routing.of_experts(first, count))


def _with_gradient(layer: Layer, given: Given) -> jax.Array:
    if not layer.like.routing.num_choices:
        return layer.at_once(given)
    made = jax.custom_vjp(layer.by_block)
    if has_gradient_by_block(given):
        made.defvjp(partial(forward, layer), partial(backward, layer))
    else:
        made.defvjp(
            lambda given: jax.vjp(layer.at_once, given), lambda pull, cotangent: pull(cotangent)
        )
    return made(given)
