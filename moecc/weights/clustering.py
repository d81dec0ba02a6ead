"""Balanced clusters of neurons by how often they are active together.

After CMoE (2502.04416, §3): neurons that are active at most tokens come first, the others are
divided into clusters of equal size.  The distance of a neuron from a cluster is that of the vectors
that say at which tokens a neuron is active, and follows from the counts of pairs alone:
‖m_i − c‖² = A_ii − 2/n Σ_j A_ij + 1/n² Σ_jk A_jk over the n members j, k.  All sums are of whole
numbers below 2⁵³, so they are exact in any order, and the result is the same on every machine.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from moecc.types.arrays import Array, Doubles

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
    rates = np.concatenate([_diagonal(rows, start, stop) for start, stop in _chunks(neurons)])
    # Equal rates keep the order of their numbers.
    by_rate = np.argsort(-rates, kind="stable")
    leading, rest = by_rate[:first], np.sort(by_rate[first:])
    if groups == 1:
        return np.concatenate([leading, rest]).astype(np.int32)
    member = _seeded(rows, rates, rest, groups)
    for _ in range(ROUNDS):
        moved = _assigned(_distances(rows, rates, rest, member, groups))
        if np.array_equal(moved, member):
            break
        member = moved
    inside = np.argsort(member, kind="stable")
    return np.concatenate([leading, rest[inside]]).astype(np.int32)


def _chunks(neurons: int) -> list[tuple[int, int]]:
    return [(start, min(start + _ROWS, neurons)) for start in range(0, neurons, _ROWS)]


def _diagonal(rows: Rows, start: int, stop: int) -> Doubles:
    return np.diagonal(rows(start, stop), offset=start).astype(np.float64)


def _seeded(rows: Rows, rates: Doubles, rest: Array, groups: int) -> Array:
    """Return first clusters, around neurons that are far apart.

    The first is the most active one, each next one is the farthest from those before: the most
    active neurons alone, as in CMoE, may all be of one cluster.
    """
    seed = int(rest[np.argmax(rates[rest])])
    far = []
    for _ in range(groups):
        together = rows(seed, seed + 1)[0, rest].astype(np.float64)
        far.append(rates[rest] + rates[seed] - 2 * together)
        seed = int(rest[np.argmax(np.min(far, axis=0))])
    return _assigned(np.stack(far, axis=1))


def _distances(rows: Rows, rates: Doubles, rest: Array, member: Array, groups: int) -> Doubles:
    """Return the squared distance of each of `rest` from each cluster, ``[rest, groups]``."""
    size = len(rest) // groups
    inside = np.zeros((len(rates), groups))
    inside[rest, member] = 1.0
    sums = np.concatenate(
        [rows(a, b).astype(np.float64) @ inside for a, b in _chunks(len(rates))]
    )[rest]  # fmt: skip
    within = (sums * inside[rest]).sum(axis=0)
    return np.asarray(rates[rest][:, None] - 2 / size * sums + within / size**2)


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
