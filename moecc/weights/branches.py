"""Weights of several models of one architecture: a base, and branches with names.

The tensors of the base have their own names, and those of a branch its name before theirs, so that
an expression over the base becomes one over a branch by renaming its sources.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import reduce
from math import gcd

from moecc.weights.arithmetic import Add, Scale
from moecc.weights.expr import Expr, Source, transform

BASE = "base"
"""The name of the model itself among the branches."""

STATISTICS = "capture"
"""The name of statistics of the model among the models that weights are read from."""

_SEPARATOR = ":"


def name_in(branch: str, tensor: str) -> str:
    """Return the name of a tensor of `branch` among those of all."""
    return tensor if branch == BASE else f"{branch}{_SEPARATOR}{tensor}"


def branch_and_name(name: str) -> tuple[str, str]:
    """Return the branch and the tensor that `name_in` made a name of."""
    branch, separator, tensor = name.partition(_SEPARATOR)
    return (branch, tensor) if separator else (BASE, name)


def is_statistic(name: str) -> bool:
    """Return whether a tensor is a statistic of a model's values, and no weight."""
    return branch_and_name(name)[0] == STATISTICS


def read_from(weight: Expr, branch: str) -> Expr:
    """Return `weight`, over tensors of the base, read from those of `branch`."""

    def renamed(node: Expr) -> Expr:
        # Statistics have a name before theirs already, and are those of the base.
        if not isinstance(node, Source) or _SEPARATOR in node.name:
            return node
        return Source(name_in(branch, node.name), node.type)

    return weight if branch == BASE else transform(weight, renamed)


def mean_over(weight: Expr, branches: Sequence[str]) -> Expr:
    """Return the mean of `weight` over several branches, each as often as it is listed."""
    read = [read_from(weight, branch) for branch in _once(branches)]
    if len(set(read)) == 1:
        return read[0]
    return Scale(reduce(Add, read), 1 / len(read))


def _once(branches: Sequence[str]) -> list[str]:
    """Return the branches, each as few times as keeps their shares: of ``a, b, a, b`` one each."""
    counts = Counter(branches)
    least = gcd(*counts.values())
    return [name for name, count in counts.items() for _ in range(count // least)]
