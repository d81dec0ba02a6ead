"""Sizes on one device, of values and of parameters, under a layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import TypeVar

from moecc.ir.graph import Node, Value
from moecc.plan.networks import PACKED_ROWS
from moecc.plan.parts import Shape, Weight
from moecc.plan.workload import Workload
from moecc.sharding.collectives import Gradients, GradientSum
from moecc.sharding.layout import Layout
from moecc.sharding.propagate import Propagation
from moecc.types import TensorType

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Memo:
    """Remembers what was worked out: many strategies ask the same."""

    _made: dict[object, object] = field(default_factory=dict, repr=False, kw_only=True)

    def once(self, key: object, make: Callable[[], T]) -> T:
        """Return what `make` returned when `key` was first asked for."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]  # type: ignore[return-value]


@dataclass(frozen=True, eq=False)
class Values(Memo):
    """Sizes of values on one device; layouts that only store parameters otherwise share them.

    Attributes:
      layout: the layout.
      work: the model.
      rows: by how much more rows of experts there are than in the graph.
    """

    layout: Layout
    work: Workload
    rows: float = 1.0
    _known: dict[Shape, float] = field(default_factory=dict, repr=False, kw_only=True)

    def elements(self, shape: Shape) -> float:
        """Return the elements on one device of a value that is looked at by itself."""
        found = self._known.get(shape)
        if found is None:
            alone = self.work.sample.alone(shape, self.layout)
            rows = self.rows if shape.has_slots else 1.0
            shards = self.layout.size(m for a in alone.axes for m in a.mesh)
            found = self._known[shape] = shape.elements / shards * rows
        return found


@dataclass(frozen=True, eq=False)
class Sharded(Memo):
    """One layer of each kind under a layout; what is worked out of it serves all strategies.

    Attributes:
      layout: the layout.
      work: the model.
    """

    layout: Layout
    work: Workload

    @property
    def found(self) -> Propagation:
        """How the values are sharded."""
        return self._shard[0]

    @property
    def gradients(self) -> Gradients:
        """What the backward pass sums."""
        return self._shard[1]

    @cached_property
    def _shard(self) -> tuple[Propagation, Gradients]:
        return self.work.sample.shard(self.layout)

    @cached_property
    def gradient_sums(self) -> dict[Node, list[GradientSum]]:
        """The sums of gradients of values, by the node that differs from device to device."""
        found: dict[Node, list[GradientSum]] = {}
        for one in self.gradients.values:
            found.setdefault(one.site.node, []).append(one)
        return found

    def shards(self, type: TensorType) -> int:
        """Return in how many shards a value of `type` is."""
        return self.layout.size(m for a in type.axes for m in a.mesh)

    def value(self, weight: Weight) -> Value:
        """Return the parameter of the sampled layers that `weight` is, or is like."""
        value = self.work.params.get(weight.name)
        return value or self.work.params_by_kind[weight.shape, weight.of_experts]

    def used(self, weight: Weight) -> TensorType:
        """Return the type of a parameter where it is used: sharded over experts and neurons."""
        return self.found.wanted[self.value(weight)]

    def stored(self, weight: Weight) -> TensorType:
        """Return the type of a parameter as it is stored."""
        return self.found.types[self.value(weight)]

    def is_odd(self, weight: Weight) -> bool:
        """Return whether a parameter is gathered for use from shards with odd numbers of rows."""
        used = {m for a in self.used(weight) for m in a.mesh}
        pairs = zip(weight.shape, self.stored(weight), strict=True)
        cut = (s / self.layout.size(a.mesh) for (_, s), a in pairs if set(a.mesh) - used)
        return any(size % PACKED_ROWS for size in cut)

    def summed(self, weight: Weight) -> set[str]:
        """Return the mesh axes over which the gradient of a parameter is summed."""
        return self.gradients.params.get(self.value(weight), set())


@dataclass(frozen=True, eq=False)
class Sharding:
    """Sizes under a layout.

    Attributes:
      sharded: the layers under the layout.
      values: the sizes of values.
    """

    sharded: Sharded
    values: Values

    @classmethod
    def of(cls, layout: Layout, work: Workload) -> Sharding:
        """Return the sizes of `work` under `layout`, with the rows of the graph."""
        return cls(Sharded(layout, work), Values(layout.of_values, work))

    @property
    def layout(self) -> Layout:
        """The layout."""
        return self.sharded.layout

    @property
    def rows(self) -> float:
        """By how much more rows of experts there are than in the graph."""
        return self.values.rows

    def elements(self, shape: Shape) -> float:
        """Return the elements of a value on one device."""
        return self.values.elements(shape)

    def used(self, weight: Weight) -> float:
        """Return the elements of a parameter where it is used: split over experts and neurons."""
        return weight.shape.elements / self.sharded.shards(self.sharded.used(weight))

    def stored(self, weight: Weight) -> float:
        """Return the elements of a parameter as it is stored."""
        return prod(self.stored_sizes(weight).values())

    def stored_sizes(self, weight: Weight) -> dict[str, float]:
        """Return the sizes of a parameter as it is stored, by axis."""
        key = ("stored", weight.shape, weight.of_experts)
        return self.sharded.once(key, lambda: self._stored_sizes(weight))

    def _stored_sizes(self, weight: Weight) -> dict[str, float]:
        type, layout = self.sharded.stored(weight), self.layout
        pairs = zip(weight.shape, type, strict=True)
        return {name: size / layout.size(axis.mesh) for (name, size), axis in pairs}

    def stored_axes(self, weight: Weight) -> tuple[str, ...]:
        """Return the mesh axes that cut a parameter for storage, which is gathered for use."""
        stored, used = self.sharded.stored(weight), self.sharded.used(weight)
        found = {m for a in stored for m in a.mesh} - {m for a in used for m in a.mesh}
        return self.layout.ordered(found)
