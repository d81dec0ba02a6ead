"""Conventions: names of inputs and outputs, gates, and the ways from tokens to rows of experts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

# The names of inputs and outputs by which passes, plans, training and export know a graph.

TOKENS, DECODER_TOKENS = "tokens", "decoder_tokens"
"""The inputs that are texts: of a model or of its encoder, and of the decoder beside that."""

HIDDEN, LOGITS = "hidden", "logits"
"""The output of an encoder alone, and that of a model of tokens."""

LOSS, METRIC = "loss.", "metric."
"""How the names of losses of routers and of their metrics begin."""

AUXILIARY = f"{LOSS}auxiliary"
"""The output that ``add-losses`` makes of all losses of routers."""

TRACE, VALUES = "trace.", "values."
"""How the outputs begin that ``trace-routing`` and ``trace-values`` add."""

# How gates are computed.

Gates = Literal["renormalised", "softmax", "sigmoid-renormalised", "sigmoid", "sparsemixer", "ones"]
Score = Literal["softmax", "sigmoid"]

Total = Callable[[int, int], float]
"""From the number of experts and of choices per token to a sum of gates."""


@dataclass(frozen=True)
class GateConvention:
    """A row of the table.

    Attributes:
      name: the value of the attribute ``gates`` of ``route``.
      letter: its name in the lemmas of ``docs/exactness.md``.
      doc: how gates are computed, as shown in the documentation of ``route``.
      score: the function of the logits that gates are made of, and that a routing bias is added
        to; None if there is no such score.
      renormalised: whether the gates of a token are divided by their sum, which is then 1.
      zero_router_sum: the sum of the gates of a token if all logits are equal.
      constant_sum: whether every router yields that sum: copies of a dense block then equal the
        block after one rescaling factor, whatever the router.
      max_top_k: the largest top-k that it is defined for; None: any.
      equal_for_equal_logits: whether experts with equal logits get equal gates, as the members of a
        virtual group must.
      learns_at_top_1: whether the router gets a gradient through the gates when top-k is 1.
    """

    name: Gates
    letter: str
    doc: str
    score: Score | None
    renormalised: bool
    zero_router_sum: Total
    constant_sum: bool
    max_top_k: int | None = None
    equal_for_equal_logits: bool = True
    learns_at_top_1: bool = True

    def sum_is_constant(self, experts: int, top_k: int) -> bool:
        """Return whether the gates of a token have the same sum for every router."""
        keeps_all = self.score == "softmax" and top_k == experts and self.equal_for_equal_logits
        return self.constant_sum or keeps_all


def _sparsemixer_sum(experts: int, top_k: int) -> float:
    # The second choice is made among those that the first has left.
    return 1 / experts + (1 / (experts - 1) if top_k == 2 else 0.0)


CONVENTIONS = (
    GateConvention(
        "renormalised", "A", "softmax over the chosen logits", "softmax",
        renormalised=True, zero_router_sum=lambda n, k: 1.0, constant_sum=True,
        learns_at_top_1=False,
    ),
    GateConvention(
        "softmax", "B", "softmax over all, not renormalised", "softmax",
        renormalised=False, zero_router_sum=lambda n, k: k / n, constant_sum=False,
    ),
    GateConvention(
        "sigmoid-renormalised", "C", "sigmoid, renormalised", "sigmoid",
        renormalised=True, zero_router_sum=lambda n, k: 1.0, constant_sum=True,
        learns_at_top_1=False,
    ),
    GateConvention(
        "sigmoid", "D", "sigmoid as is", "sigmoid",
        renormalised=False, zero_router_sum=lambda n, k: k / 2, constant_sum=False,
    ),
    GateConvention(
        "sparsemixer", "S", "each choice's softmax among the logits near it (PhiMoE)", None,
        renormalised=False, zero_router_sum=_sparsemixer_sum, constant_sum=False, max_top_k=2,
        equal_for_equal_logits=False,
    ),
    GateConvention(
        "ones", "U", "1", None,
        renormalised=False, zero_router_sum=lambda n, k: float(k), constant_sum=True,
        learns_at_top_1=False,
    ),
)  # fmt: skip
"""The conventions, in the order of the documentation."""

BY_NAME: dict[str, GateConvention] = {row.name: row for row in CONVENTIONS}

GATES = tuple(row.name for row in CONVENTIONS)
"""Their names."""

SPELLINGS = {"switch": "softmax", "top-k-softmax": "renormalised"}
"""Aliases of conventions: the probability of the one expert chosen (Switch), and the
softmax of the chosen logits, which is the softmax of all renormalised."""


def convention(name: str) -> GateConvention:
    """Return the convention `name`, which may be an alias.

    Raises:
      KeyError: there is no such convention.
    """
    return BY_NAME[SPELLINGS.get(name, name)]


# Dispatch strategies: how tokens become the rows that experts multiply, one table row each.
#
# The backend that lowers a strategy implements it, in a table by name.


@dataclass(frozen=True)
class DispatchStrategy:
    """A row of the table.

    Attributes:
      name: what users type.
      doc: how tokens become rows, in a line.
      in_slots: whether rows are stored in slots, equally many per expert, which needs a capacity.
    """

    name: str
    doc: str
    in_slots: bool = False


STRATEGIES = (
    DispatchStrategy("gather", "gathers into slots", in_slots=True),
    DispatchStrategy("grouped", "a loop over blocks of sorted rows"),
    DispatchStrategy("blocks", "blocks of an expert's rows, from tokens to results"),
    DispatchStrategy("ragged_dot", "a ragged product of sorted rows"),
    DispatchStrategy("gathered", "the weights of its expert for each row"),
    DispatchStrategy("used", "the experts that are chosen, on all tokens"),
)
"""The strategies, in the order in which they are tried and listed."""

DISPATCHES = tuple(row.name for row in STRATEGIES)
"""Their names."""
