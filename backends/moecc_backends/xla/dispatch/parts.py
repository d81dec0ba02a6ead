"""Parts of an expert: slices along the axis that its first products make and its last sums over.

XLA copies the matrices of an expert out of a stack before it multiplies with them.  Copies beyond a
core's cache are written to memory and read again: an eighth of a layer of 32 experts with matrices
of 12 MB.  Slices of them stay in the cache, and so do the rows between two products.

Which axis that is follows from the rules of sharding: an axis along which all experts could be
sharded, with nothing sent before their last product, whose results are then unreduced sums.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import Array

from moecc.errors import InputError
from moecc.ir.graph import Node, Value
from moecc.ir.sharding_rules import NamedType, sharded_results, space_of
from moecc.types import TensorType
from moecc_backends.xla.dispatch.used_experts import sliced_by_expert
from moecc_backends.xla.trace.values import DeferredRows, Named, load, store

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
