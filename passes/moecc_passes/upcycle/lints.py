"""What ST-MoE advises against among the options of ``upcycle``."""

from __future__ import annotations

from moecc.errors import Problem
from moecc.pipeline.lints import advice, too_many_experts, too_much_capacity
from moecc_passes.upcycle.options import UpcycleOptions

LEAST_STD, MOST_STD = 1e-3, 0.2
"""Standard deviations of a router's weights: Switch's are 0.01 for a width of 1024."""

LEAST_LOGIT_STD, MOST_LOGIT_STD = 0.03, 3.0
"""Those of its logits: Switch's initialisation has √0.1."""


def lints(item: UpcycleOptions) -> list[Problem]:
    """Return the lints of the options."""
    bound = item.capacity_factor if item.is_bounded else None
    return [
        *too_many_experts(item.experts, "experts"),
        *too_much_capacity(bound, item.experts, "capacity-factor"),
        *_router(item),
        *_gates(item),
    ]


def _router(item: UpcycleOptions) -> list[Problem]:
    if item.router_init == "zero" or item.routing in ("hash", "soft"):
        return []
    is_of_logits = item.router_init in ("logit-std", "switch", "centroids", "ridge")
    least, most = (LEAST_LOGIT_STD, MOST_LOGIT_STD) if is_of_logits else (LEAST_STD, MOST_STD)
    if least <= item.router_std <= most:
        return []
    what = "logits" if is_of_logits else "weights"
    return [advice(f"the router's {what} begin far from those of the paper", "router-std",
                   "section 6.2", expected=f"{least:g} to {most:g}; router-init=switch",
                   found=item.router_std)]  # fmt: skip


def _gates(item: UpcycleOptions) -> list[Problem]:
    if item.top_k < 2 or item.gates not in ("softmax", "switch") or item.routing != "token-choice":
        return []
    return [advice("gates of several experts are not renormalised over those chosen", "gates",
                   "appendix G", expected="renormalised", found=item.gates)]  # fmt: skip
