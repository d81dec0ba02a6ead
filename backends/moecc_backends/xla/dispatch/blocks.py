"""Experts one after the other: all tokens for a step of decoding, or blocks of rows, on a CPU.

For a few tokens an expert that no token chose is skipped, and each other one is read once and in
place: nothing is sorted, and no weight is gathered or sliced.  That costs the arithmetic of all
tokens at each of these experts, which is less than to read the weights.

For many, rows are sorted by expert, but expert activations are never an array of all rows: a block
is gathered, goes through all operations up to the combine, and only its results are written.  What
is in between stays in the caches, and nothing is masked.  For a gradient the products with weights
are written as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from moecc.errors import InputError
from moecc.ir.graph import Node, Value
from moecc.ir.mesh import NamedType, sharded_results, space_of
from moecc.ir.traits import RowMove
from moecc_backends.xla.dispatch.sorted_rows import (
    Deferral,
    Matrices,
    SortedRows,
    flat_matmul,
    rows_to_tokens,
    tokens_to_rows,
)
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
from moecc_backends.xla.trace.context import DeviceView, zeros_like_on_devices
from moecc_backends.xla.trace.values import (
    DeferredRows,
    DispatchLayout,
    ExpertArrays,
    Named,
    Names,
    Operand,
    PyTree,
    Routing,
    RowLayout,
    Rows,
    accumulator,
    is_float,
    load,
    padded,
    store,
    stored_as,
    varies,
)


@dataclass(frozen=True)
class OneExpert(RowLayout):
    """All tokens as the rows of one expert; the tokens that chose it are used.

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


class _SumOperands(NamedTuple):
    """All arrays that the sum depends on: a function with its own gradient closes over none.

    Attributes:
      routing: the experts of each token.
      stacks: operands with a part for each expert: one array, or an array for each.
      shared: operands of all experts.
      gates: ``[tokens, choice]``; None where rows have weights.
    """

    routing: Routing
    stacks: list[Matrices]
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
    """Return the axes of an operand without the axis of experts."""
    return tuple(a for a in x.axes if a != "expert")


# XLA copies the matrices of an expert out of a stack before it multiplies with them.  Copies beyond
# a core's cache are written to memory and read again: an eighth of a layer of 32 experts with
# matrices of 12 MB.  So a large expert is done in parts, slices along the axis that its first
# products make and its last one sums over.

MOST_BYTES = 4_000_000
"""The largest matrix of an expert, or part of one.  With 2 MB of cache a core, parts of 1.4 and
of 2.9 MB were alike, and a matrix of 3.5 MB was no slower whole (``benchmarks/moe_layer.py``)."""

_LEAST_WIDTH = 128
"""Narrower products do not run at their best rate."""

