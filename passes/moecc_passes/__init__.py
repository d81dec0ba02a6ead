"""The passes of moecc, registered under the entry point ``moecc.passes``.

Each entry imports its pass on demand, so that listing passes costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moecc.pipeline.passes import Pass
    from moecc.pipeline.text import PipelineTemplate


def _add_losses() -> type[Pass]:
    from moecc_passes.add_losses import AddLossesPass

    return AddLossesPass


def _annotate_sharding() -> type[Pass]:
    from moecc_passes.sharding.annotate import AnnotateShardingPass

    return AnnotateShardingPass


def _canonicalize() -> type[Pass]:
    from moecc_passes.canonicalize import CanonicalizePass

    return CanonicalizePass


def _cse() -> type[Pass]:
    from moecc_passes.cse import CsePass

    return CsePass


def _dce() -> type[Pass]:
    from moecc_passes.dce import DcePass

    return DcePass


def _decode() -> type[Pass]:
    from moecc_passes.decode import DecodePass

    return DecodePass


def _expert_parallel() -> type[Pass]:
    from moecc_passes.sharding.expert_parallel import ExpertParallelPass

    return ExpertParallelPass


def _force_balance() -> type[Pass]:
    from moecc_passes.force_balance import ForceBalancePass

    return ForceBalancePass


def _freeze() -> type[Pass]:
    from moecc_passes.freeze import FreezePass

    return FreezePass


def _fuse_attention() -> type[Pass]:
    from moecc_passes.fuse_attention import FuseAttentionPass

    return FuseAttentionPass


def _fuse_gate_up() -> type[Pass]:
    from moecc_passes.fuse_gate_up import FuseGateUpPass

    return FuseGateUpPass


def _lower_collectives() -> type[Pass]:
    from moecc_passes.sharding.lower import LowerCollectivesPass

    return LowerCollectivesPass


def _strip_sharding() -> type[Pass]:
    from moecc_passes.sharding.strip import StripShardingPass

    return StripShardingPass


def _roll_layers() -> type[Pass]:
    from moecc_passes.roll_layers.roll_layers import RollLayersPass

    return RollLayersPass


def _pack_segments() -> type[Pass]:
    from moecc_passes.pack_segments import PackSegmentsPass

    return PackSegmentsPass


def _record_modes() -> type[Pass]:
    from moecc_passes.specialize.record_modes import RecordModesPass

    return RecordModesPass


def _st_moe() -> PipelineTemplate:
    from moecc_passes.st_moe import ST_MOE

    return ST_MOE


def _specialize() -> type[Pass]:
    from moecc_passes.specialize.specialize import SpecializePass

    return SpecializePass


def _grow() -> type[Pass]:
    from moecc_passes.resize.grow import GrowPass

    return GrowPass


def _merge() -> type[Pass]:
    from moecc_passes.resize.merge import MergePass

    return MergePass


def _prune() -> type[Pass]:
    from moecc_passes.resize.prune import PrunePass

    return PrunePass


def _to_dense() -> type[Pass]:
    from moecc_passes.resize.to_dense import ToDensePass

    return ToDensePass


def _tie_head() -> type[Pass]:
    from moecc_passes.tie_head import TieHeadPass

    return TieHeadPass


def _trace_routing() -> type[Pass]:
    from moecc_passes.trace_routing import TraceRoutingPass

    return TraceRoutingPass


def _trace_values() -> type[Pass]:
    from moecc_passes.trace_values import TraceValuesPass

    return TraceValuesPass


def _unroll_layers() -> type[Pass]:
    from moecc_passes.unroll_layers import UnrollLayersPass

    return UnrollLayersPass


def _upcycle() -> type[Pass]:
    from moecc_passes.upcycle.upcycle import UpcyclePass

    return UpcyclePass


def _weight_rows() -> type[Pass]:
    from moecc_passes.weight_rows import WeightRowsPass

    return WeightRowsPass


def _zero_experts() -> type[Pass]:
    from moecc_passes.resize.zero_experts import ZeroExpertsPass

    return ZeroExpertsPass


REGISTRY: dict[str, Callable[[], type[Pass] | PipelineTemplate]] = {
    "add-losses": _add_losses,
    "annotate-sharding": _annotate_sharding,
    "canonicalize": _canonicalize,
    "cse": _cse,
    "dce": _dce,
    "decode": _decode,
    "expert-parallel": _expert_parallel,
    "force-balance": _force_balance,
    "freeze": _freeze,
    "fuse-attention": _fuse_attention,
    "fuse-gate-up": _fuse_gate_up,
    "grow": _grow,
    "lower-collectives": _lower_collectives,
    "merge": _merge,
    "pack-segments": _pack_segments,
    "prune": _prune,
    "record-modes": _record_modes,
    "roll-layers": _roll_layers,
    "specialize": _specialize,
    "st-moe": _st_moe,
    "strip-sharding": _strip_sharding,
    "tie-head": _tie_head,
    "to-dense": _to_dense,
    "trace-routing": _trace_routing,
    "trace-values": _trace_values,
    "unroll-layers": _unroll_layers,
    "upcycle": _upcycle,
    "weight-rows": _weight_rows,
    "zero-experts": _zero_experts,
}
