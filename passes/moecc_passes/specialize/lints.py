"""What ST-MoE advises against among the options of ``specialize``."""

from __future__ import annotations

from moecc.errors import Problem
from moecc.pipeline.lints import advice
from moecc_passes.specialize.options import SpecializeOptions

NOISE = (
    ("jitter", "jitter"),
    ("input_dropout", "dropout on the router's input"),
    ("router_noise", "noise on the router's logits"),
    ("dropout", "dropout"),
    ("expert_dropout", "expert dropout"),
)
"""Options that make training noisy, and what they are."""


def lints(item: SpecializeOptions) -> list[Problem]:
    """Return the lints of the options, in training."""
    if item.mode != "train":
        return []
    found = [
        advice(f"in pre-training {what} costs quality", field.replace("_", "-"), "section 3.2",
               expected="0; fine-tuning is another matter (section 4.1)",
               found=getattr(item, field))
        for field, what in NOISE
        if getattr(item, field)
    ]  # fmt: skip
    if item.dropout and item.expert_dropout is not None and item.expert_dropout < item.dropout:
        what = "experts have less dropout than the rest, and overfit sooner"
        least, place = f"{item.dropout:g} or more", "expert-dropout"
        found.append(advice(what, place, "section 4.1", expected=least, found=item.expert_dropout))
    return found
