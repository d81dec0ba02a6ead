"""Sizes on one device, of values and of parameters, under a layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from math import prod

from moecc.plan.layout import STORED_AXES, Layout
from moecc.plan.shapes import Shape
from moecc.plan.workload import Weight


@dataclass(frozen=True)
class Sharding:
    """Sizes under a layout.

    Attributes:
      layout: the layout.
      rows: by how much more rows of experts there are than in the graph.
    """

    layout: Layout
    rows: float = 1.0
    _stored: dict[tuple[Shape, bool], dict[str, float]] = field(
        default_factory=dict, repr=False, compare=False
    )
    _known: dict[Shape, float] = field(default_factory=dict, repr=False, compare=False)

    _sums: dict[object, float] = field(default_factory=dict, repr=False, compare=False)

    def once(self, key: object, make: Callable[[], float]) -> float:
        """Return what `make` returned when `key` was first asked for: plans share layouts."""
        found = self._sums.get(key)
        if found is None:
            found = self._sums[key] = make()
        return found

    @cached_property
    def _shards(self) -> dict[str, float]:
        return {**self.layout.shards, "slot": self.layout.shards["slot"] / self.rows}

    def elements(self, shape: Shape) -> float:
        """Return the elements of a value on one device."""
        found = self._known.get(shape)
        if found is None:
            found = self._known[shape] = self._elements(shape)
        return found

    def _elements(self, shape: Shape) -> float:
        shards = self._shards
        found = 1.0
        split = False
        for name, size in shape:
            parts = shards.get(name, 1)
            # Heads that were made of one axis share its split.
            if parts > 1 and name in _TENSOR:
                parts, split = (1 if split or size % parts else parts), True
            found *= size / parts
        return found

    def used(self, weight: Weight) -> float:
        """Return the elements of a parameter where it is used: split over experts and neurons."""
        return self.elements(weight.shape)

    def stored_sizes(self, weight: Weight) -> dict[str, float]:
        """Return the sizes of a parameter where it lies, by axis.

        The parts that are gathered at use are cut from the first of `STORED_AXES` that divides.
        """
        key = (weight.shape, weight.of_experts)
        found = self._stored.get(key)
        if found is None:
            found = self._stored[key] = self._stored_sizes(weight)
        return found

    def _stored_sizes(self, weight: Weight) -> dict[str, float]:
        sizes = {name: size / self._part(name, size) for name, size in weight.shape}
        parts = self.layout.mesh.size(self.layout.weight_axes(weight.of_experts))
        free = [n for n in STORED_AXES if n in sizes and sizes[n] % parts == 0]
        # Vectors are small, and lie whole.
        if parts > 1 and free and len(sizes) > 1:
            sizes[free[0]] /= parts
        return sizes

    def _part(self, name: str, size: float) -> float:
        parts = self._shards.get(name, 1)
        return parts if size % parts == 0 else 1

    def is_cut(self, weight: Weight) -> bool:
        """Whether a parameter is stored in parts that are gathered where it is used."""
        return self.stored(weight) < self.used(weight)

    def stored(self, weight: Weight) -> float:
        """Return the elements of a parameter where it lies."""
        return prod(self.stored_sizes(weight).values())


_TENSOR = frozenset({"q", "kv", "head", "kv_head", "mlp", "vocab"})
