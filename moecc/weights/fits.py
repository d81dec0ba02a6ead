"""The expression of a router that is fitted to data."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite, prod
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary, ref

from moecc.support.lazy import np
from moecc.types import BF16, F32, F64, Array, Doubles, TensorType
from moecc.weights.arithmetic import Moment, widen
from moecc.weights.expr import Box, Expr, align, node, project
from moecc.weights.expr import computed_dtype as computed


@node
class Fitted(Expr):
    """The rows of a router, from covariances of its input.

    ``fitted(covariance, mean, cross, ridge=0.01, std=0.02)``.  With Σ the covariance of the input,
    and c the covariance of the input with what each expert is to score, the rows are those of
    ridge regression, (Σ + λ tr(Σ)/d · I)⁻¹ c; without ``ridge`` they are c itself, which for the
    tokens of several texts is the direction of each text's centroid.  Then what all rows share is
    subtracted, which no softmax sees; so is the part along the mean of the input, so that no
    expert is preferred on average; and they are scaled so that the logits have a standard deviation
    of ``std`` over tokens and experts.  They are rounded to bf16, so that they do not depend on the
    last bits of a library's linear algebra.

    Attributes:
      covariance: of the input, ``[embed, other]``, symmetric.
      mean: of the input, ``[embed]``.
      cross: the covariances with the targets, ``[expert, embed]``.
      ridge: λ, in units of the mean variance of the input; 0 for centroids.
      std: the standard deviation of the logits.
    """

    syntax = "fitted({covariance}, {mean}, {cross}, ridge={ridge}, std={std})"
    covariance: Expr
    mean: Expr
    cross: Expr
    ridge: float
    std: float

    def _infer(self) -> TensorType:
        computed(self, *self.operands)
        embed = self.mean.type.axes
        if self.mean.type.rank != 1 or self.cross.type.axes[1:] != embed:
            raise self.error(
                "the covariances are of the input",
                expected=f"[expert, {embed[0]}]",
                found=str(self.cross.type),
            )
        if self.covariance.type.shape != (embed[0].size, embed[0].size):
            raise self.error(
                "a covariance is a square of the input's axis",
                expected=f"[{embed[0]}, …]",
                found=str(self.covariance.type),
            )
        for name, value in (("ridge", self.ridge), ("std", self.std)):
            if not (isfinite(value) and value >= 0):
                raise self.error(f"{name} is not a size", expected="0 or more", found=str(value))
        return self.cross.type.with_dtype(F32)


# Values of expressions that are computed as a whole, and kept for the next tensor that needs them.
#
# An order is needed by every matrix of a block, and by each of its experts.

MAX_KEPT_BYTES = 1 << 22
"""Larger values are computed again."""

_kept: WeakKeyDictionary[Expr, tuple[ref[object], Array]] = WeakKeyDictionary()
_lock = threading.RLock()
"""Held while a value is computed, which may need others: a matrix for each thread that asks for
the same order would take its memory many times."""


def remembered(expr: Expr, reader: object, compute: Callable[[], Array]) -> Array:
    """Return the value of `expr` over a checkpoint, computed once while both exist.

    Args:
      expr: the expression.
      reader: reads its sources: a method of the checkpoint, or a function.
      compute: computes the value.
    """
    owner = getattr(reader, "__self__", reader)
    with _lock:
        entry = _kept.get(expr)
        if entry is not None and entry[0]() is owner:
            return entry[1]
        value = compute()
        if value.nbytes <= MAX_KEPT_BYTES:
            _kept[expr] = (ref(owner), value)
    return value


def fitted_rows(
    covariance: Doubles, mean: Doubles, cross: Doubles, *, ridge: float, std: float
) -> Array:
    """Return the rows of a router, ``[expert, embed]``; see `moecc.weights.fits.Fitted`."""
    rows = cross
    unit = float(np.trace(covariance)) / len(mean)
    if ridge and unit > 0:
        regular = covariance.copy()
        np.einsum("ii->i", regular)[:] += ridge * unit
        rows = np.asarray(np.linalg.solve(regular, cross.T).T, np.float64)
    rows = rows - rows.mean(axis=0)
    length = float(mean @ mean)
    if length:
        rows = rows - np.outer(rows @ mean / length, mean)
    variance = float(np.einsum("ed,dc,ec->", rows, covariance, rows)) / len(rows)
    # Where the input says nothing of the targets, all rows are zero, or noise of rounding.
    scale = std / variance**0.5 if variance > 0 else 0.0
    return np.asarray((rows * scale).astype(BF16.numpy), np.float32)


def matched_order(scores: Doubles) -> Array:
    """Return the order of the largest sum of scores, an optimal assignment.

    Args:
      scores: the score of each position and neuron, ``[position, neuron]``.

    Raises:
      ValueError: a score is not finite.
    """
    from scipy.optimize import linear_sum_assignment

    return np.asarray(linear_sum_assignment(scores, maximize=True)[1], np.int32)


# Balanced clusters of neurons by how often they are active together.
#
# After CMoE (2502.04416, §3): neurons that are active at most tokens come first, the others are
# divided into clusters of equal size.  The distance of a neuron from a cluster is that of the
# vectors that say at which tokens a neuron is active, and follows from the counts of pairs alone:
# ‖m_i − c‖² = A_ii − 2/n Σ_j A_ij + 1/n² Σ_jk A_jk over the n members j, k.  All sums are of whole
# numbers below 2⁵³, so they are exact in any order, and the result is the same on every machine.

ROUNDS = 10
"""Assignments after which the clusters are taken as they are; most settle before."""

Rows = Callable[[int, int], Array]
"""Returns rows [start, stop) of the counts."""

_ROWS = 1024
"""Rows that are widened at a time."""


def cluster_order(rows: Rows, neurons: int, first: int, groups: int) -> Array:
    """Return the order ``[neurons]``: the most active first, then cluster by cluster.

    Args:
      rows: the counts of pairs, ``[neurons, neurons]``, by rows.
      neurons: their number.
      first: how many come first, by how often they are active.
      groups: the clusters of the others, of equal size.
    """
    rates = np.concatenate(
        [
            np.diagonal(rows(start, stop), offset=start).astype(np.float64)
            for start, stop in _chunks(neurons)
        ]
    )
    # Equal rates keep the order of their numbers.
    by_rate = np.argsort(-rates, kind="stable")
    leading, others = by_rate[:first], np.sort(by_rate[first:])
    if groups == 1:
        return np.concatenate([leading, others]).astype(np.int32)
    member = _seeded(rows, rates, others, groups)
    for _ in range(ROUNDS):
        moved = _assigned(_distances(rows, rates, others, member, groups))
        if np.array_equal(moved, member):
            break
        member = moved
    inside = np.argsort(member, kind="stable")
    return np.concatenate([leading, others[inside]]).astype(np.int32)


def _chunks(neurons: int) -> list[tuple[int, int]]:
    return [(start, min(start + _ROWS, neurons)) for start in range(0, neurons, _ROWS)]


def _seeded(rows: Rows, rates: Doubles, others: Array, groups: int) -> Array:
    """Return first clusters, around neurons that are far apart.

    The first is the most active one, each next one is the farthest from those before: the most
    active neurons alone, as in CMoE, may all be of one cluster.
    """
    seed = int(others[np.argmax(rates[others])])
    far = []
    for _ in range(groups):
        together = rows(seed, seed + 1)[0, others].astype(np.float64)
        far.append(rates[others] + rates[seed] - 2 * together)
        seed = int(others[np.argmax(np.min(far, axis=0))])
    return _assigned(np.stack(far, axis=1))


def _distances(rows: Rows, rates: Doubles, others: Array, member: Array, groups: int) -> Doubles:
    """Return the squared distance of each of `others` from each cluster, ``[rest, groups]``."""
    size = len(others) // groups
    inside = np.zeros((len(rates), groups))
    inside[others, member] = 1.0
    sums = np.concatenate([rows(a, b).astype(np.float64) @ inside for a, b in _chunks(len(rates))])[
        others
    ]
    within = (sums * inside[others]).sum(axis=0)
    return np.asarray(rates[others][:, None] - 2 / size * sums + within / size**2)


def _assigned(distances: Doubles) -> Array:
    """Return the cluster of each neuron, all of one size; who loses most chooses first."""
    count, groups = distances.shape
    best = np.sort(distances, axis=1)
    eager = np.argsort(best[:, 0] - best[:, 1], kind="stable")
    wishes = np.argsort(distances, axis=1, kind="stable")
    room = [count // groups] * groups
    member = np.empty(count, np.int64)
    for neuron in eager.tolist():
        chosen = next(group for group in wishes[neuron].tolist() if room[group])
        room[chosen] -= 1
        member[neuron] = chosen
    return member


# Means and standard deviations whose bytes do not depend on the division into blocks.

Counts: TypeAlias = "np.ndarray[Any, np.dtype[np.int64]]"
Block = Callable[[Expr, Box], Array]
Ranges = dict[str, tuple[int, int]]

_WORK_ELEMENTS = 1 << 19
"""How many elements are widened to float64 at a time, 4 MiB."""

_REMEMBERED = 4096
_REMEMBERED_BYTES = 1 << 16


class MomentCache:
    """Computes moments and caches small results, which each block of a tensor needs again."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: OrderedDict[tuple[Moment, Box], Doubles] = OrderedDict()

    def moment(self, block: Block, e: Moment, box: Box) -> Doubles:
        """Return a moment in float64, for the kept positions in `box`.

        Args:
          block: evaluates a box of an expression.
          e: the moment.
          box: a range of each kept axis.
        """
        with self._lock:
            cached = self._known.get((e, box))
        if cached is not None:
            return cached
        moments = self._computed(block, e, box)
        if moments.nbytes <= _REMEMBERED_BYTES:
            with self._lock:
                self._known[e, box] = moments
                if len(self._known) > _REMEMBERED:
                    self._known.popitem(last=False)
        return moments

    def _computed(self, block: Block, e: Moment, box: Box) -> Doubles:
        """Return a moment, of a few kept positions at a time, in the order in which x is stored."""
        cut = _cut(e, box)
        if cut is not None:
            at, step = cut
            start, stop = box[at]
            pieces = [
                self._computed(block, e, (*box[:at], (i, min(i + step, stop)), *box[at + 1 :]))
                for i in range(start, stop, step)
            ]
            return np.concatenate(pieces, axis=at)
        if e.kind == "mean":
            return _mean(block, e, box, None)
        centre = self.moment(block, Moment("mean", e.x, e.mask, e.keep), box)
        return np.asarray(np.sqrt(_mean(block, e, box, centre)))


