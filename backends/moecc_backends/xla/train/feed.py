"""Batches on their devices: each process reads the rows of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial

import jax
import numpy as np

from moecc.train.data.batches import Batches
from moecc.types.arrays import Array

Rows = Callable[[slice], Mapping[str, Array]]


@dataclass(frozen=True)
class DeviceFeed:
    """The batches of a recipe, on the devices of a program.

    Attributes:
      batches: on the host.
      abstract: shapes, types and shardings of the arrays of a batch; the first axis is the batch.
    """

    batches: Batches
    abstract: Mapping[str, jax.ShapeDtypeStruct]

    @cached_property
    def held_out(self) -> Mapping[str, int]:
        """The number of batches of each held-out text."""
        return {name: found.batches for name, found in self.batches.evaluations.items()}

    def train(self, number: int) -> dict[str, jax.Array]:
        """Return a batch of the mixture."""
        return self._placed(lambda rows: self.batches.batch(number, rows))

    def evaluate(self, name: str, number: int) -> dict[str, jax.Array]:
        """Return a batch of a held-out text."""
        found = self.batches.evaluation(name)
        return self._placed(lambda rows: found.batch(number, rows))

    def _placed(self, read: Rows) -> dict[str, jax.Array]:
        known: dict[tuple[int, int], Mapping[str, Array]] = {}

        def of_rows(name: str, index: tuple[slice, ...] | None) -> Array:
            assert index is not None, "every device has its part"
            shape = self.abstract[name].shape
            start, stop, _ = index[0].indices(shape[0])
            if (start, stop) not in known:
                known[start, stop] = read(slice(start, stop))
            part = known[start, stop][name][(slice(None), *index[1:])]
            return np.asarray(part, self.abstract[name].dtype)

        return {
            name: jax.make_array_from_callback(leaf.shape, leaf.sharding, partial(of_rows, name))
            for name, leaf in self.abstract.items()
        }
