"""Which ways to the experts suit how tokens and experts are sharded, and why others do not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from moecc.sharding.vias import Slots, Via


@dataclass(frozen=True)
class Refusal:
    """Why a way does not suit a layer.

    Attributes:
      what: the reason.
      expected: what would suit it.
      hint: a way out.
    """

    what: str
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
            f"tokens on …*{'*'.join(exchanged)}", "exchange the mesh axes in the rule of the batch",
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
        yield Refusal("rows without a bound have no fixed room", "slots=capacity", "via=ragged")
    if not way.takes(slots) and slots == "fixed":
        yield Refusal("rows under a capacity are not ragged", "slots=ragged", "via=capacity")
    if way.per_axis and (len(experts) < 2 or exchanged != experts[::-1]):
        yield Refusal(
            "a hierarchical exchange crosses mesh axes one by one",
            "tokens on far*near, experts on near*far",
            "rules=expert-hierarchical mesh=far:2,near:4",
        )  # fmt: skip
