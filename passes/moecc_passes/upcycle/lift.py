"""Lift the weights of a dense block to those of its experts.

A dense matrix is cut along the inner axis into the neurons of the shared expert and the rest, the
rest into G slices, and the slices are repeated E times, so that expert i holds slice i mod G.
The factor that the gates require is multiplied in, and copies are perturbed if the options say so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal

from moecc.types.dtypes import F32, PRED
from moecc.types.tensor import Axis, TensorType
from moecc.weights.arithmetic import Add, Moment, Mul, Scale, Select
from moecc.weights.branches import read_from
from moecc.weights.draws import Normal, Subset, derive_key
from moecc.weights.expr import Expr
from moecc.weights.movement import Concat, Merge, Permute, Slice, Split, Tile
from moecc.weights.orders import Take

_MOMENTS: tuple[Literal["mean", "std"], ...] = ("mean", "std")


@dataclass(frozen=True)
class Division:
    """How the neurons of one block are divided.

    Attributes:
      inner: the name of the axis of neurons.
      shared: the number of neurons of the shared expert, the first ones.
      slices: G, the slices that the other neurons are cut into.
      copies: E, how often each slice is stored.
      width: the neurons of one expert.
      order: the order that the neurons are put in before they are divided; None for their own.
    """

    inner: str
    shared: int
    slices: int
    copies: int
    width: int
    order: Expr | None = None

    @property
    def experts(self) -> int:
        """N = E · G, the stored experts."""
        return self.copies * self.slices

    @property
    def dense(self) -> int:
        """The neurons of the dense block."""
        return self.shared + self.slices * self.width

    def ordered(self, weight: Expr) -> Expr:
        """Return a dense weight with its neurons in the order in which they are divided."""
        if self.order is None or self.inner not in weight.type:
            return weight
        return Take(weight, self.inner, self.order)


def shared_part(weight: Expr, division: Division) -> Expr:
    """Return the part of a dense weight that belongs to the shared expert."""
    if division.inner not in weight.type:
        return weight
    return Slice(division.ordered(weight), division.inner, 0, division.shared)


def lifted(weight: Expr, division: Division) -> Expr:
    """Return a dense weight lifted over a leading axis ``expert``; an output bias is repeated."""
    inner = division.inner
    if inner not in weight.type:
        return Tile(weight, "expert", division.experts)
    weight = division.ordered(weight)
    if division.shared:
        weight = Slice(weight, inner, division.shared, division.dense)
    if division.slices == 1:
        return Tile(weight, "expert", division.copies)
    names = weight.type.names
    cut = Split(weight, inner, (("part", division.slices), (inner, division.width)))
    first = Permute(cut, ("part", *names))
    return Merge(Tile(first, "copy", division.copies), ("copy", "part"), "expert")


def branched(weight: Expr, division: Division, models: Sequence[str]) -> Expr:
    """Return a dense weight lifted over ``expert``, each copy from the model of its number."""
    one = replace(division, copies=1)
    return Concat(tuple(lifted(read_from(weight, model), one) for model in models), "expert")


def scaled(weight: Expr, factor: float) -> Expr:
    """Return `weight` times `factor`."""
    return weight if factor == 1 else Scale(weight, factor)


@dataclass(frozen=True)
class Noise:
    """Adds normal noise to every expert, each its own (Sparse Upcycling variants).

    Attributes:
      std: its standard deviation, absolute or in units of that of the dense tensor.
      relative: which of the two.
      seed: the seed of the conversion.
      block: the location of the block, by which the draws are keyed.
    """

    std: float
    relative: bool
    seed: int
    block: str

    def apply(self, name: str, dense: Expr, experts: Expr) -> Expr:
        """Return `experts`, made from the parameter `name` with the weight `dense`, with noise."""
        if self.std == 0:
            return experts
        key = derive_key(self.seed, f"{self.block}/{name}/noise")
        draw: Expr = Normal(_floats(experts.type), std=self.std, mean=0.0, key=key)
        if self.relative:
            draw = Mul(draw, Moment("std", dense))
        return Add(experts, draw)


@dataclass(frozen=True)
class Drop:
    """Redraws a share of the neurons of every expert (Drop-Upcycling, 2502.19261).

    One index set serves all matrices of an expert.  The new entries are normal, with the mean and
    standard deviation of those that they replace.

    Attributes:
      ratio: the share of neurons that are redrawn.
      seed: the seed of the conversion.
      block: the location of the block, by which the index sets are keyed.
      division: how the neurons are divided.
    """

    ratio: float
    seed: int
    block: str
    division: Division

    def apply(self, name: str, dense: Expr, experts: Expr) -> Expr:
        """Return `experts`, made from the parameter `name`, with some neurons redrawn."""
        division = self.division
        # The ratio is taken as the decimal number that was written: 0.29 of 100 neurons are 29.
        count = int(Fraction(repr(self.ratio)) * division.width)
        if count == 0 or division.inner not in experts.type:
            return experts
        axes = (Axis("expert", division.experts), Axis(division.inner, division.width))
        chosen = Subset(
            TensorType(PRED, axes),
            division.inner,
            count,
            key=derive_key(self.seed, f"{self.block}/drop"),
        )
        key = derive_key(self.seed, f"{self.block}/{name}/drop")
        normal = Normal(_floats(experts.type), std=1.0, mean=0.0, key=key)
        mean, std = (Moment(kind, experts, chosen, ("expert",)) for kind in _MOMENTS)
        return Select(chosen, Add(Mul(normal, std), mean), experts)


def _floats(type: TensorType) -> TensorType:
    return type.with_dtype(F32)
