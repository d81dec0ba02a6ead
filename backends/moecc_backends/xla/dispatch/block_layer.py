"""The experts of a routing as a function of arrays, which walks over blocks of an expert's rows.

Rows are sorted by expert.  A block is gathered from its tokens, and all operations between dispatch
and combine are lowered for it; what is made of it is written where its rows are, or added up.
Where matrices are large, an expert is done part by part (`moecc_backends.xla.dispatch.parts`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moecc.ir.graph import Node, Value
from moecc.ir.traits import RowMove
from moecc_backends.xla.dispatch.all_experts import sliced_by_expert
from moecc_backends.xla.dispatch.block_rows import BlockOfExpert
from moecc_backends.xla.dispatch.block_walk import BlockAt, BlockWalk, Made, Work
from moecc_backends.xla.dispatch.parts import Parts, ends_in_product
from moecc_backends.xla.dispatch.permutation import Permutation
from moecc_backends.xla.dispatch.sorted_rows import SortedRows
from moecc_backends.xla.kernels.row_blocks import (
    cover_sizes,
    overhang,
)
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


@dataclass(frozen=True)
class Layer:
    """The experts of a routing.

    Attributes:
      rows: what is combined.
      taken: what the rows are made of.
      like: the rows sorted, whose arrays stand in `Given`.
      parts: of an expert, done one after the other.
    """

    rows: DeferredRows
    taken: Mapping[Value, Named]
    like: SortedRows
    parts: Parts

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
    def ends_in_product(self) -> bool:
        """Whether the rows are products, which nothing reads for a gradient but their sums."""
        return ends_in_product(self.rows, sliced_by_expert(self.rows, self.taken))

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

        def work(block: BlockOfExpert, own: Mapping[Value, jax.Array], place: BlockAt) -> Made:
            return Made([self.made({**outside, **self.named(own)}, block)])

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

    def walk(self, given: Given, work: Work, owners: Sequence[Value] = ()) -> Made:
        """Return what `work` makes of all blocks; `own` are of the stacks `owners`."""
        tokens = self.outside(given)[self.moves[0].operands[0]].array
        stacks = self.stacks(given)
        return BlockWalk(self.layout(given), stacks, self.parts, self.sizes, work, owners).run(
            tokens
        )


def _rest(x: Named) -> tuple[str, ...]:
    return tuple(a for a in x.axes if a != "expert")
