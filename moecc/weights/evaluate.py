"""Evaluate weight expressions, any box of elements at a time, in bounded memory.

Each node maps the requested box of its result to boxes of its operands, down to rows of
the tensors on disk and to words of random streams.  So a row of a stacked, permuted, sliced tensor
costs only that row, and the bytes do not depend on how the whole is divided into boxes.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from math import prod
from typing import Any, Protocol

from moecc.errors import InputError
from moecc.support.lazy import np
from moecc.types import Array, DType, TensorType, is_lossless
from moecc.weights import draws as random
from moecc.weights import fits as moments
from moecc.weights.arithmetic import (
    Add,
    Binary,
    Cast,
    Minimum,
    Moment,
    Mul,
    Scale,
    Select,
    first_nonfinite,
    round_to,
    widen,
)
from moecc.weights.draws import Draw, Normal, Subset, TruncatedNormal, Uniform
from moecc.weights.expr import (
    Box,
    Expr,
    Full,
    Source,
    align,
    extents,
    flat_boxes,
    project,
    row_blocks,
    runs,
    whole,
)
from moecc.weights.expr import sources as sources
from moecc.weights.fits import Fitted, cluster_order, fitted_rows, matched_order, remembered
from moecc.weights.movement import (
    Aligned,
    Clusters,
    Concat,
    Index,
    Merge,
    Permutation,
    Permute,
    Rename,
    Slice,
    Split,
    Stack,
    Take,
    Tile,
)
from moecc.weights.simplify import simplify

ALIGNMENT = 64
"""XLA reads an array that begins at a multiple of this where it is, without a copy."""

_CHUNK = 32 << 20
"""Small arrays share chunks of this size, so that a huge page (2 MiB) is rarely half empty."""

_SMALL = 64 << 10

_lock = threading.Lock()
_chunk: Array | None = None
_used = 0


def empty(shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> Array:
    """Return an array without values; its memory is given back once it and its neighbours are.

    A system clears memory page by page as it is touched: 2.8 GB in pages of 4 KiB take longer than
    all else that reading a model does.
    """
    global _chunk, _used
    size = prod(shape) * dtype.itemsize
    if size < _SMALL:
        return np.empty(shape, dtype)
    if size > _CHUNK // 2:
        return _mapped(size)[:size].view(dtype).reshape(shape)
    with _lock:
        if _chunk is None or _used + size > _CHUNK:
            _chunk, _used = _mapped(_CHUNK), 0
        memory = _chunk[_used : _used + size]
        _used += -(-size // ALIGNMENT) * ALIGNMENT
    return memory.view(dtype).reshape(shape)


def _mapped(size: int) -> Array:
    """Return bytes of a mapping of their own, which begins with a page."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return np.empty(size, np.uint8)
    whole_pages = -(-size // (2 << 20)) * (2 << 20)
    mapping = mmap.mmap(-1, whole_pages, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without huge pages
        mapping.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(mapping, np.uint8)


BLOCK_BYTES = 4 << 20

WIDE_BYTES = 32 << 20
"""Up to this size, a box of a split axis is cut from one run; above, rows are read one by one."""


class ValuesOverflow(InputError):
    """Finite values that overflow a type."""


class TensorReader(Protocol):
    """Reads the tensors of a checkpoint: `moecc.formats.source.Checkpoint.read`."""

    def __call__(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        """Return rows [start, stop) of the first axis of a tensor."""
        ...


def evaluate(
    expr: Expr,
    reader: TensorReader,
    dtype: DType | None = None,
    rows: tuple[int, int] | None = None,
) -> Array:
    """Return the value of `expr`, or some of its rows.

    Args:
      expr: the expression; it is simplified first.
      reader: reads the sources.
      dtype: the requested element type; the expression's own if None.
      rows: the requested range [start, stop) of the first axis; all if None.

    Raises:
      InputError: a source does not match its type, or values overflow `dtype`.
    """
    wanted = simplify(expr if dtype is None else Cast(expr, dtype))
    box = whole(wanted.type)
    if rows is not None:
        box = (rows, *box[1:])
        if not wanted.type.axes or not 0 <= rows[0] <= rows[1] <= wanted.type.shape[0]:
            raise ValueError(f"rows {rows} of {wanted.type}")
    evaluator, value = Evaluator(reader), empty(extents(box), wanted.type.dtype.numpy)
    if isinstance(wanted, Cast) and is_lossless(wanted.x.type.dtype, wanted.dtype):
        return widen(evaluator.block(wanted.x, box), wanted.dtype, out=value)
    value[...] = evaluator.block(wanted, box)
    return value


def blocks(
    expr: Expr, reader: TensorReader, dtype: DType | None = None, block_bytes: int = BLOCK_BYTES
) -> Iterator[Array]:
    """Yield the value of `expr` in contiguous pieces of at most about `block_bytes`, in order.

    Raises:
      InputError: a source does not match its type, or values overflow `dtype`.
    """
    wanted = simplify(expr if dtype is None else Cast(expr, dtype))
    evaluator = Evaluator(reader)
    for box in row_blocks(wanted.type, block_bytes):
        yield evaluator.block(wanted, box)


def same_bytes(expr: Expr) -> Expr:
    """Return the operand of `expr` that has the same bytes under other axes, or `expr` itself."""
    while isinstance(expr, Rename | Split | Merge):
        expr = expr.x
    return expr


class Evaluator:
    """Evaluates expressions without simplifying them; thread-safe.

    Args:
      reader: reads the sources.
    """

    def __init__(self, reader: TensorReader) -> None:
        self._read = reader
        self._moments = moments.MomentCache()

    def block(self, expr: Expr, box: Box) -> Array:
        """Return the elements of `expr` in `box`; the array may be read-only and not contiguous.

        Raises:
          InputError: a source does not match its type, or values overflow a type.
        """
        if any(start == stop for start, stop in box):
            return np.empty(extents(box), expr.type.dtype.numpy)
        return _RULES[expr.__class__](self, expr, box)

    # --- leaves

    def _source(self, e: Source, box: Box) -> Array:
        rows = self._read(e.name, *box[0]) if box else self._read(e.name)
        expected = (*extents(box[:1]), *e.type.shape[1:])
        if rows.shape != expected or rows.dtype != e.type.dtype.numpy:
            raise e.error(
                "the tensor in the checkpoint has another type",
                expected=f"{e.type.dtype}{list(expected)}",
                found=f"{rows.dtype}{list(rows.shape)}",
            )
        return rows[(slice(None), *(slice(*ends) for ends in box[1:]))] if box else rows

    def _full(self, e: Full, box: Box) -> Array:
        dtype = e.type.dtype
        value = round_to(np.array(e.value), dtype) if dtype.is_float else np.array(e.value)
        return np.broadcast_to(value.astype(dtype.numpy), extents(box))

    def _draw(self, e: Draw, box: Box) -> Array:
        words = random.box_words(e.key, e.type.shape, box)
        if isinstance(e, Normal):
            return random.normal(words, e.mean, e.std)
        if isinstance(e, TruncatedNormal):
            return random.truncated_normal(words, e.std, e.bound)
        assert isinstance(e, Uniform)
        return random.uniform(words, e.low, e.high)

    def _subset(self, e: Subset, box: Box) -> Array:
        at = e.type.names.index(e.axis)
        size = e.type.shape[at]
        words = random.box_words(e.key, e.type.shape, (*box[:at], (0, size), *box[at + 1 :]))
        order = np.argsort(words, axis=at, kind="stable")
        chosen = np.zeros(words.shape, bool)
        first = (slice(None),) * at + (slice(e.count),)
        np.put_along_axis(chosen, order[first], True, axis=at)
        return chosen[(slice(None),) * at + (slice(*box[at]),)]

    # --- movement

    def _tile(self, e: Tile, box: Box) -> Array:
        at = e.position
        x = self.block(e.x, box[:at] + box[at + 1 :])
        return np.broadcast_to(np.expand_dims(x, at), extents(box))

    def _stack(self, e: Stack, box: Box) -> Array:
        at = e.position
        inner = box[:at] + box[at + 1 :]
        parts = e.xs[slice(*box[at])]
        if len(parts) == 1:
            return np.expand_dims(self.block(parts[0], inner), at)
        stacked = np.empty(extents(box), e.type.dtype.numpy)
        for i, x in enumerate(parts):
            stacked[(slice(None),) * at + (i,)] = self.block(x, inner)
        return stacked

    def _concat(self, e: Concat, box: Box) -> Array:
        at = e.type.names.index(e.axis)
        start, stop = box[at]
        parts = []
        offset = 0
        for x in e.xs:
            size = x.type.shape[at]
            ends = (max(start - offset, 0), min(stop - offset, size))
            if ends[0] < ends[1]:
                parts.append(self.block(x, (*box[:at], ends, *box[at + 1 :])))
            offset += size
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=at)

    def _index(self, e: Index, box: Box) -> Array:
        at = e.x.type.names.index(e.axis)
        x = self.block(e.x, (*box[:at], (e.at, e.at + 1), *box[at:]))
        # The ellipsis yields an array where the result would be a scalar.
        return x[(slice(None),) * at + (0, ...)]

    def _slice(self, e: Slice, box: Box) -> Array:
        at = e.type.names.index(e.axis)
        ends = (box[at][0] + e.start, box[at][1] + e.start)
        return self.block(e.x, (*box[:at], ends, *box[at + 1 :]))

    def _rename(self, e: Rename, box: Box) -> Array:
        return self.block(e.x, box)

    def _permute(self, e: Permute, box: Box) -> Array:
        places = [e.order.index(name) for name in e.x.type.names]
        x = self.block(e.x, tuple(box[i] for i in places))
        return x.transpose([e.x.type.names.index(name) for name in e.order])

    def _split(self, e: Split, box: Box) -> Array:
        at = e.x.type.names.index(e.axis)
        sizes = tuple(size for _, size in e.into)
        before, inner, after = box[:at], box[at : at + len(sizes)], box[at + len(sizes) :]
        lead = next((i for i, (a, b) in enumerate(inner) if b - a > 1), len(sizes) - 1)
        full = tuple((0, size) for size in sizes[lead + 1 :])
        wide = (*inner[: lead + 1], *full)
        elements = prod(extents((*before, *wide, *after)))
        if wide != inner and elements * e.type.dtype.itemsize_bytes > WIDE_BYTES:
            rows = [
                self._split(e, (*before, *inner[:lead], (i, i + 1), *inner[lead + 1 :], *after))
                for i in range(*inner[lead])
            ]
            return np.concatenate(rows, axis=at + lead)
        start = int(np.ravel_multi_index([a for a, _ in wide], sizes))
        stop = int(np.ravel_multi_index([b - 1 for _, b in wide], sizes)) + 1
        x = self.block(e.x, (*before, (start, stop), *after))
        shaped = x.reshape(*extents(before), *extents(wide), *extents(after))
        cut = tuple(slice(*ends) for ends in inner[lead + 1 :])
        return shaped[(slice(None),) * (at + lead + 1) + cut]

    def _merge(self, e: Merge, box: Box) -> Array:
        at = e.type.names.index(e.into)
        sizes = e.x.type.shape[at : at + len(e.axes)]
        before, after = box[:at], box[at + 1 :]
        parts = [
            self.block(e.x, (*before, *inner, *after)).reshape(
                *extents(before), -1, *extents(after)
            )
            for inner in flat_boxes(sizes, *box[at])
        ]
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=at)

    # --- orders and fits

    def _take(self, e: Take, box: Box) -> Array:
        at = e.type.names.index(e.axis)
        order = self.block(e.order, (box[at],))
        limit = e.x.type[e.axis].fixed_size
        wrong = order[(order < 0) | (order >= limit)]
        if wrong.size:
            raise e.error(
                f"the order has a position that axis {e.axis!r} has not",
                expected=f"0 to {limit - 1}",
                found=str(int(wrong[0])),
            )
        if at:
            low, high = int(order.min()), int(order.max()) + 1
            x = self.block(e.x, (*box[:at], (low, high), *box[at + 1 :]))
            return np.take(x, order - low, axis=at)
        ordered = np.empty(extents(box), e.type.dtype.numpy)
        for start, stop, places in runs(order):
            ordered[places] = self.block(e.x, ((start, stop), *box[1:]))
        return ordered

    def _permutation(self, e: Permutation, box: Box) -> Array:
        words = random.box_words(e.key, e.type.shape, whole(e.type))
        return np.argsort(words, kind="stable").astype(np.int32)[slice(*box[0])]

    def _clusters(self, e: Clusters, box: Box) -> Array:
        count = e.type.shape[0]

        def rows(start: int, stop: int) -> Array:
            return self.block(e.counts, ((start, stop), (0, count)))

        def compute() -> Array:
            return cluster_order(rows, count, e.first, e.groups)

        return remembered(e, self._read, compute)[slice(*box[0])]

    def _aligned(self, e: Aligned, box: Box) -> Array:
        def rows(x: Expr) -> Array:
            values = np.moveaxis(self.block(x, whole(x.type)), x.type.names.index(e.axis), 0)
            return values.reshape(len(values), -1).astype(np.float64)

        def compute() -> Array:
            count = len(e.xs) // 2
            pairs = zip(e.xs[:count], e.xs[count:], strict=True)
            scores = sum(rows(reference) @ rows(x).T for x, reference in pairs)
            try:
                return matched_order(np.asarray(scores))
            except ValueError:
                raise e.error("weights that are not finite have no nearest order") from None

        return remembered(e, self._read, compute)[slice(*box[0])]

    def _fitted(self, e: Fitted, box: Box) -> Array:
        def compute() -> Array:
            parts = (self.block(x, whole(x.type)).astype(np.float64) for x in e.operands)
            try:
                return fitted_rows(*parts, ridge=e.ridge, std=e.std)
            except np.linalg.LinAlgError:
                message = "the covariance with the ridge has no inverse"
                raise e.error(
                    message, hint="statistics of more tokens, or a larger ridge"
                ) from None

        return remembered(e, self._read, compute)[tuple(slice(*ends) for ends in box)]

    # --- arithmetic

    def _operand(self, x: Expr, type: TensorType, box: Box) -> Array:
        """Return operand `x` of a node of `type`, with all its axes, broadcast ones of size 1."""
        values = self.block(x, project(box, type, x.type))
        return align(values, x.type.names, type.names)

    def _scale(self, e: Scale, box: Box) -> Array:
        x = self.block(e.x, box)
        wide = _widened(x, e.type.dtype)
        with _overflow(e):
            # What was widened is nobody else's.
            out = None if wide is x else wide
            return np.asarray(np.multiply(wide, wide.dtype.type(e.factor), out=out))

    def _cast(self, e: Cast, box: Box) -> Array:
        x = self.block(e.x, box)
        rounded = round_to(x, e.dtype)
        # float32 and float64 hold every narrower float, so only narrowing overflows.
        is_wider = rounded.dtype.itemsize > max(x.dtype.itemsize, 2)
        if is_wider or first_nonfinite(rounded) is None:
            return rounded
        with np.errstate(invalid="ignore"):  # a signalling NaN
            over = np.isfinite(x) & ~np.isfinite(rounded)
        if not over.any():
            return rounded
        position = np.unravel_index(int(np.argmax(over)), over.shape)
        index = [int(at) + start for at, (start, _) in zip(position, box, strict=True)]
        raise ValuesOverflow(
            e.error(
                f"values overflow {e.dtype}",
                found=f"{float(x[position])} at {index}",
                hint="choose an element type with a larger range, bf16 or f32",
            ).problems
        )

    def _binary(self, e: Binary, box: Box) -> Array:
        (x, y), dtype = (self._operand(x, e.type, box) for x in e.operands), e.type.dtype
        a, b = _widened(x, dtype), _widened(y, dtype)
        # What was widened is nobody else's.
        out = a if a is not x and a.shape == extents(box) else None
        with _overflow(e):
            return e.compute(a, b, out)

    def _select(self, e: Select, box: Box) -> Array:
        mask, a, b = (self._operand(x, e.type, box) for x in e.operands)
        if e.a.type.dtype is not e.b.type.dtype:
            a, b = (widen(x, e.type.dtype) for x in (a, b))
        return np.asarray(np.broadcast_to(np.where(mask, a, b), extents(box)))

    def _moment(self, e: Moment, box: Box) -> Array:
        return self._moments.moment(self.block, e, box).astype(e.type.dtype.numpy)


def _widened(values: Array, dtype: DType) -> Array:
    """Return `values` in `dtype`: the very array if it has that type, else a new one."""
    return values if values.dtype == dtype.numpy else widen(values, dtype)


@contextmanager
def _overflow(expr: Expr) -> Iterator[None]:
    """Turn an overflow of arithmetic into an error; operands that are infinite are not one."""
    try:
        with np.errstate(over="raise", invalid="ignore", under="ignore"):
            yield
    except FloatingPointError:
        message = f"values overflow {expr.type.dtype}"
        raise ValuesOverflow(expr.error(message).problems) from None


_RULES: dict[type[Expr], Callable[[Evaluator, Any, Box], Array]] = {
    Source: Evaluator._source,
    Full: Evaluator._full,
    Normal: Evaluator._draw,
    TruncatedNormal: Evaluator._draw,
    Uniform: Evaluator._draw,
    Subset: Evaluator._subset,
    Tile: Evaluator._tile,
    Stack: Evaluator._stack,
    Concat: Evaluator._concat,
    Index: Evaluator._index,
    Slice: Evaluator._slice,
    Split: Evaluator._split,
    Merge: Evaluator._merge,
    Rename: Evaluator._rename,
    Permute: Evaluator._permute,
    Scale: Evaluator._scale,
    Cast: Evaluator._cast,
    Add: Evaluator._binary,
    Mul: Evaluator._binary,
    Minimum: Evaluator._binary,
    Select: Evaluator._select,
    Moment: Evaluator._moment,
    Take: Evaluator._take,
    Permutation: Evaluator._permutation,
    Clusters: Evaluator._clusters,
    Aligned: Evaluator._aligned,
    Fitted: Evaluator._fitted,
}
