"""The remarks of ``upcycle`` on converted blocks."""

from __future__ import annotations

from moecc.analysis.ffn import FFNBlock
from moecc.pipeline.passes import Remark
from moecc.support.text import amount
from moecc_passes.upcycle.checks import has_constant_gate
from moecc_passes.upcycle.options import UpcycleOptions


def remarks(item: UpcycleOptions, blocks: list[FFNBlock]) -> list[Remark]:
    """Return remarks on the converted blocks."""
    how = {
        "token-choice": f"top-{item.top_k}",
        "prototypes": f"one of each of {item.top_k} groups",
        "hash": f"{item.top_k} by a hash of the token",
        "expert-choice": "which choose tokens",
        "soft": f"of {amount(item.soft_slots, 'soft slot')}",
    }[item.routing]
    found = [Remark(b.loc, f"became {item.experts} experts, {how}") for b in blocks]
    if has_constant_gate(item):
        found.append(
            Remark("", "top-1 with renormalised gates: the gate is always 1, so the router "
                       "gets no gradient from the loss; gates=switch or top-k=2 trains it")
        )  # fmt: skip
    if item.router_init == "zero":
        found.append(
            Remark("", "a zero router sends every token to the first experts, and ties last "
                       "until something breaks them; use it to check, not to train")
        )  # fmt: skip
    if item.experts & (item.experts - 1):
        found.append(Remark("", "some runtimes want a power of two of experts"))
    return found
