"""Sizes on one device, of values and of parameters, under a layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from math import prod

from moecc.plan.layout import Layout
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
    _stored: dict[tuple[Shape, bool], tuple[dict[str, float], tuple[str, ...]]] = field(
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
        """Return the sizes of a parameter where it lies, by axis."""
        return self._lies(weight)[0]

    def stored_axes(self, weight: Weight) -> tuple[str, ...]:
        """Return the mesh axes that cut a parameter for storage, which is gathered for use."""
        return self._lies(weight)[1]

    def _lies(self, weight: Weight) -> tuple[dict[str, float], tuple[str, ...]]:
        key = (weight.shape, weight.of_experts)
        found = self._stored.get(key)
        if found is None:
            found = self._stored[key] = self._cut(weight)
        return found

    def _cut(self, weight: Weight) -> tuple[dict[str, float], tuple[str, ...]]:
        sizes = {name: size / self._part(name, size) for name, size in weight.shape}
        layout = self.layout
        experts = "expert" in sizes and sizes["expert"] < weight.shape.size("expert")
        neurons = any(sizes[n] < size for n, size in weight.shape if n in _TENSOR)
        taken = (layout.expert_axes if experts else ()) + (layout.tensor_axes if neurons else ())
        parts = layout.stored_parts(sizes, taken)
        for name, axes in parts.items():
            sizes[name] /= layout.mesh.size(axes)
        return sizes, tuple(n for n in layout.mesh.names if any(n in a for a in parts.values()))

    def _part(self, name: str, size: float) -> float:
        parts = self._shards.get(name, 1)
        return parts if size % parts == 0 else 1

    def stored(self, weight: Weight) -> float:
        """Return the elements of a parameter where it lies."""
        return prod(self.stored_sizes(weight).values())


_TENSOR = frozenset({"q", "kv", "head", "kv_head", "mlp", "vocab"})
