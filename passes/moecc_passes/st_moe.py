"""The pipeline template ``st-moe``: the conversion of ST-MoE, of the passes for its parts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from moecc.errors import Problem
from moecc.rewrite.passes import advice, too_much_capacity
from moecc.rewrite.pipeline import PipelineTemplate, TemplateOption, TemplatePass, TemplateStep
from moecc_passes.add_losses import AddLossesPass
from moecc_passes.specialize import RecordModesPass, SpecializePass
from moecc_passes.upcycle.upcycle import UpcyclePass

DOC = """Turn a dense model into an ST-MoE that computes the same function.

Every fourth feed-forward layer becomes a mixture of experts with renormalised top-2 gates, a
multiplicative bias and an extra dense sublayer; losses are added; and the graph remembers what
training and evaluation are: a capacity factor of 1.25 and second experts kept at random, or 2.0
and all of them.  ``specialize{mode=train}`` then makes a graph for training.  The conversion
itself is without a capacity, so that it drops nothing.

Before::

    %y = contract %m, %down {over=mlp} : f32[batch=B, seq=S, embed=1024] @layers.3.ffn

After ``st-moe{experts=32}``, the same as::

    upcycle{experts=32 top-k=2 layers=every:4 extra-ffn=after expert-bias=multiplicative
        router-init=switch router-std=0.3162}
    add-losses{balance-coef=0.01 z-coef=0.001}
    attr routing = {"train": {"capacity_factor": 1.25, "policy": "random", …}, "eval": {…}}
"""

BLOCKS = ("experts", "top_k", "layers", "decoder_layers", "extra_ffn", "expert_bias", "init")
MODES = (
    "train_capacity_factor", "eval_capacity_factor", "train_policy", "eval_policy", "threshold",
    "group_size", "decoder_group_size",
)  # fmt: skip


def _learns(item: TemplatePass) -> Iterator[Problem]:
    if getattr(item, "top_k", 0) == 1:
        yield Problem(
            "renormalised gates of one expert are always 1, so the router would not learn",
            "top-k",
            "top-k=2, as the paper has it",
            "top-k=1",
            "upcycle{gates=switch top-k=1} is Switch routing",
        )


def _advise(item: TemplatePass) -> Iterator[Problem]:
    experts = getattr(item, "experts", 0)
    for name in ("train_capacity_factor", "eval_capacity_factor"):
        option = name.replace("_", "-")
        yield from too_much_capacity(getattr(item, name, None), experts, option)
    if getattr(item, "extra_ffn", "") == "none":
        yield advice(
            "no dense sublayer stands beside the sparse ones",
            "extra-ffn",
            "appendix C",
            expected="after or before",
            value="none",
        )
    if getattr(item, "expert_bias", "") == "none":
        yield advice(
            "experts have no multiplicative bias",
            "expert-bias",
            "appendix C",
            expected="multiplicative",
            value="none",
        )
    if not getattr(item, "losses", True):
        yield advice(
            "no losses are added",
            "losses",
            "section 3.3 and appendix A",
            expected="true",
            value="false",
        )


ST_MOE = PipelineTemplate(
    name="st-moe",
    summary="turn a dense model into an ST-MoE: the paper's choices in one pass",
    doc=DOC,
    options=(
        TemplateOption("experts", 32, "experts in a sparse layer"),
        TemplateOption("top_k", 2, "experts per token"),
        TemplateOption("layers", "every:4", "layers that become sparse, in the syntax of upcycle"),
        TemplateOption("decoder_layers", None, "layers of the decoder, if they differ"),
        TemplateOption("extra_ffn", "after", "dense sublayer beside each sparse one"),
        TemplateOption("expert_bias", "multiplicative", "vector of each expert"),
        TemplateOption("init"),
        *map(TemplateOption, MODES),
        TemplateOption("balance_coef"),
        TemplateOption("z_coef", doc="coefficient of the router z-loss"),
        TemplateOption("losses", True, "whether to add losses and metrics", bool),
        TemplateOption(
            "mode", "none", "mode for which the graph is specialised at once",
            Literal["none", "train", "eval"],
        ),
    ),
    steps=(
        # The paper takes the initialisation of Switch: variance 0.1 / width before it is cut.
        TemplateStep(
            UpcyclePass, BLOCKS, {"router_init": "switch", "router_std": round(0.1**0.5, 4)},
        ),
        TemplateStep(RecordModesPass, MODES, statistics=()),
        TemplateStep(SpecializePass, ("mode",), when="mode", statistics=()),
        TemplateStep(
            AddLossesPass, ("balance_coef", "z_coef"), when="losses",
            statistics=("outputs-added",),
        ),
    ),
    check=_learns,
    advise=_advise,
)  # fmt: skip
