"""How the rows of a ``place`` value lie in memory while the experts work on them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import jax
import jax.numpy as jnp

from moecc_backends.xla.routing import Placement, SortedChoices, dropless_placement


@dataclass(frozen=True)
class Packing:
    """The placement of a routing, and what lowerings need to know of it.

    Attributes:
      placement: the map between choices and rows.
      tokens: the token axes, outermost first.
      token_sizes: their sizes.
      shape: the sizes of expert, group and slot where the rows are kept apart (a capacity), or
        None where they are packed by expert (dropless).
      group_sizes: for packed rows, how many rows each expert has.
    """

    placement: Placement
    tokens: tuple[str, ...]
    token_sizes: tuple[int, ...]
    shape: tuple[int, int, int] | None = None
    group_sizes: jax.Array | None = None

    @property
    def rows(self) -> int:
        """The number of rows, used or not."""
        return self.placement.choice_of_row.shape[0]

    def row_groups(self, groups: int) -> jax.Array:
        """Return the group of the token of each row; rows without a token count to the first."""
        choices = self.placement.row_of_choice.shape
        token = jnp.maximum(self.placement.choice_of_row, 0) // choices[1]
        return token // (choices[0] // groups)

    @cached_property
    def row_experts(self) -> jax.Array:
        """The expert of each packed row; rows that belong to none count to the last expert."""
        assert self.group_sizes is not None, "rows under a capacity have an expert axis"
        ends = jnp.cumsum(self.group_sizes)
        rows = jnp.arange(self.rows, dtype=ends.dtype)
        found = jnp.searchsorted(ends, rows, side="right", method="compare_all")
        return jnp.minimum(found, self.group_sizes.size - 1)


def packed(
    choices: SortedChoices, tokens: tuple[str, ...], token_sizes: tuple[int, ...]
) -> Packing:
    """Return the packing of a dropless routing."""
    return Packing(
        dropless_placement(choices), tokens, token_sizes, group_sizes=choices.group_sizes
    )
