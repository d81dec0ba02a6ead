"""What is worked out once for all meshes on which it is the same.

The sizes of a mesh decide nothing but whether they divide a number.  So what an assigner found is
found again on every mesh with the same axes and rules whose sizes answer alike all that was asked.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import Generic, TypeVar

from moecc.sharding.assign import Assigner, divides
from moecc.sharding.layout import Layout

T = TypeVar("T")

Answers = Mapping[tuple[int, tuple[str, ...]], bool]
"""Whether numbers are divided by the sizes of mesh axes."""


@dataclass(frozen=True)
class Alike(Generic[T]):
    """Remembers what was made under layouts."""

    _known: dict[Hashable, list[tuple[Answers, T]]] = field(default_factory=dict)

    def under(self, layout: Layout, key: Hashable, make: Callable[[Assigner], T]) -> T:
        """Return what `make` makes, or made, with an assigner that shards as that of `layout`.

        Args:
          layout: the layout.
          key: what is made.
          make: makes it; of the mesh it may read nothing but what the assigner answers.
        """
        mesh = layout.mesh
        known = self._known.setdefault((key, layout.names, mesh.names), [])
        for asked, found in known:
            if all(divides(n, mesh, axes) is yes for (n, axes), yes in asked.items()):
                return found
        assigner = replace(layout.assigner, asked={})
        found = make(assigner)
        known.append((assigner.asked, found))
        return found