def _cut(e: Moment, box: Box) -> tuple[int, int] | None:
    """Return which kept axis to divide, and into pieces of how many; None if all is small enough.

    The outermost axis of x first: its pieces lie together.
    """
    ranges = dict(zip(e.keep, box, strict=True))
    elements = prod(
        ranges[n][1] - ranges[n][0] if n in ranges else size
        for n, size in zip(e.x.type.names, e.x.type.shape, strict=True)
    )
    for name in e.x.type.names if elements > _WORK_ELEMENTS else ():
        start, stop = ranges.get(name, (0, 1))
        if stop - start > 1:
            return e.keep.index(name), max(1, _WORK_ELEMENTS * (stop - start) // elements)
    return None


def _mean(block: Block, e: Moment, box: Box, centre: Doubles | None) -> Doubles:
    """Return the mean over the reduced axes of x, or of its squared distance from `centre`."""
    ranges = dict(zip(e.keep, box, strict=True))
    reduced = tuple(name for name in e.x.type.names if name not in e.keep)
    total, count = _MomentSums(block, e, centre).sums(ranges, reduced)
    return np.asarray(np.divide(total, count, out=np.zeros_like(total), where=count > 0))


@dataclass(frozen=True)
class _MomentSums:
    """Sums the elements that count, axis after axis, the last first."""

    block: Block
    e: Moment
    centre: Doubles | None

    def sums(self, ranges: Ranges, reduced: tuple[str, ...]) -> tuple[Doubles, Counts]:
        """Return sums and numbers of elements, with the axes of `ranges` in their order."""
        sizes = [self.e.x.type.shape[self.e.x.type.names.index(name)] for name in reduced]
        elements = prod(stop - start for start, stop in ranges.values()) * prod(sizes)
        if not reduced or elements <= _WORK_ELEMENTS:
            return self.direct(ranges, reduced)
        step = max(1, _WORK_ELEMENTS * sizes[0] // elements)
        parts = [
            self.sums({**ranges, reduced[0]: (at, min(at + step, sizes[0]))}, reduced[1:])
            for at in range(0, sizes[0], step)
        ]
        total = np.concatenate([part for part, _ in parts], axis=-1)
        return _fold(total), np.concatenate([n for _, n in parts], axis=-1).sum(axis=-1)

    def direct(self, ranges: Ranges, reduced: tuple[str, ...]) -> tuple[Doubles, Counts]:
        x = self.e.x.type
        box = tuple(ranges.get(n, (0, size)) for n, size in zip(x.names, x.shape, strict=True))
        order = (*ranges, *reduced)
        values = widen(align(self.block(self.e.x, box), x.names, order), F64)
        if self.centre is not None:
            centre = self.centre.reshape(self.centre.shape + (1,) * (x.rank - self.centre.ndim))
            with np.errstate(invalid="ignore"):  # ∞ − ∞, in a source that may hold infinity
                values -= centre
            values *= values
        counted = np.ones((1,) * x.rank, bool)
        if self.e.mask is not None:
            mask = self.e.mask.type
            counted = align(self.block(self.e.mask, project(box, x, mask)), mask.names, order)
            values = np.where(counted, values, 0.0)
        count = np.broadcast_to(counted, values.shape).sum(
            axis=tuple(range(len(ranges), x.rank)), dtype=np.int64
        )
        for _ in reduced:
            values = _fold(values)
        return values, np.asarray(count)


def _fold(values: Doubles) -> Doubles:
    """Sum the last axis, halving it again and again.

    The tree of additions depends on the length alone: `numpy.sum` may add in another order on
    another processor.
    """
    while values.shape[-1] > 1:
        half = values.shape[-1] // 2
        odd = values[..., 2 * half :]
        values = values[..., :half] + values[..., half : 2 * half]
        values[..., : odd.shape[-1]] += odd
    return values[..., 0] if values.shape[-1] else np.zeros(values.shape[:-1])
