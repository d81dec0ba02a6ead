"""Parts of an expert: slices along the axis that its first products make and its last sums over.

XLA copies the matrices of an expert out of a stack before it multiplies with them.  Copies beyond a
core's cache are written to memory and read again: an eighth of a layer of 32 experts with matrices
of 12 MB.  Slices of them stay in the cache, and so do the rows between two products.

Which axis that is follows from the rules of sharding: an axis along which all experts could be
sharded, with nothing sent before their last product, whose results are then unreduced sums.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from moecc.errors import InputError
from moecc.ir.graph import Node, Value
from moecc.ir.sharding_rules import NamedType, sharded_results, space_of
from moecc.ir.traits import RowMove
from moecc.types import TensorType
from moecc_backends.xla.dispatch.sorted_rows import (
    Deferral,
    Matrices,
    RowPermutation,
    SortedRows,
    flat_matmul,
    tokens_to_rows,
)
from moecc_backends.xla.dispatch.used_experts import axes_of_expert, sliced_by_expert
from moecc_backends.xla.kernels.grouped_matmul import (
    block_product,
    cover_blocks,
    cover_sizes,
    grouped_matmul,
    outer_product,
    overhang,
    walk_experts,
    zeros_after,
)
from moecc_backends.xla.trace.context import DeviceView
from moecc_backends.xla.trace.values import (
    SLOT_AXES,
    DeferredRows,
    DispatchLayout,
    Named,
    Operand,
    Routing,
    Rows,
    accumulator,
    load,
    store,
    stored_as,
    varies,
    with_masked_gradient,
    zeroed,
)

MOST_BYTES = 4_000_000
"""Of an expert's matrix, or a part of it.  On cores with 2 MB of cache each, parts of 1.4 and of
2.9 MB were alike, and a matrix of 3.5 MB was no slower whole (``benchmarks/moe_layer.py``)."""

_LEAST_WIDTH = 128
"""Narrower products do not run at their best rate."""

_PARTS = ("parts",)

Carry = TypeVar("Carry")


@dataclass(frozen=True)
class ExpertParts:
    """How an expert is cut.

    Attributes:
      axis: along which.
      count: into how many parts; what has not the axis is in each of them whole.
    """

    axis: str = ""
    count: int = 1

    def each(self, step: Callable[[Array | int, Carry], Carry], carry: Carry) -> Carry:
        """Run ``step(part, carry)`` for all parts of an expert."""
        if self.count == 1:
            return step(0, carry)
        result: Carry = jax.lax.fori_loop(0, self.count, step, carry)
        return result

    def of(self, stack: Named, expert: Array, part: Array | int) -> Array:
        """Return what an expert, or a part of it, has of a stack with the experts in front."""
        at, sizes = self._place(stack, expert, part)
        slices = jax.lax.dynamic_slice(store(stack.array), at, sizes)
        return load(slices[0], stack.array.dtype)

    def with_own(
        self,
        total: Array,
        gradient: Array,
        like: Named,
        expert: Array,
        part: Array | int,
    ) -> Array:
        """Add what `of` would return of a stack that is `like` another to that stack, `total`."""
        at, sizes = self._place(like, expert, part)
        more = jax.lax.dynamic_slice(total, at, sizes) + gradient
        updated: Array = jax.lax.dynamic_update_slice(total, more, at)
        return updated

    def added(self, before: Array, block: Array, part: Array | int) -> Array:
        """Return the sum over the parts so far, where `before` is that without this one.

        Before the first part there may be anything.
        """
        if self.count == 1:
            return block
        return jnp.where(part == 0, block, load(before, block.dtype) + block)

    def _place(
        self, stack: Named, expert: Array, part: Array | int
    ) -> tuple[list[Array], tuple[int, ...]]:
        """Return where the part is in a stack, and its shape there."""
        sizes = dict(zip(stack.axes, (1, *stack.array.shape[1:]), strict=True))
        at: dict[str, Array | int] = {**dict.fromkeys(stack.axes, 0), "expert": expert}
        if self.axis in sizes:
            sizes[self.axis] //= self.count
            at[self.axis] = part * sizes[self.axis]
        return [jnp.asarray(i, expert.dtype) for i in at.values()], tuple(sizes.values())


def parts_of(rows: DeferredRows, operands: Mapping[Value, Named]) -> ExpertParts:
    """Choose how the experts that make `rows` of `operands` are cut: not at all, if need not be.

    Sums of narrow types are not cut, since each part would be rounded.
    """
    stacks = sliced_by_expert(rows, operands)
    arrays = [x.array for x in operands.values() if jnp.issubdtype(x.array.dtype, jnp.floating)]
    if any(a.dtype.itemsize < 4 for a in arrays):
        return ExpertParts()
    widths = {
        n: size for x in stacks.values() for n, size in zip(x.axes, x.array.shape, strict=True)
    }
    for axis, width in widths.items():
        if axis != "expert" and _can_cut(rows, stacks, axis):
            return ExpertParts(axis, _count(_largest(stacks, axis), width))
    return ExpertParts()


def ends_in_product(rows: DeferredRows, stacks: Mapping[Value, Named]) -> bool:
    """Whether the rows are products with weights of experts, and nothing is done with them."""
    last = rows.nodes[-1]
    return last.results == (rows.value,) and _is_product(last, stacks)


def _is_product(node: Node, stacks: Mapping[Value, Named]) -> bool:
    return node.op.is_product and any(v in stacks for v in node.operands)


def _can_cut(rows: DeferredRows, stacks: Mapping[Value, Named], axis: str) -> bool:
    """Whether all that is done with an expert is done along an axis that its last product sums."""
    if not ends_in_product(rows, stacks):
        return False
    types = {v: _sharded(v.type, axis) for v in stacks}
    try:
        for node in rows.nodes:
            types |= _results(node, types)
    except InputError:
        return False
    products = [v for n in rows.nodes[:-1] if _is_product(n, stacks) for v in n.results]
    return types[rows.value].unreduced == _PARTS and all(_is_cut(types[v]) for v in products)


def _results(node: Node, types: Mapping[Value, TensorType]) -> dict[Value, TensorType]:
    space = space_of(node.op, node.operands, node.attrs)
    operands = [NamedType(v.name, types.get(v, v.type.bare)) for v in node.operands]
    types_of_results = sharded_results(
        node.op, space, operands, [v.type for v in node.results], None
    )
    return dict(zip(node.results, types_of_results, strict=True))


def _sharded(type: TensorType, axis: str) -> TensorType:
    return type.sharded(tuple(_PARTS if name == axis else () for name in type.names))


def _is_cut(type: TensorType) -> bool:
    return any(type.meshes) and not type.unreduced


def _largest(stacks: Mapping[Value, Named], axis: str) -> int:
    """Return the bytes of the largest matrix of an expert along an axis."""
    return max(
        x.array.nbytes // x.array.shape[x.axes.index("expert")]
        for x in stacks.values()
        if axis in x.axes
    )


def _count(size: int, width: int) -> int:
    counts = [n for n in range(1, width // _LEAST_WIDTH + 1) if width % n == 0]
    return next((n for n in counts if size // n <= MOST_BYTES), 1)


# Blocks of an expert's rows, each from its tokens to its results: for programs of a CPU.
#
# Rows are sorted by expert, but none of what experts make of them is an array of all rows: a
# block is
# gathered, goes through all operations up to the combine, and only its results are written.  What
# is
# made in between stays in the caches, and nothing is masked.  For a gradient the products with
# weights are written as well.

# Some rows of one expert as a layout, for operations between dispatch and combine.


def matrix_product(rows: Array, matrix: Array, axis: int) -> Array:
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
    choice_of_row: Array
    is_used: Array
    product: Callable[[Array, Array, int], Array] = matrix_product

    @property
    def is_full(self) -> bool:
        """False: a block may end beyond the rows of its expert."""
        return False

    @property
    def row_experts(self) -> Array:
        """The only expert, for each row."""
        return jnp.zeros_like(self.choice_of_row)

    @property
    def row_groups(self) -> Array:
        """The group of the token of each row."""
        return self.routing.row_groups(self._tokens)

    @property
    def _tokens(self) -> Array:
        return self.choice_of_row // self.routing.experts.shape[1]

    def by_expert(self, values: Array) -> Array:
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

    def permute_gates(self, gates: Array) -> Rows:
        """Gather the gates of rows from those of choices; a gradient comes from used rows."""
        rows = jnp.take(gates.reshape(-1), self.choice_of_row, mode="clip")
        return Rows(with_masked_gradient(rows, self.is_used), (), self)

    def unpermute(self, rows: Operand | DeferredRows, gates: Array | None) -> Named:
        """Not for a block: a token has rows in several."""
        raise AssertionError("all blocks are combined at once")

    def of_experts(self, first: Array | int, count: int) -> BlockOfExpert:
        """Return the same rows: they have an expert already."""
        return self

    def matmul(self, x: Rows, weight: Named, over: tuple[str, ...], kind: DTypeLike) -> Rows:
        """Multiply rows with the matrix of the expert."""

        def product(flat: Array, matrices: Matrices, axis: int) -> Array:
            return self.product(flat, matrices[0].astype(flat.dtype), axis - 1)

        return flat_matmul(x, weight, over, product)


# A walk over blocks of rows sorted by expert, which adds up or writes what is made of each.


class BlockResult(NamedTuple):
    """What is made of a block, or of all: then of all rows, and some after them that mean nothing.

    Attributes:
      rows: arrays ``[rows, …]``, added up over the parts of an expert.
      kept: arrays ``[rows, …]`` of one part, or ``[parts, rows, …]``.
      own: what is added up for each expert: of its part, or ``[experts, …]`` of all.
      shared: what is added up over all blocks.
    """

    rows: Sequence[Array] = ()
    products: Sequence[Array] = ()
    weights: Sequence[Array] = ()
    shared: Sequence[Array] = ()


class BlockAt(NamedTuple):
    """Where a block is: its expert, the part of the expert, and its first row."""

    expert: Array
    part: Array | int
    first: Array

    def of_kept(self, times: int, rank: int) -> list[Array]:
        """Return where the block is in an array ``[parts, times * rows, …]`` of `rank` axes."""
        at = (self.part, self.first * times, *[0] * (rank - 2))
        return [jnp.asarray(i, self.first.dtype) for i in at]


Work = Callable[["BlockOfExpert", "Mapping[Value, Array]", BlockAt], BlockResult]
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
    parts: ExpertParts
    sizes: tuple[int, ...]
    work: Work
    owners: Sequence[Value]

    def run(self, tokens: Array) -> BlockResult:
        """Return it, made once there are `tokens`."""
        counts, ends = self.layout.group_sizes, jnp.cumsum(self.layout.group_sizes)

        def of_expert(expert: Array, sums: BlockResult) -> BlockResult:
            end, count = ends[expert], counts[expert]
            return self.parts.each(lambda part, s: self._walk(expert, part, end, count, s), sums)

        def first_block() -> BlockResult:
            return self._block_of(ends[0], 0, ends[0])(ends[0], self.sizes[0])

        shapes = jax.eval_shape(first_block)
        sums = walk_experts(counts, of_expert, self._zeros(tokens, shapes))
        rows = [load(x, s.dtype) for x, s in zip(sums.rows, shapes.rows, strict=True)]
        products = [load(x, s.dtype) for x, s in zip(sums.products, shapes.products, strict=True)]
        return sums._replace(rows=rows, products=products)

    def _walk(
        self,
        expert: Array,
        part: Array | int,
        end: Array,
        count: Array,
        sums: BlockResult,
    ) -> BlockResult:
        """Return `sums` and what is made of the blocks of an expert, or of a part of it."""
        block = self._block_of(expert, part, end)

        def step(first: Array, size: int, sums: BlockResult) -> BlockResult:
            return self._with_block(sums, block(first, size), BlockAt(expert, part, first), size)

        return cover_blocks(end - count, count, self.sizes, step, sums)

    def _block_of(
        self, expert: Array, part: Array | int, end: Array
    ) -> Callable[[Array, int], BlockResult]:
        weights = {v: self.parts.of(x, expert, part) for v, x in self.stacks.items()}

        def block(first: Array, size: int) -> BlockResult:
            choices = self.layout.permutation.choice_of_row
            choice = jax.lax.dynamic_slice_in_dim(choices, first, size)
            is_used = first + jnp.arange(size, dtype=first.dtype) < end
            rows = BlockOfExpert(self.layout.routing, choice, is_used)
            return self.work(rows, weights, BlockAt(expert, part, first))

        return block

    def _with_block(
        self, sums: BlockResult, result: BlockResult, position: BlockAt, size: int
    ) -> BlockResult:
        """Return what there is of all blocks so far, with one more."""

        def written(rows: Array, block: Array) -> Array:
            at = position.first * (block.shape[0] // size)  # Each row may stand for several.
            before = jax.lax.dynamic_slice_in_dim(rows, at, block.shape[0])
            total = self.parts.added(before, block, position.part)
            return jax.lax.dynamic_update_slice_in_dim(rows, store(total), at, 0)

        def kept(rows: Array, block: Array) -> Array:
            at = position.of_kept(block.shape[0] // size, rows.ndim)
            return jax.lax.dynamic_update_slice(rows, store(block)[None], at)

        like = [self.stacks[v] for v in self.owners]
        owns = zip(sums.weights, result.weights, like, strict=True)
        return BlockResult(
            [written(*pair) for pair in zip(sums.rows, result.rows, strict=True)],
            [kept(*pair) for pair in zip(sums.products, result.products, strict=True)],
            [self.parts.with_own(*pair, position.expert, position.part) for pair in owns],
            [a + b for a, b in zip(sums.shared, result.shared, strict=True)],
        )

    def _zeros(self, tokens: Array, block: BlockResult) -> BlockResult:
        """Return zeros of what is made of blocks like `block`, made once there are tokens."""
        rows = self.layout.permutation.choice_of_row.size
        salts = iter(range(1, 1 + sum(map(len, block))))

        def zeros(like: Array, shape: tuple[int, ...], kind: DTypeLike) -> Array:
            array = zeros_after(tokens, shape, kind, next(salts))
            return DeviceView().varying(array, varies(like))

        def of_rows(x: Array, *parts: int) -> Array:
            shape = (*parts, rows * (x.shape[0] // self.sizes[0]), *x.shape[1:])
            return zeros(x, shape, stored_as(x.dtype))

        owns = zip(block.weights, self.owners, strict=True)
        return BlockResult(
            [of_rows(x) for x in block.rows],
            [of_rows(x, self.parts.count) for x in block.products],
            [zeros(x, self.stacks[v].array.shape, x.dtype) for x, v in owns],
            [zeros(x, x.shape, x.dtype) for x in block.shared],
        )


# The experts of a routing as a function of arrays, which walks over blocks of an expert's rows.
#
# Rows are sorted by expert. A block is gathered from its tokens, and all operations between
# dispatch and combine are lowered for it; what is made of it is written where its rows are, or
# added up. Where matrices are large, an expert is done part by part
# (`moecc_backends.xla.dispatch.blocks`).


class LayerArrays(NamedTuple):
    """All arrays that a layer is made of: a function with a gradient of its own closes over none.

    Attributes:
      routed: experts, slots and wanted choices of the routing, the permutation of its rows, sorted
        by expert, and the number of rows of each expert.
      arrays: the operands of the rows.
      gates: ``[tokens, choice]``; None where rows have weights.
    """

    routed: tuple[Array, Array, Array | None, RowPermutation, Array] | None
    arrays: list[Array | None]
    gates: Array | None


@dataclass(frozen=True)
class BlockwiseLayer:
    """The experts of a routing.

    Attributes:
      rows: the rows that are combined.
      operands: the operands of the rows.
      like: the sorted rows, whose arrays stand in `LayerArrays`.
      parts: of an expert, done one after the other.
    """

    rows: DeferredRows
    operands: Mapping[Value, Named]
    like: SortedRows
    parts: ExpertParts

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
        return ends_in_product(self.rows, sliced_by_expert(self.rows, self.operands))

    @property
    def sizes(self) -> tuple[int, ...]:
        """The sizes of blocks."""
        rows = self.like.permutation.choice_of_row.size
        return cover_sizes(rows, self.like.group_sizes.size)

    def layout(self, inputs: LayerArrays) -> SortedRows:
        """Return the sorted rows, and rows without a token where the last block may end."""
        assert inputs.routed is not None, "cotangents have no rows"
        experts, slots, wanted, permutation, group_sizes = inputs.routed
        routing = replace(self.like.routing, experts=experts, slots=slots, wanted=wanted)
        choices = permutation.choice_of_row
        choices = jnp.pad(choices, (0, overhang(self.sizes)), constant_values=-1)
        permutation = permutation._replace(choice_of_row=choices)
        return replace(self.like, routing=routing, permutation=permutation, group_sizes=group_sizes)

    def outside(self, inputs: LayerArrays) -> dict[Value, Named]:
        """Return what the rows are made of."""
        arrays = zip(self.operands.items(), inputs.arrays, strict=True)
        return {v: Named(array, x.axes) for (v, x), array in arrays if array is not None}

    def stacks(self, inputs: LayerArrays) -> dict[Value, Named]:
        """Return what has a part for each expert, with the experts in front."""
        stacks = sliced_by_expert(self.rows, self.outside(inputs))
        return {v: x.to(("expert", *axes_of_expert(x))) for v, x in stacks.items()}

    def made(self, values: Mapping[Value, Operand], layout: DispatchLayout) -> Array:
        """Return the rows ``[rows, *row_axes]``, made of `values` in a layout."""
        result = self.rows.make(values, layout)
        assert isinstance(result, Rows), "`permute` made rows"
        return result.inner().to(("rows", *self.row_axes)).array

    def combined(self, inputs: LayerArrays, rows: Array) -> Array:
        """Return what each token gets of the rows of all experts."""
        layout = self.layout(inputs)
        return layout.unpermute(Rows(rows, self.row_axes, layout), inputs.gates).to(self.axes).array

    def at_once(self, inputs: LayerArrays) -> Array:
        """Return what each token gets, by one operation on all rows after the other."""
        return self.combined(inputs, self.made(self.outside(inputs), self.layout(inputs)))

    def by_block(self, inputs: LayerArrays) -> Array:
        """Return what each token gets, by one block after the other."""
        outside = self.outside(inputs)

        def work(
            block: BlockOfExpert, weights: Mapping[Value, Array], position: BlockAt
        ) -> BlockResult:
            return BlockResult([self.made({**outside, **self.named(weights)}, block)])

        return self.combined(inputs, self.walk(inputs, work).rows[0])

    def named(self, weights: Mapping[Value, Array]) -> dict[Value, Named]:
        """Return what one expert has, with an axis of one expert.

        Where there is one of groups as well, rows pick by both, so that it has none.
        """
        axes = {v: axes_of_expert(self.operands[v]) for v in weights}
        return {
            v: Named(x, axes[v]) if "group" in axes[v] else Named(x[None], ("expert", *axes[v]))
            for v, x in weights.items()
        }

    def walk(self, inputs: LayerArrays, work: Work, owners: Sequence[Value] = ()) -> BlockResult:
        """Return what `work` makes of all blocks; `own` are of the stacks `owners`."""
        tokens = self.outside(inputs)[self.moves[0].operands[0]].array
        stacks = self.stacks(inputs)
        return BlockWalk(self.layout(inputs), stacks, self.parts, self.sizes, work, owners).run(
            tokens
        )


# The gradient of a layer, block by block.
#
# Forward the products with weights of experts are kept, for all rows. Backward a block is gathered
# again and everything but its products is computed again; the gradients of an expert's weights are
# added to their place in those of all experts.

_MANY_ROWS = 128
"""From this many rows on it is quicker to sum over the first axis of both than to transpose one
(``benchmarks/moe_layer.py``)."""

Residuals = tuple[LayerArrays, Array, Sequence[Array]]
"""What a layer is given, its rows in their order, and the products that they are made of."""


def has_gradient_by_block(inputs: LayerArrays) -> bool:
    """Whether sums in the types of the weights are wide enough, and no mesh has parts of them."""
    floats = [a for a in inputs.arrays if a is not None and _is_float(a)]
    return all(a.dtype.itemsize >= 4 and not varies(a) for a in floats)


def forward(layer: BlockwiseLayer, inputs: LayerArrays) -> tuple[Array, Residuals]:
    """Return what each token gets, and what the gradient needs."""
    outside = layer.outside(inputs)

    def work(
        block: BlockOfExpert, weights: Mapping[Value, Array], position: BlockAt
    ) -> BlockResult:
        products: list[Array] = []

        def product(rows: Array, matrix: Array, axis: int) -> Array:
            products.append(matrix_product(rows, matrix, axis))
            return products[-1]

        values = {**outside, **layer.named(weights)}
        result = layer.made(values, replace(block, product=product))
        return BlockResult([result], products[:-1] if layer.ends_in_product else products)

    every = layer.walk(inputs, work)
    rows = checkpoint_name(every.rows[0], "experts")
    return layer.combined(inputs, rows), (inputs, rows, every.products)


def backward(layer: BlockwiseLayer, residuals: Residuals, d_total: Array) -> tuple[LayerArrays]:
    """Return the cotangents of what a layer is given."""
    inputs, rows, products = residuals
    _, pull = jax.vjp(lambda r, g: layer.combined(inputs._replace(gates=g), r), rows, inputs.gates)
    d_rows, d_gates = pull(d_total)
    outside, stacks = layer.outside(inputs), layer.stacks(inputs)
    read = {v for n in layer.rows.nodes if n not in layer.moves for v in n.operands}
    smooth = [v for v, x in outside.items() if v in read and _is_float(x.array)]
    of_expert = [v for v in smooth if v in stacks]
    shared = [v for v in smooth if v not in stacks]

    def work(
        block: BlockOfExpert, weights: Mapping[Value, Array], position: BlockAt
    ) -> BlockResult:
        size = block.choice_of_row.size
        moved = dispatched(layer, outside, block)
        mine = [_of_block(p, d_rows.shape[0], position, size) for p in products]

        def made(rows: list[Array], each: list[Array], all_read: list[Array]) -> Array:
            again = replace(block, product=_SavedProducts(iter(mine), block.is_used))
            values: dict[Value, Operand] = {**outside, **layer.named(weights)}
            values |= layer.named(dict(zip(of_expert, each, strict=True)))
            values |= {v: Named(a, outside[v].axes) for v, a in zip(shared, all_read, strict=True)}
            values |= {
                v: replace(x, array=a, layout=again)
                for (v, x), a in zip(moved.items(), rows, strict=True)
            }
            return layer.made(values, again)

        given_rows = [x.array for x in moved.values()]
        _, pull = jax.vjp(
            made, given_rows, [weights[v] for v in of_expert], [outside[v].array for v in shared]
        )
        d_block = jax.lax.dynamic_slice_in_dim(d_rows, position.first, size)
        d_moved, d_own, d_shared = pull(zeroed(d_block, block.is_used))
        return BlockResult(d_moved, (), d_own, d_shared)

    sums = layer.walk(inputs, work, of_expert)
    cotangents = dict(zip(shared, sums.shared, strict=True))
    for v, array in zip(of_expert, sums.weights, strict=True):
        cotangents[v] = Named(array, stacks[v].axes).to(outside[v].axes).array
    for v, array in _of_tokens(layer, inputs, sums.rows).items():
        cotangents[v] = cotangents[v] + array if v in cotangents else array
    arrays = [cotangents.get(v) for v in outside]
    return (LayerArrays(None, arrays, d_gates),)


def dispatched(
    layer: BlockwiseLayer, outside: Mapping[Value, Named], layout: DispatchLayout
) -> dict[Value, Rows]:
    """Return the rows that are gathered from tokens, in a layout."""
    moved = {
        n.result: replace(layer.rows, value=n.result).make(outside, layout) for n in layer.moves
    }
    return {v: x for v, x in moved.items() if isinstance(x, Rows)}


def _of_tokens(
    layer: BlockwiseLayer, inputs: LayerArrays, d_moved: Sequence[Array]
) -> dict[Value, Array]:
    """Return the cotangents of tokens, of those of the rows that were gathered from them."""
    outside, layout = layer.outside(inputs), layer.layout(inputs)
    sources = list(dict.fromkeys(n.operands[0] for n in layer.moves))

    def move(arrays: list[Array]) -> list[Array]:
        tokens = {v: Named(a, outside[v].axes) for v, a in zip(sources, arrays, strict=True)}
        return [x.array for x in dispatched(layer, {**outside, **tokens}, layout).values()]

    _, pull = jax.vjp(move, [outside[v].array for v in sources])
    return dict(zip(sources, pull(list(d_moved))[0], strict=True))


def _of_block(products: Array, rows: int, position: BlockAt, size: int) -> Array:
    """Return a block of products ``[parts, rows, …]``, each of which may be several a row."""
    times = products.shape[1] // rows
    at = position.of_kept(times, products.ndim)
    return jax.lax.dynamic_slice(products, at, (1, size * times, *products.shape[2:]))[0]


def _is_float(array: Array) -> bool:
    return bool(jnp.issubdtype(array.dtype, jnp.floating))


class _SavedProducts:
    """Products in the order in which they were kept, as functions of what made them."""

    def __init__(self, products: Iterator[Array], is_used: Array) -> None:
        self.products = products
        self.is_used = is_used

    def __call__(self, rows: Array, matrix: Array, axis: int) -> Array:
        """Return the next one, which multiplied `rows` with `matrix`."""
        used = jnp.repeat(self.is_used, rows.shape[0] // self.is_used.size)
        # Nothing reads the last product of an expert that ends in it, and it was not kept.
        product = next(self.products, None)
        if product is None:
            product = jnp.zeros((rows.shape[0], matrix.shape[1 - axis]), rows.dtype)
        return _saved_product(rows, matrix, product, used, axis)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _saved_product(rows: Array, matrix: Array, product: Array, is_used: Array, axis: int) -> Array:
    return product


def _saved_product_backward(
    axis: int, residuals: tuple[Array, Array, Array], d_product: Array
) -> tuple[Array, Array, None, None]:
    rows, matrix, is_used = residuals
    d_rows = block_product(d_product, matrix, 1 - axis).astype(rows.dtype)
    # Rows of other experts may hold anything, and zero times infinity is no zero.
    used, d_used = (jnp.where(is_used[:, None], x, 0) for x in (rows, d_product))
    outer = outer_product if rows.shape[0] < _MANY_ROWS else _outer_product_of_many
    return d_rows, outer(used, d_used, axis + 1).astype(matrix.dtype), None, None


def _outer_product_of_many(rows: Array, d_rows: Array, axis: int) -> Array:
    left, right = (rows, d_rows) if axis == 1 else (d_rows, rows)
    kind = accumulator(left.dtype)
    dimensions = (((0,), (0,)), ((), ()))
    return jax.lax.dot_general(left, right, dimensions, preferred_element_type=kind)


_saved_product.defvjp(
    lambda rows, matrix, product, is_used, axis: (product, (rows, matrix, is_used)),
    _saved_product_backward,
)


@dataclass(frozen=True)
class ExpertBlocks(Deferral):
    """A routing whose rows are made block by block."""

    def unpermute(self, rows: Operand | DeferredRows, gates: Array | None) -> Named:
        """Return the sum of each token's rows, which are made here."""
        assert isinstance(rows, DeferredRows), "`permute` makes no rows"
        sorted_rows = SortedRows.of(self.routing, grouped_matmul)
        outside = rows.outside()
        layer = BlockwiseLayer(rows, outside, sorted_rows, parts_of(rows, outside))
        routing = self.routing
        inputs = LayerArrays(
            (
                routing.experts,
                routing.slots,
                routing.wanted,
                sorted_rows.permutation,
                sorted_rows.group_sizes,
            ),
            [x.array for x in layer.operands.values()],
            gates,
        )
        return Named(_with_gradient(layer, inputs), layer.axes)

    def of_experts(self, first: Array | int, count: int) -> ExpertBlocks:
        """Return the blocks of `count` experts from `first` on."""
        return ExpertBlocks(self.routing.of_experts(first, count))


def _with_gradient(layer: BlockwiseLayer, inputs: LayerArrays) -> Array:
    if not layer.like.routing.num_choices:
        return layer.at_once(inputs)
    differentiable = jax.custom_vjp(layer.by_block)
    if has_gradient_by_block(inputs):
        differentiable.defvjp(partial(forward, layer), partial(backward, layer))
    else:
        differentiable.defvjp(
            lambda inputs: jax.vjp(layer.at_once, inputs), lambda pull, cotangent: pull(cotangent)
        )
    return differentiable(inputs)
