"""Dispatch strategies: how tokens become the rows that experts work on, one row each.

What a strategy does stands in the backend that lowers it, in a table by name.  A plan knows classes
of them, by what they cost: the rows that are multiplied, and whether masks are multiplied as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

CostClass = Literal["index", "grouped", "onehot"]
"""``index``: all slots under a capacity, empty ones included, copied by index.  ``grouped``: the
rows that there are, whatever their number.  ``onehot``: slots under a capacity, by products with
masks."""


@dataclass(frozen=True)
class DispatchStrategy:
    """A row of the table.

    Attributes:
      name: what users type.
      doc: what becomes of tokens and rows, in a line.
      cost: what a plan takes it for; None for the oracle, which no plan has.
      in_slots: whether rows lie in slots, as many for each expert, which needs a capacity.
    """

    name: str
    doc: str
    cost: CostClass | None
    in_slots: bool = False


STRATEGIES = (
    DispatchStrategy("scan", "all experts on all tokens, one after the other (the oracle)", None),
    DispatchStrategy("einsum", "one-hot products", "onehot", in_slots=True),
    DispatchStrategy("gather", "gathers into slots", "index", in_slots=True),
    DispatchStrategy("grouped", "a loop over blocks of sorted rows", "grouped"),
    DispatchStrategy("ragged_dot", "a ragged product of sorted rows", "grouped"),
    DispatchStrategy("gathered", "the weights of its expert for each row", "grouped"),
)
"""The strategies, in the order in which they are offered."""

DISPATCHES = tuple(row.name for row in STRATEGIES)
"""Their names."""

COST_CLASSES = tuple(dict.fromkeys(row.cost for row in STRATEGIES if row.cost is not None))
"""What a plan chooses among."""
