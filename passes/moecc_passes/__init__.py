"""The passes of moecc, registered under the entry point ``moecc.passes``.

Each entry imports its pass on demand, so that listing passes costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from moecc.rewrite.passes import Pass
    from moecc.rewrite.pipeline import PipelineTemplate

_PASSES = {
    "add-losses": "add_losses:AddLossesPass",
    "align-neurons": "other_models:AlignNeuronsPass",
    "annotate-sharding": "annotate:AnnotateShardingPass",
    "append-expert": "resize:AppendExpertPass",
    "canonicalize": "cleanup:CanonicalizePass",
    "cse": "cleanup:CsePass",
    "dce": "cleanup:DcePass",
    "decode": "decode:DecodePass",
    "exchange-expert": "resize:ExchangeExpertPass",
    "expand-blocks": "expand_blocks:ExpandBlocksPass",
    "expert-parallel": "expert_parallel:ExpertParallelPass",
    "force-balance": "training:ForceBalancePass",
    "freeze": "training:FreezePass",
    "fuse-attention": "fuse:FuseAttentionPass",
    "fuse-gate-up": "fuse:FuseGateUpPass",
    "grow": "resize:GrowPass",
    "lower-collectives": "annotate:LowerCollectivesPass",
    "merge": "resize:MergePass",
    "merge-adapter": "other_models:MergeAdapterPass",
    "pack-segments": "training:PackSegmentsPass",
    "prune": "resize:PrunePass",
    "record-modes": "specialize:RecordModesPass",
    "roll-layers": "roll_layers:RollLayersPass",
    "specialize": "specialize:SpecializePass",
    "st-moe": "st_moe:ST_MOE",
    "strip-sharding": "annotate:StripShardingPass",
    "tie-head": "training:TieHeadPass",
    "to-dense": "resize:ToDensePass",
    "trace-routing": "routed:TraceRoutingPass",
    "trace-values": "routed:TraceValuesPass",
    "unroll-layers": "roll_layers:UnrollLayersPass",
    "upcycle": "upcycle.upcycle:UpcyclePass",
    "weight-rows": "routed:WeightRowsPass",
    "zero-experts": "resize:ZeroExpertsPass",
}
"""Module and class of each pass."""


def _load(target: str) -> type[Pass] | PipelineTemplate:
    module, _, name = target.partition(":")
    item = getattr(import_module(f"moecc_passes.{module}"), name)
    return cast("type[Pass] | PipelineTemplate", item)


REGISTRY: dict[str, Callable[[], type[Pass] | PipelineTemplate]] = {
    name: partial(_load, target) for name, target in _PASSES.items()
}
