"""Ways to the experts (``via``): how tokens reach experts on other devices, one row each.

Passes insert the collectives of a row, the plan prices them, the command line offers the names.
Formulas: GShard (Lepikhin et al. 2020) for ``capacity``; MaxText for ``ragged`` and ``ring``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil
from typing import Any, Literal

Slots = Literal["fixed", "ragged"]
"""Whether every expert has as many slots as the others, or as many as ask."""


@dataclass(frozen=True)
class Via:
    """A row of the table.

    Attributes:
      name: what users type.
      doc: what becomes of tokens and rows, in a line.
      to_experts: the collective that brings rows or tokens to experts, by the slots that the way
        works on; empty where nothing is sent, and without the slots that it does not work on.
      back: the collective that brings results to their tokens, likewise.
      per_axis: whether rows cross the mesh axes of the experts one after the other, for which there
        must be two.
      is_sliced: whether devices that have the same tokens may each send a part of a row.
      is_chunked: whether experts may work on one chunk of rows while the next is on its way.
      is_bounded: whether the slots bound what a device receives, so that no buffer needs a bound.
      in_rounds: whether rows are exchanged in rounds, through buffers of about the expected size.
      tokens_everywhere: whether all devices of the experts have all tokens.
    """

    name: str
    doc: str
    to_experts: dict[Slots, str]
    back: dict[Slots, str]
    per_axis: bool = False
    is_sliced: bool = False
    is_chunked: bool = False
    is_bounded: bool = False
    in_rounds: bool = False
    tokens_everywhere: bool = False

    @property
    def exchanges_rows(self) -> bool:
        """Whether rows are sent to the devices of their experts, and tokens to no other."""
        return any("all_to_all" in op for op in self.to_experts.values())

    def takes(self, slots: Slots) -> bool:
        """Return whether the way works on such slots as they are."""
        return slots in self.to_experts


ROUND_ROOM = 1.25
"""The rows that two devices exchange in a round, in shares of the choices of one."""


@dataclass(frozen=True)
class Rounds:
    """The rounds in which two devices exchange rows, as many a round as any other two.

    Attributes:
      rows: how many rows they exchange in a round.
      most: how many rounds the worst routing takes.
    """

    rows: int
    most: int

    @classmethod
    def of(cls, tokens: int, choices: int, experts: int, devices: int, tile: int = 1) -> Rounds:
        """Return the rounds of devices that have `tokens` tokens each.

        Args:
          tokens: how many there are on a device.
          choices: how many experts a token chooses.
          experts: how many there are on all devices; a token chooses none of them twice.
          devices: how many there are.
          tile: rows are exchanged in multiples of it.
        """
        worst = tokens * min(choices, experts // devices)
        share = ceil(ROUND_ROOM * tokens * choices / devices)
        rows = max(min(-(-share // tile) * tile, worst), 1)
        return cls(rows, max(-(-worst // rows), 1))

    def first(self, turn: Any) -> Any:
        """Return the first row of a round, whose number may be traced; `rows` of them follow."""
        return turn * self.rows

    def turns(self, rows: Any) -> Any:
        """Return how many rounds exchange that many rows."""
        return (rows + self.rows - 1) // self.rows


def _both(op: str) -> dict[Slots, str]:
    return {"fixed": op, "ragged": op}


_EITHER: dict[Slots, str] = {"fixed": "all_to_all", "ragged": "ragged_all_to_all"}

WAYS = (
    Via(
        "capacity", "a fixed number of rows between any two devices",
        {"fixed": "all_to_all"}, {"fixed": "all_to_all"},
        is_sliced=True, is_chunked=True, is_bounded=True,
    ),
    Via(
        "ragged", "as many rows as there are between any two devices",
        {"ragged": "ragged_all_to_all"}, {"ragged": "ragged_all_to_all"}, is_sliced=True,
        in_rounds=True,
    ),
    Via(
        "hierarchical", "rows across one mesh axis of the experts, and then across another",
        _EITHER, _EITHER, per_axis=True, is_sliced=True, is_chunked=True,
    ),
    Via(
        "ring", "all tokens are gathered, and the sums scattered",
        _both("all_gather"), _both("reduce_scatter"),
    ),
    Via(
        "replicated", "all devices have all tokens, and add what they computed",
        _both(""), _both("all_reduce"), tokens_everywhere=True,
    ),
)  # fmt: skip
"""The ways, in the order in which they are offered."""

BY_NAME = {way.name: way for way in WAYS}

VIAS = tuple(BY_NAME)
"""Their names."""

LOCAL = "local"
"""No way at all: every device has all experts."""


def via(name: str) -> Via | None:
    """Return the way `name`; None for ``local``.

    Raises:
      KeyError: there is none.
    """
    return None if name == LOCAL else BY_NAME[name]


# Which ways to the experts suit how tokens and experts are sharded, and why others do not.


@dataclass(frozen=True)
class Refusal:
    """Why a way does not suit a layer.

    Attributes:
      reason: the reason.
      expected: what would suit it.
      hint: a way out.
    """

    reason: str
    expected: str
    hint: str


def refusals(
    way: Via, tokens: tuple[str, ...], experts: tuple[str, ...], slots: Slots
) -> Iterator[Refusal]:
    """Yield why the way `way` does not suit a layer.

    Args:
      way: the way.
      tokens: the mesh axes over which the outermost token axis is sharded.
      experts: those of the experts.
      slots: whether the rows of an expert are bounded, or as many as ask.
    """
    exchanged = tuple(m for m in tokens if m in experts)
    if way.exchanges_rows:
        yield from _of_exchange(way, exchanged, experts, slots)
        return
    if not exchanged and not way.tokens_everywhere:
        yield Refusal(
            "tokens are not sharded over the experts' mesh axis, so there is no ring",
            "a mesh axis that shards both", "via=replicated",
        )  # fmt: skip
    if exchanged and tokens[-len(exchanged) :] != exchanged:
        yield Refusal(
            "tokens can only be gathered along the innermost of their mesh axes",
            f"tokens on …*{'*'.join(exchanged)}",
            "exchange the mesh axes in the rule of the batch of annotate-sharding",
        )  # fmt: skip


def _of_exchange(
    way: Via, exchanged: tuple[str, ...], experts: tuple[str, ...], slots: Slots
) -> Iterator[Refusal]:
    if set(exchanged) != set(experts):
        yield Refusal(
            "rows are exchanged along mesh axes that shard both tokens and experts",
            "tokens on the mesh axes of the experts, too", "via=replicated",
        )  # fmt: skip
    if not way.takes(slots) and slots == "ragged":
        yield Refusal(
            "rows without a bound have no fixed room", "a capacity",
            "specialize{capacity-factor=1.25} before it, or via=ragged",
        )  # fmt: skip
    if not way.takes(slots) and slots == "fixed":
        yield Refusal(
            "rows under a capacity are not ragged", "no capacity",
            "specialize{dropless} before it, or via=capacity",
        )  # fmt: skip
    if way.per_axis and (len(experts) < 2 or exchanged != experts[::-1]):
        yield Refusal(
            "a hierarchical exchange crosses mesh axes one by one",
            "tokens on far*near, experts on near*far",
            "annotate-sharding{rules=expert-hierarchical mesh=far:2,near:4} before it",
        )  # fmt: skip


# Whose collectives a program on a mesh has.

EXPLICIT, GSPMD = PARTITIONS = ("explicit", "gspmd")
"""The graph's own, or those that XLA's partitioner adds."""
