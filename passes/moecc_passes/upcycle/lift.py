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

from moecc.types import F32, PRED, Axis, TensorType
from moecc.weights.arithmetic import Add, Moment, Mul, Scale, Select, read_from
from moecc.weights.draws import Normal, Subset, derive_key
from moecc.weights.expr import Expr, Full
from moecc.weights.movement import Concat, Merge, Permute, Slice, Split, Take, Tile

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
      padding: the neurons that are added behind those of the dense block, before they are ordered;
        they add nothing.
    """

    inner: str
    shared: int
    slices: int
    copies: int
    width: int
    order: Expr | None = None
    padding: int = 0

    @property
    def experts(self) -> int:
        """N = E · G, the stored experts."""
        return self.copies * self.slices

    @property
    def dense(self) -> int:
        """The neurons of the dense block, and those that are added."""
        return self.shared + self.slices * self.width

    def ordered(self, weight: Expr, *, is_last: bool = False) -> Expr:
        """Return a dense weight with its neurons in the order in which they are divided.

        Args:
          weight: the weight.
          is_last: whether it is the last matrix, whose part for added neurons is zero; elsewhere
            they are copies, so that the gradient of that part is not.
        """
        if self.inner not in weight.type:
            return weight
        if self.padding:
            weight = padded(weight, self.inner, self.padding, with_zeros=is_last)
        return weight if self.order is None else Take(weight, self.inner, self.order)


def padded(weight: Expr, axis: str, count: int, *, with_zeros: bool) -> Expr:
    """Return `weight` with `count` positions more of an axis: zeros, or copies of the first."""
    more = Slice(weight, axis, 0, count)
    return Concat((weight, Full(0.0, more.type) if with_zeros else more), axis)


def shared_part(weight: Expr, division: Division, *, is_last: bool = False) -> Expr:
    """Return the part of a dense weight that belongs to the shared expert."""
    if division.inner not in weight.type:
        return weight
    ordered = division.ordered(weight, is_last=is_last)
    return Slice(ordered, division.inner, 0, division.shared)


def lifted(weight: Expr, division: Division, *, is_last: bool = False) -> Expr:
    """Return a dense weight lifted over a leading axis ``expert``; an output bias is repeated."""
    inner = division.inner
    if inner not in weight.type:
        return Tile(weight, "expert", division.experts)
    weight = division.ordered(weight, is_last=is_last)
    if division.shared:
        weight = Slice(weight, inner, division.shared, division.dense)
    if division.slices == 1:
        return Tile(weight, "expert", division.copies)
    names = weight.type.names
    cut = Split(weight, inner, (("part", division.slices), (inner, division.width)))
    first = Permute(cut, ("part", *names))
    return Merge(Tile(first, "copy", division.copies), ("copy", "part"), "expert")


def branched(
    weight: Expr, division: Division, models: Sequence[str], *, is_last: bool = False
) -> Expr:
    """Return a dense weight lifted over ``expert``, each copy from the model of its number."""
    single = replace(division, copies=1)
    parts = (lifted(read_from(weight, model), single, is_last=is_last) for model in models)
    return Concat(tuple(parts), "expert")


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
