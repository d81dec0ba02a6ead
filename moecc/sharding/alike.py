"""What is worked out once for all meshes on which it is the same.

The sizes of a mesh decide nothing but whether they divide a number.  So what an assigner found is
found again on every mesh with the same axes and rules whose sizes answer alike all that was asked.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from typing import Generic, TypeVar

from moecc.sharding.assign import Answers, Assigner
from moecc.sharding.layout import Layout

T = TypeVar("T")


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
        known = self._known.setdefault((key, layout.names, tuple(layout.sizes)), [])
        for asked, found in known:
            if layout.assigner.answers(asked):
                return found
        assigner = replace(layout.assigner, asked={})
        found = make(assigner)
        known.append((assigner.asked, found))
        return found
