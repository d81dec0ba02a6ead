"""Dispatch strategies: how tokens become the rows that experts multiply, one table row each.

The backend that lowers a strategy implements it, in a table by name.  A plan distinguishes cost
classes of strategies: how many rows are multiplied, and whether masks are multiplied as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

CostClass = Literal["index", "grouped", "onehot"]
"""``index``: all slots under a capacity, empty ones included, copied by index.  ``grouped``: only
the occupied rows, whatever their number.  ``onehot``: slots under a capacity, by products with
masks."""


@dataclass(frozen=True)
class DispatchStrategy:
    """A row of the table.

    Attributes:
      name: what users type.
      doc: how tokens become rows, in a line.
      cost: the cost class in a plan; None for the oracle, which no plan uses.
      in_slots: whether rows are stored in slots, equally many per expert, which needs a capacity.
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
    DispatchStrategy("blocks", "blocks of an expert's rows, from tokens to results", "grouped"),
    DispatchStrategy("ragged_dot", "a ragged product of sorted rows", "grouped"),
    DispatchStrategy("gathered", "the weights of its expert for each row", "grouped"),
    DispatchStrategy("used", "the experts that are chosen, on all tokens", "grouped"),
)
"""The strategies, in the order in which they are tried and listed."""

DISPATCHES = tuple(row.name for row in STRATEGIES)
"""Their names."""

COST_CLASSES = tuple(dict.fromkeys(row.cost for row in STRATEGIES if row.cost is not None))
"""The strategies that a plan chooses among."""