_MANY_ROWS = 128
"""From this many rows on it is quicker to sum over the first axis of both than to transpose one
(``benchmarks/moe_layer.py``)."""

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
        result: Carry = lax.fori_loop(0, self.count, step, carry)
        return result

    def bounds(
        self, stack: Named, expert: Array, part: Array | int
    ) -> tuple[list[Array], tuple[int, ...]]:
        """Return where a part is in a stack with the experts in front, and its shape there."""
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
    if not _are_wide(x.array for x in operands.values()):
        return ExpertParts()
    widths = {n: size for x in stacks.values() for n, size in x.sizes.items()}
    for axis, width in widths.items():
        if axis != "expert" and _can_cut(rows, stacks, axis):
            matrices = (x for x in stacks.values() if axis in x.axes)
            largest = max(x.array.nbytes // x.size("expert") for x in matrices)
            counts = (n for n in range(1, width // _LEAST_WIDTH + 1) if width % n == 0)
            return ExpertParts(axis, next((n for n in counts if largest // n <= MOST_BYTES), 1))
    return ExpertParts()


def _are_wide(arrays: Iterable[Array]) -> bool:
    """Whether sums in the types of all floating-point arrays lose nothing."""
    return all(a.dtype.itemsize >= 4 for a in arrays if is_float(a.dtype))


def _ends_in_product(rows: DeferredRows, stacks: Mapping[Value, Named]) -> bool:
    """Whether the rows are products with weights of experts, and nothing is done with them."""
    last = rows.nodes[-1]
    return last.results == (rows.value,) and _is_product(last, stacks)


def _is_product(node: Node, stacks: Mapping[Value, Named]) -> bool:
    return node.op.is_product and any(v in stacks for v in node.operands)


def _can_cut(rows: DeferredRows, stacks: Mapping[Value, Named], axis: str) -> bool:
    """Whether experts could be sharded along an axis with nothing sent before their last product.

    The rules of sharding say so: the results of that product are then unreduced sums.
    """
    if not _ends_in_product(rows, stacks):
        return False
    types = {
        v: v.type.sharded(tuple(_PARTS if n == axis else () for n in v.type.names)) for v in stacks
    }
    try:
        for node in rows.nodes:
            space = space_of(node.op, node.operands, node.attrs)
            operands = [NamedType(v.name, types.get(v, v.type.bare)) for v in node.operands]
            results = [v.type for v in node.results]
            sharded = sharded_results(node.op, space, operands, results, None)
            types |= dict(zip(node.results, sharded, strict=True))
    except InputError:
        return False
    products = [v for n in rows.nodes[:-1] if _is_product(n, stacks) for v in n.results]
    return types[rows.value].unreduced == _PARTS and all(
        any(types[v].meshes) and not types[v].unreduced for v in products
    )


# Some rows of one expert as a layout, for operations between dispatch and combine.


def matrix_product(rows: Array, matrix: Array, axis: int) -> Array:
    """Multiply rows ``[rows, a]`` with a matrix, summing over its axis `axis`."""
    return block_product(rows, matrix, axis).astype(rows.dtype)


@dataclass(frozen=True)
class BlockOfExpert(RowLayout):
    """Some rows of one expert, which has all to itself what there is of an expert.

    Attributes:
      choice_of_row: i32 ``[rows]``, the choice in each row; of another expert, or negative, in
        rows that are not used.
      used: whether each row is one of the expert: bool ``[rows]``.
      part: which part of the expert.
      first: the number of the first row among those of all experts.
      product: multiplies rows with the matrix of the expert, see `matrix_product`.
    """

    choice_of_row: Array
    used: Array
    part: Array | int
    first: Array
    product: Callable[[Array, Array, int], Array] = matrix_product

    @property
    def is_used(self) -> Array:
        """Whether each row is one of the expert."""
        return self.used

    @property
    def row_experts(self) -> Array:
        """The only expert, for each row."""
        return jnp.zeros_like(self.choice_of_row)

    @property
    def row_tokens(self) -> Array:
        """The token of each row."""
        return self.choice_of_row // self.routing.experts.shape[1]

    def by_expert(self, values: Array) -> Array:
        """Repeat what the expert has for each row; a gradient comes from rows that are used."""
        rows = jnp.broadcast_to(values, (self.choice_of_row.size, *values.shape[1:]))
        return padded(rows, self.is_used, None, 0)

    def permute(self, x: Named) -> Rows:
        """Gather rows from tokens."""

        def gathered(tokens: Array) -> Array:
            rows = jnp.take(store(tokens), self.row_tokens, axis=0, mode="clip")
            return load(rows, tokens.dtype)

        return replace(tokens_to_rows(self, x, gathered), are_tokens=True)

    def permute_gates(self, gates: Array) -> Rows:
        """Gather the gates of rows from the gates of choices; used rows alone have a gradient."""
        rows = jnp.take(gates.reshape(-1), self.choice_of_row, mode="clip")
        return Rows(padded(rows, self.is_used, None, 0), (), self)

    def unpermute(self, rows: Operand | DeferredRows, gates: Array | None) -> Named:
        """Not for a block: a token has rows in several."""
        raise AssertionError("all blocks are combined at once")

    def matmul(self, x: Rows, weight: Named, over: Names, kind: DTypeLike) -> Rows:
        """Multiply rows with the matrix of the expert."""

        def product(flat: Array, matrices: Matrices, axis: int) -> Array:
            return self.product(flat, matrices[0].astype(flat.dtype), axis - 1)

        return flat_matmul(x, weight, over, product)


# The experts of a routing as a function of arrays, which walks over blocks of an expert's rows.


def start_in_products(part: Array | int, first: Array, rank: int) -> list[Array]:
    """Return where row `first` is in an array ``[parts, rows, …]`` of `rank` axes."""
    return [jnp.asarray(i, first.dtype) for i in (part, first, *[0] * (rank - 2))]


class BlockResult(NamedTuple):
    """What is made of a block, or of all: then of all rows, and some after them that mean nothing.

    Attributes:
      rows: arrays ``[rows, …]``, added up over the parts of an expert.
      products: arrays ``[rows, …]`` of one part, or ``[parts, rows, …]``.
      weights: what is added up for each expert: of its part, or ``[experts, …]`` of all.
      shared: what is added up over all blocks.
    """

    rows: Sequence[Array] = ()
    products: Sequence[Array] = ()
    weights: Sequence[Array] = ()
    shared: Sequence[Array] = ()


Work = Callable[[BlockOfExpert, "Mapping[Value, Array]"], BlockResult]
"""Makes something of a block and what its expert has of stacks, or a part of that."""


class LayerArrays(NamedTuple):
    """All arrays that a layer is made of: a function with a gradient of its own closes over none.

    Attributes:
      layout: the sorted rows, and rows without a token where the last block may end.
      arrays: the operands of the rows.
      gates: ``[tokens, choice]``; None where rows have weights.
    """

    layout: SortedRows
    arrays: list[Array]
    gates: Array | None


Residuals = tuple[LayerArrays, Array, Sequence[Array]]
"""The arrays of a layer, its rows in their order, and the products that they are made of."""


@dataclass(frozen=True)
class BlockwiseLayer:
    """The experts of a routing.

    Attributes:
      rows: the rows that are combined.
      operands: what they are made of.
      parts: the parts of an expert, done one after the other.
      sizes: the sizes of blocks.
    """

    rows: DeferredRows
    operands: Mapping[Value, Named]
    parts: ExpertParts
    sizes: tuple[int, ...]

    @cached_property
    def moves(self) -> list[Node]:
        """The operations that gather rows from tokens."""
        return [n for n in self.rows.nodes if n.op.moves is RowMove.TO_SLOTS]

    def outside(self, inputs: LayerArrays) -> dict[Value, Named]:
        """Return what the rows are made of."""
        pairs = zip(self.operands.items(), inputs.arrays, strict=True)
        return {v: Named(array, x.axes) for (v, x), array in pairs}

    def evaluate(self, values: Mapping[Value, Operand], layout: DispatchLayout) -> Array:
        """Return the rows ``[rows, *row_axes]``, made of `values` in a layout."""
        result = self.rows.make(values, layout)
        assert isinstance(result, Rows), "`permute` made rows"
        return result.inner().to(("rows", *self.rows.row_axes)).array

    def dispatched(
        self, outside: Mapping[Value, Named], layout: DispatchLayout
    ) -> dict[Value, Rows]:
        """Return the rows that are gathered from tokens, in a layout."""
        results = (n.result for n in self.moves)
        moved = {v: replace(self.rows, value=v).make(outside, layout) for v in results}
        return {v: x for v, x in moved.items() if isinstance(x, Rows)}

    def combined(self, inputs: LayerArrays, rows: Array) -> Array:
        """Return what each token gets of the rows of all experts."""
        axes = (*inputs.layout.routing.tokens, *self.rows.row_axes)
        all_rows = Rows(rows, self.rows.row_axes, inputs.layout)
        return inputs.layout.unpermute(all_rows, inputs.gates).to(axes).array

    def at_once(self, inputs: LayerArrays) -> Array:
        """Return what each token gets, by one operation on all rows after the other."""
        return self.combined(inputs, self.evaluate(self.outside(inputs), inputs.layout))

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
        """Return what `work` makes of all blocks; its `weights` are of the stacks `owners`."""
        layout, outside, parts = inputs.layout, self.outside(inputs), self.parts
        choices, counts = layout.permutation.choice_of_row, layout.group_sizes
        ends = jnp.cumsum(counts)
        stacks = {
            v: x.to(("expert", *axes_of_expert(x)))
            for v, x in sliced_by_expert(self.rows, outside).items()
        }

        def blocks(expert: Array, part: Array | int) -> Callable[[Array, int], BlockResult]:
            # Slices of weights are made here, once for all blocks of a part.
            weights = {}
            for value, stack in stacks.items():
                at, sizes = parts.bounds(stack, expert, part)
                sliced = lax.dynamic_slice(store(stack.array), at, sizes)
                weights[value] = load(sliced[0], stack.array.dtype)

            def block(first: Array, size: int) -> BlockResult:
                choice = lax.dynamic_slice_in_dim(choices, first, size)
                is_used = first + jnp.arange(size, dtype=first.dtype) < ends[expert]
                rows = BlockOfExpert(layout.routing, choice, is_used, part, first)
                return work(rows, weights)

            return block

        def of_part(expert: Array, part: Array | int, sums: BlockResult) -> BlockResult:
            block = blocks(expert, part)

            def added_rows(rows: Array, new: Array, first: Array, size: int) -> Array:
                at = first * (new.shape[0] // size)  # Each row may stand for several.
                total = new
                if parts.count > 1:
                    # Before the first part there may be anything.
                    before = lax.dynamic_slice_in_dim(rows, at, new.shape[0])
                    total = jnp.where(part == 0, new, load(before, new.dtype) + new)
                return lax.dynamic_update_slice_in_dim(rows, store(total), at, 0)

            def added_products(saved: Array, new: Array, first: Array, size: int) -> Array:
                at = start_in_products(part, first * (new.shape[0] // size), saved.ndim)
                return lax.dynamic_update_slice(saved, store(new)[None], at)

            def added_weights(total: Array, gradient: Array, like: Named) -> Array:
                at, sizes = parts.bounds(like, expert, part)
                more = lax.dynamic_slice(total, at, sizes) + gradient
                return lax.dynamic_update_slice(total, more, at)

            def step(first: Array, size: int, sums: BlockResult) -> BlockResult:
                new = block(first, size)
                owned = zip(sums.weights, new.weights, owners, strict=True)
                return BlockResult(
                    [
                        added_rows(*pair, first, size)
                        for pair in zip(sums.rows, new.rows, strict=True)
                    ],
                    [
                        added_products(*pair, first, size)
                        for pair in zip(sums.products, new.products, strict=True)
                    ],
                    [added_weights(a, b, stacks[v]) for a, b, v in owned],
                    [a + b for a, b in zip(sums.shared, new.shared, strict=True)],
                )

            start = ends[expert] - counts[expert]
            return cover_blocks(start, counts[expert], self.sizes, step, sums)

        shapes = jax.eval_shape(lambda: blocks(ends[0], 0)(ends[0], self.sizes[0]))
        tokens = outside[self.moves[0].operands[0]].array
        salts = iter(range(1, 1 + sum(map(len, shapes))))

        def zeros(like: Array, shape: tuple[int, ...], kind: DTypeLike) -> Array:
            return DeviceView().varying(zeros_after(tokens, shape, kind, next(salts)), varies(like))

        def zero_rows(x: Array, *leading: int) -> Array:
            shape = (*leading, choices.size * (x.shape[0] // self.sizes[0]), *x.shape[1:])
            return zeros(x, shape, stored_as(x.dtype))

        owned = zip(shapes.weights, owners, strict=True)
        initial = BlockResult(
            [zero_rows(x) for x in shapes.rows],
            [zero_rows(x, parts.count) for x in shapes.products],
            [zeros(x, stacks[v].array.shape, x.dtype) for x, v in owned],
            [zeros(x, x.shape, x.dtype) for x in shapes.shared],
        )
        sums = walk_experts(
            counts,
            lambda expert, sums: parts.each(lambda part, s: of_part(expert, part, s), sums),
            initial,
        )
        rows, products = (
            [load(x, s.dtype) for x, s in zip(arrays, kinds, strict=True)]
            for arrays, kinds in ((sums.rows, shapes.rows), (sums.products, shapes.products))
        )
        return sums._replace(rows=rows, products=products)


# A layer and its gradient, block by block.
#
# Forward the products with weights of experts are kept, for all rows. Backward a block is gathered
# again and everything but its products is computed again; the gradients of an expert's weights are
# added to their place in those of all experts.


def forward(
    layer: BlockwiseLayer, inputs: LayerArrays, *, saves: bool = True
) -> tuple[Array, Residuals]:
    """Return what each token gets, and with `saves` what the gradient needs."""
    outside = layer.outside(inputs)
    # Nothing reads the last product for a gradient where experts end in it.
    ends_in_product = _ends_in_product(layer.rows, sliced_by_expert(layer.rows, outside))

    def work(block: BlockOfExpert, weights: Mapping[Value, Array]) -> BlockResult:
        products: list[Array] = []

        def product(rows: Array, matrix: Array, axis: int) -> Array:
            products.append(matrix_product(rows, matrix, axis))
            return products[-1]

        values = {**outside, **layer.named(weights)}
        result = layer.evaluate(values, replace(block, product=product))
        saved = products[:-1] if ends_in_product else products
        return BlockResult([result], saved if saves else ())

    sums = layer.walk(inputs, work)
    rows = checkpoint_name(sums.rows[0], "experts")
    return layer.combined(inputs, rows), (inputs, rows, sums.products)


def backward(layer: BlockwiseLayer, residuals: Residuals, d_total: Array) -> tuple[PyTree]:
    """Return the cotangents of the arrays of a layer."""
    inputs, rows, saved = residuals
    _, pull = jax.vjp(lambda r, g: layer.combined(inputs._replace(gates=g), r), rows, inputs.gates)
    d_rows, d_gates = pull(d_total)
    outside = layer.outside(inputs)
    stacks = sliced_by_expert(layer.rows, outside)
    read = {v for n in layer.rows.nodes if n not in layer.moves for v in n.operands}
    smooth = [v for v, x in outside.items() if v in read and is_float(x.array.dtype)]
    of_expert = [v for v in smooth if v in stacks]
    shared = [v for v in smooth if v not in stacks]

    def work(block: BlockOfExpert, weights: Mapping[Value, Array]) -> BlockResult:
        size = block.choice_of_row.size
        moved = layer.dispatched(outside, block)
        products = []
        for arrays in saved:
            times = arrays.shape[1] // d_rows.shape[0]  # Each row may stand for several.
            shape = (1, size * times, *arrays.shape[2:])
            at = start_in_products(block.part, block.first * times, arrays.ndim)
            products.append(lax.dynamic_slice(arrays, at, shape)[0])

        def again(rows: list[Array], experts: list[Array], common: list[Array]) -> Array:
            layout = replace(block, product=_saved_products(products, block.is_used))
            values: dict[Value, Operand] = {**outside, **layer.named(weights)}
            values |= layer.named(dict(zip(of_expert, experts, strict=True)))
            values |= {v: Named(a, outside[v].axes) for v, a in zip(shared, common, strict=True)}
            pairs = zip(moved.items(), rows, strict=True)
            values |= {v: replace(x, array=a, layout=layout) for (v, x), a in pairs}
            return layer.evaluate(values, layout)

        operands = [weights[v] for v in of_expert], [outside[v].array for v in shared]
        _, pull = jax.vjp(again, [x.array for x in moved.values()], *operands)
        d_block = lax.dynamic_slice_in_dim(d_rows, block.first, size)
        d_moved, d_experts, d_shared = pull(padded(d_block, block.is_used, 0))
        return BlockResult(d_moved, (), d_experts, d_shared)

    sums = layer.walk(inputs, work, of_expert)
    cotangents = dict(zip(shared, sums.shared, strict=True))
    for v, array in zip(of_expert, sums.weights, strict=True):
        stacked = Named(array, ("expert", *axes_of_expert(outside[v])))
        cotangents[v] = stacked.to(outside[v].axes).array
    # Tokens have the cotangents of the rows that were gathered from them.
    sources = list(dict.fromkeys(n.operands[0] for n in layer.moves))

    def move(arrays: list[Array]) -> list[Array]:
        tokens = {v: Named(a, outside[v].axes) for v, a in zip(sources, arrays, strict=True)}

        moved = layer.dispatched({**outside, **tokens}, inputs.layout)
        return [x.array for x in moved.values()]

    _, pull = jax.vjp(move, [outside[v].array for v in sources])
    for v, array in zip(sources, pull(list(sums.rows))[0], strict=True):
        cotangents[v] = cotangents[v] + array if v in cotangents else array
    return (LayerArrays._make((None, [cotangents.get(v) for v in outside], d_gates)),)


def _saved_products(
    products: Sequence[Array], is_used: Array
) -> Callable[[Array, Array, int], Array]:
    """Return what multiplies rows with a matrix, where the products were saved, in their order."""
    remaining = iter(products)

    def product(rows: Array, matrix: Array, axis: int) -> Array:
        used = jnp.repeat(is_used, rows.shape[0] // is_used.size)
        saved = next(remaining, None)
        if saved is None:
            # Nothing reads the last product of an expert that ends in it, and it was not saved.
            saved = jnp.zeros((rows.shape[0], matrix.shape[1 - axis]), rows.dtype)
        return _saved_product(rows, matrix, saved, used, axis)

    return product


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
    if rows.shape[0] < _MANY_ROWS:
        outer = outer_product(used, d_used, axis + 1)
    else:
        pair = (used, d_used) if axis == 0 else (d_used, used)
        kind = accumulator(rows.dtype)
        over_rows = (((0,), (0,)), ((), ()))
        outer = lax.dot_general(*pair, over_rows, preferred_element_type=kind)
    return d_rows, outer.astype(matrix.dtype), None, None


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
        layout, outside = SortedRows.of(self.routing, grouped_matmul), rows.outside()
        choices = layout.permutation.choice_of_row
        sizes = cover_sizes(choices.size, layout.group_sizes.size)
        padded = jnp.pad(choices, (0, overhang(sizes)), constant_values=-1)
        layout = replace(layout, permutation=layout.permutation._replace(choice_of_row=padded))
        layer = BlockwiseLayer(rows, outside, parts_of(rows, outside), sizes)
        inputs = LayerArrays(layout, [x.array for x in outside.values()], gates)
        axes = (*self.routing.tokens, *rows.row_axes)
        if not self.routing.num_choices:
            return Named(layer.at_once(inputs), axes)
        differentiable = jax.custom_vjp(lambda inputs: forward(layer, inputs, saves=False)[0])
        on_mesh = any(varies(a) for a in inputs.arrays if is_float(a.dtype))
        if _are_wide(inputs.arrays) and not on_mesh:
            differentiable.defvjp(partial(forward, layer), partial(backward, layer))
        else:
            differentiable.defvjp(
                lambda inputs: jax.vjp(layer.at_once, inputs), lambda pull, slope: pull(slope)
            )
        return Named(differentiable(inputs), axes)
