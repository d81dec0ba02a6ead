"""A slip in each method of conversion, which its law must show.

A mutant is a function of moecc, and what stands in its place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from moecc_passes.resize import layer as rebuild
from moecc_passes.resize import passes as resizing
from moecc_passes.upcycle import rewrite, upcycle
from moecc_passes.upcycle import routers as lift

import moecc.weights.evaluate as evaluating
from moecc.formats import adapter
from moecc.types import Array, TensorType
from moecc.weights import fits as fitting
from moecc.weights.arithmetic import Scale
from moecc.weights.expr import Expr
from moecc.weights.movement import I32, Permutation, Take

from . import method_laws as laws


@dataclass(frozen=True)
class Mutant:
    """What is put in the place of a function: its module, its name, and what is."""

    module: Any
    name: str
    wrong: Any


def identity(weight: Expr, *rest: object, **others: object) -> Expr:
    return weight


def unsorted(self: Any, weight: Expr, *, is_last: bool = False) -> Expr:
    """The order of the neurons is forgotten in the last matrix."""
    return weight if is_last else ORDERED(self, weight, is_last=is_last)


def copied(weight: Expr, axis: str, count: int, *, with_zeros: bool) -> Expr:
    return PADDED(weight, axis, count, with_zeros=False)


def by_rate(rows: Any, neurons: int, first: int, groups: int) -> Array:
    """Clusters of neurons that are active as often, not together."""
    rates = np.array([rows(n, n + 1)[0, n] for n in range(neurons)])
    return np.argsort(-rates, kind="stable").astype(np.int32)


def another_order(self: Any, weight: Expr, *, is_last: bool = False) -> Expr:
    """The neurons of the last matrix are in an order of their own."""
    if not is_last:
        return weight
    order = Permutation(TensorType(I32, (weight.type[self.inner],)), 7)
    return Take(weight, self.inner, order)


def with_the_mean(
    covariance: Array, mean: Array, cross: Array, *, ridge: float, std: float
) -> Array:
    """Where the mean input points is not taken away."""
    rows = FITTED(covariance, 0 * mean, cross, ridge=ridge, std=std)
    return np.asarray(rows)


def not_centred(covariance: Array, mean: Array, cross: Array, *, ridge: float, std: float) -> Array:
    return FITTED(covariance + np.outer(mean, mean), mean, cross, ridge=ridge, std=std)


def first_model(weight: Expr, division: Any, models: Any, *, is_last: bool = False) -> Expr:
    return BRANCHED(weight, division, models[::-1][1:] + models[-1:], is_last=is_last)


def unscaled(self: Any, module: str, rank: int) -> float:
    """α alone, as if it were the factor."""
    return float(self.settings.lora_alpha)


def awake(self: Any, param: Any, is_last: bool, parts: list[Expr]) -> list[Expr]:
    """The bias is forgotten."""
    return parts


def not_zero(self: Any, param: Any, is_last: bool, parts: list[Expr]) -> list[Expr]:
    """The last matrix of a zero expert is a copy."""
    return CHANGED(self, param, is_last and param is self.param, parts)


def summed(parts: Any) -> Expr:
    return Scale(MEAN(parts), float(len(parts)))


def neighbours(found: Array, size: int) -> list[tuple[int, ...]]:
    return [tuple(range(at, at + size)) for at in range(0, len(found), size)]


def smallest(values: Array, count: int) -> tuple[int, ...]:
    return tuple(sorted(np.argsort(values, kind="stable")[:count].tolist()))


def draws_for_each(self: Any, name: str, dense_weight: Expr, experts: Expr) -> Expr:
    """Each matrix has a set of neurons of its own, as the published code has it."""
    return DROPPED(replace(self, block=f"{self.block}/{name}"), name, dense_weight, experts)


ORDERED, PADDED, BRANCHED = lift.Division.ordered, lift.padded, lift.branched
FITTED, CHANGED, MEAN = fitting.fitted_rows, rebuild.Dormant.changed, rebuild.mean
DROPPED = lift.Drop.apply

METHODS: dict[str, tuple[Callable[[int], None], tuple[Mutant, ...]]] = {
    "shared": (laws.shared, (Mutant(rewrite, "scaled", identity),)),
    "virtual groups": (laws.virtual_groups, (Mutant(rewrite, "scaled", identity),)),
    "padding": (laws.padding, (Mutant(lift, "padded", copied),)),
    "random split": (laws.split, (Mutant(lift.Division, "ordered", unsorted),)),
    "index split": (laws.index_split, (Mutant(lift.Division, "ordered", another_order),)),
    "activation split": (laws.activation_split, (Mutant(evaluating, "cluster_order", by_rate),)),
    "ridge": (laws.fitted_router, (Mutant(evaluating, "fitted_rows", not_centred),)),
    "centroids": (laws.centroids, (Mutant(evaluating, "fitted_rows", with_the_mean),)),
    "BTX": (
        laws.several_models,
        (
            Mutant(upcycle, "average_rest", lambda *_: None),
            Mutant(rewrite, "branched", first_model),
        ),
    ),
    "LoRA": (laws.lora, (Mutant(adapter._AdapterReading, "_scale", unscaled),)),
    "grow": (laws.growth, (Mutant(rebuild, "scaled", identity),)),
    "grow, same choices": (laws.growth_by_bias, (Mutant(rebuild.Dormant, "changed", awake),)),
    "zero experts": (
        laws.zeros,
        (Mutant(rebuild.Dormant, "changed", awake), Mutant(rebuild.Dormant, "changed", not_zero)),
    ),
    "merge": (laws.merging, (Mutant(resizing, "mean", summed),)),
    "merge by result": (laws.merging_by_results, (Mutant(resizing, "alike", neighbours),)),
    "REAP": (laws.pruning, (Mutant(resizing, "largest", smallest),)),
    "to-dense": (laws.one_dense_block, (Mutant(resizing, "mean", summed),)),
    "drop": (laws.dropping, (Mutant(lift.Drop, "apply", draws_for_each),)),
}
"""The law of each method, and its mutants."""
