"""Global shapes of values, each once, so that what a layout makes of one is worked out once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from math import prod


@dataclass(frozen=True, eq=False)
class Shape:
    """Axes with their global sizes; one object for equal shapes, which `Shapes` sees to.

    The experts of a router's logits are called ``choices``: a device has all of a token's.
    """

    axes: tuple[tuple[str, float], ...]

    @cached_property
    def elements(self) -> float:
        """How many elements there are, on all devices together."""
        return prod(size for _, size in self.axes)

    @cached_property
    def has_slots(self) -> bool:
        """Whether it is one of rows of experts."""
        return "slot" in self.names

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the axes."""
        return tuple(name for name, _ in self.axes)

    def __iter__(self) -> Iterator[tuple[str, float]]:
        return iter(self.axes)

    def size(self, name: str) -> float:
        """Return the size of an axis."""
        return dict(self.axes)[name]


@dataclass(frozen=True)
class Shapes:
    """Makes shapes, equal ones only once."""

    made: dict[tuple[tuple[str, float], ...], Shape] = field(default_factory=dict)

    def of(self, axes: tuple[tuple[str, float], ...]) -> Shape:
        """Return the shape with `axes`."""
        return self.made.setdefault(axes, Shape(axes))
