"""Which experts stay, and which become one, by statistics of the model."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from moecc.errors import Problem
from moecc.pipeline.passes import NO_STATISTICS, Context
from moecc.types.arrays import Doubles
from moecc.types.dtypes import F32
from moecc.types.tensor import Axis, TensorType
from moecc.weights.branches import STATISTICS, name_in
from moecc.weights.expr import Source
from moecc_passes.resize.anatomy import EXPERT, Anatomy


def statistic(layer: Anatomy, name: str, ctx: Context) -> Doubles | None:
    """Return a statistic of the experts of a layer, ``[expert, …]``; None on reduced sizes."""
    axes = [Axis(EXPERT, layer.experts)]
    if name == "experts.result":
        axes.append(Axis("embed", _embed(layer)))
    type = TensorType(F32, tuple(axes))
    found = ctx.read(Source(name_in(STATISTICS, f"{layer.name}.{name}"), type))
    return None if found is None else found.astype(np.float64)


def unread(layer: Anatomy, name: str, ctx: Context) -> Iterator[Problem]:
    """Yield why a statistic of a layer cannot be read."""
    if ctx.statistics is None:
        yield NO_STATISTICS
        return
    shape = (layer.experts, _embed(layer)) if name == "experts.result" else (layer.experts,)
    problem = ctx.statistics.problem(layer.name, {name: shape})
    if problem is not None:
        yield problem


def _embed(layer: Anatomy) -> int:
    result = layer.layer.combine.result.type
    (size,) = (a.size for a in result if a.name not in layer.layer.tokens)
    assert isinstance(size, int), "the width of a model is known"
    return size


def largest(values: Doubles, count: int) -> tuple[int, ...]:
    """Return the numbers of the largest values, in ascending order; of equal ones the first."""
    return tuple(sorted(np.argsort(-values, kind="stable")[:count].tolist()))


def alike(results: Doubles, size: int) -> list[tuple[int, ...]]:
    """Return groups of `size` experts whose mean results are near each other, in order.

    The nearest two of those left begin a group, and the nearest to its mean join it.

    Args:
      results: the mean result of each expert, ``[expert, embed]``; `size` divides their number.
      size: the experts of a group.
    """
    left = list(range(len(results)))
    groups = []
    while left:
        group = _nearest_pair(results, left) if len(left) > 1 else list(left)
        while len(group) < size:
            mean = results[group].mean(0)
            rest = [number for number in left if number not in group]
            group.append(min(rest, key=lambda n: float(np.sum((results[n] - mean) ** 2))))
        groups.append(tuple(sorted(group)))
        left = [number for number in left if number not in group]
    return sorted(groups)


def _nearest_pair(results: Doubles, left: list[int]) -> list[int]:
    some = results[left]
    far = ((some[:, None] - some[None]) ** 2).sum(2)
    far[np.tril_indices(len(left))] = np.inf
    first, second = np.unravel_index(int(np.argmin(far)), far.shape)
    return [left[int(first)], left[int(second)]]
