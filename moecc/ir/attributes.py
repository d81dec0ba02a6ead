"""The attributes of each operation, typed.

Written by ``python -m moecc.ir.generate``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from moecc.ir.operation import Sizes, View

if TYPE_CHECKING:
    from moecc.ir.graph import Graph

# fmt: off

Convention = Literal["tokens", "assignments"]
Gates = Literal["renormalised", "softmax", "sigmoid-renormalised", "sigmoid", "sparsemixer", "ones"]
Given = Literal["bias", "sinks", "keep", "query_segments", "key_segments"]
Hash = Literal["murmur", "modulo"]
Order = Literal["choice", "token"]
Policy = Literal["all", "none", "threshold", "random"]
Precision = Literal["default", "f32"]
Remat = Literal["none", "block", "full", "save"]
Rounding = Literal["floor", "round", "ceil"]
Scaling = Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"]
Slots = Literal["ragged", "capacity"]
Using = Literal["keep", "priority", "mask"]

class ContractAttrs(View):
    """Attributes of ``contract``."""
    operations = frozenset({"contract"})
    over: tuple[str, ...]
    precision: Precision

class ConvolveAttrs(View):
    """Attributes of ``convolve``."""
    operations = frozenset({"convolve"})
    over: tuple[str, ...]
    along: tuple[str, ...]
    taps: tuple[str, ...]
    stride: int
    padding: int

class SumAttrs(View):
    """Attributes of ``sum``."""
    operations = frozenset({"sum"})
    axes: tuple[str, ...]

class MeanAttrs(View):
    """Attributes of ``mean``."""
    operations = frozenset({"mean"})
    axes: tuple[str, ...]

class MaxAttrs(View):
    """Attributes of ``max``."""
    operations = frozenset({"max"})
    axes: tuple[str, ...]

class LogsumexpAttrs(View):
    """Attributes of ``logsumexp``."""
    operations = frozenset({"logsumexp"})
    axes: tuple[str, ...]

class SoftmaxAttrs(View):
    """Attributes of ``softmax``."""
    operations = frozenset({"softmax"})
    axis: str

class RmsNormAttrs(View):
    """Attributes of ``rms_norm``."""
    operations = frozenset({"rms_norm"})
    axis: str
    eps: float

class LayerNormAttrs(View):
    """Attributes of ``layer_norm``."""
    operations = frozenset({"layer_norm"})
    axis: str
    eps: float

class RopeAttrs(View):
    """Attributes of ``rope``."""
    operations = frozenset({"rope"})
    axis: str
    size: int
    theta: float
    scaling: Scaling
    factor: float
    original_context: int
    low_freq_factor: float
    high_freq_factor: float
    beta_fast: float
    beta_slow: float
    truncate: bool
    attention_factor: float
    short_factors: tuple[float, ...]
    long_factors: tuple[float, ...]

class RotateAttrs(View):
    """Attributes of ``rotate``."""
    operations = frozenset({"rotate"})
    axis: str

class CausalAttrs(View):
    """Attributes of ``causal``."""
    operations = frozenset({"causal"})
    window: int

class RelativeBucketsAttrs(View):
    """Attributes of ``relative_buckets``."""
    operations = frozenset({"relative_buckets"})
    bidirectional: bool
    buckets: int
    max_distance: int

class AttentionAttrs(View):
    """Attributes of ``attention``."""
    operations = frozenset({"attention"})
    over: str
    along: str
    scale: float
    cap: float
    causal: tuple[str, ...]
    window: int
    given: tuple[Given, ...]

class RenameAttrs(View):
    """Attributes of ``rename``."""
    operations = frozenset({"rename"})
    axis: str
    to: str

class SplitAttrs(View):
    """Attributes of ``split``."""
    operations = frozenset({"split"})
    axis: str
    into: Sizes

class MergeAttrs(View):
    """Attributes of ``merge``."""
    operations = frozenset({"merge"})
    axes: tuple[str, ...]
    into: str

class SliceAttrs(View):
    """Attributes of ``slice``."""
    operations = frozenset({"slice"})
    axis: str
    start: int
    stop: int

class PositionsAttrs(View):
    """Attributes of ``positions``."""
    operations = frozenset({"positions"})
    axis: str

class EmbeddingAttrs(View):
    """Attributes of ``embedding``."""
    operations = frozenset({"embedding"})
    axis: str

class OneHotAttrs(View):
    """Attributes of ``one_hot``."""
    operations = frozenset({"one_hot"})
    into: Sizes

class ChunkAttrs(View):
    """Attributes of ``chunk``."""
    operations = frozenset({"chunk"})
    axis: str
    at: int
    of: int
    parts: int

class JoinAttrs(View):
    """Attributes of ``join``."""
    operations = frozenset({"join"})
    axis: str
    parts: int

class ReshardAttrs(View):
    """Attributes of ``reshard``."""
    operations = frozenset({"reshard"})
    to: str

class ShardAttrs(View):
    """Attributes of ``shard``."""
    operations = frozenset({"shard"})
    axis: str
    mesh: tuple[str, ...]

class AllGatherAttrs(View):
    """Attributes of ``all_gather``."""
    operations = frozenset({"all_gather"})
    axis: str
    mesh: tuple[str, ...]

class AllReduceAttrs(View):
    """Attributes of ``all_reduce``."""
    operations = frozenset({"all_reduce"})
    mesh: tuple[str, ...]

class ReduceScatterAttrs(View):
    """Attributes of ``reduce_scatter``."""
    operations = frozenset({"reduce_scatter"})
    axis: str
    mesh: tuple[str, ...]

class AllToAllAttrs(View):
    """Attributes of ``all_to_all``."""
    operations = frozenset({"all_to_all"})
    mesh: tuple[str, ...]
    split: str
    gather: str

class RaggedAllToAllAttrs(View):
    """Attributes of ``ragged_all_to_all``."""
    operations = frozenset({"ragged_all_to_all"})
    mesh: tuple[str, ...]
    split: str
    gather: str

class PointwiseAttrs(View):
    """Attributes of ``pointwise``."""
    operations = frozenset({"pointwise"})
    function: str

class ScaleAttrs(View):
    """Attributes of ``scale``."""
    operations = frozenset({"scale"})
    by: float

class CastAttrs(View):
    """Attributes of ``cast``."""
    operations = frozenset({"cast"})
    dtype: str

class MaskAttrs(View):
    """Attributes of ``mask``."""
    operations = frozenset({"mask"})
    fill: float

class ConstantAttrs(View):
    """Attributes of ``constant``."""
    operations = frozenset({"constant"})
    value: float
    dtype: str

class FoldKeyAttrs(View):
    """Attributes of ``fold_key``."""
    operations = frozenset({"fold_key"})
    by: int

class RandomUniformAttrs(View):
    """Attributes of ``random_uniform``."""
    operations = frozenset({"random_uniform"})
    low: float
    high: float

class RandomNormalAttrs(View):
    """Attributes of ``random_normal``."""
    operations = frozenset({"random_normal"})
    std: float

class UpdateSliceAttrs(View):
    """Attributes of ``update_slice``."""
    operations = frozenset({"update_slice"})
    axis: str

class JaxAttrs(View):
    """Attributes of ``jax``."""
    operations = frozenset({"jax"})
    into: Sizes
    dtype: str
    equations: int
    lines: str

class StackAttrs(View):
    """Attributes of ``stack``."""
    operations = frozenset({"stack"})
    axis: str

class IndexAttrs(View):
    """Attributes of ``index``."""
    operations = frozenset({"index"})
    axis: str
    at: int

class ScanAttrs(View):
    """Attributes of ``scan``."""
    operations = frozenset({"scan"})
    over: Sizes
    carries: int
    stacked: int
    remat: Remat
    save: tuple[str, ...]
    body: Graph

class AssignSlotsAttrs(View):
    """Attributes of ``assign_slots``."""
    operations = frozenset({"assign_slots"})
    tokens: tuple[str, ...]
    experts: int
    groups: int
    group_size: int
    slots: Slots
    capacity_factor: float
    convention: Convention
    rounding: Rounding
    minimum: int
    multiple: int
    cap: bool
    order: Order
    using: tuple[Using, ...]

class ExpertChoiceAttrs(View):
    """Attributes of ``expert_choice``."""
    operations = frozenset({"expert_choice"})
    tokens: tuple[str, ...]
    experts: int
    groups: int
    group_size: int
    slots: Literal["capacity"]
    capacity_factor: float
    convention: Literal["tokens"]
    rounding: Rounding
    minimum: int
    multiple: int
    cap: bool
    axis: str
    choice: str
    using: tuple[Literal["mask"], ...]

class RouteAttrs(View):
    """Attributes of ``route``."""
    operations = frozenset({"route"})
    top_k: int
    gates: Gates
    scale: float
    axis: str
    choice: str
    using: tuple[Literal["bias"], ...]
    precision: Precision

class KeepChoicesAttrs(View):
    """Attributes of ``keep_choices``."""
    operations = frozenset({"keep_choices"})
    policy: Policy
    threshold: float
    choice: str

class HashExpertsAttrs(View):
    """Attributes of ``hash_experts``."""
    operations = frozenset({"hash_experts"})
    experts: int
    top_k: int
    seed: int
    hash: Hash
    choice: str

class WeightRowsAttrs(View):
    """Attributes of ``weight_rows``."""
    operations = frozenset({"weight_rows"})
    precision: Precision

class WithinBufferAttrs(View):
    """Attributes of ``within_buffer``."""
    operations = frozenset({"within_buffer"})
    tokens: tuple[str, ...]
    parts: int
    blocks: int
    factor: float

class SlotAttrs(View):
    """Attributes of what assigns slots: those that all of them have."""
    operations = frozenset({"assign_slots", "expert_choice"})
    tokens: tuple[str, ...]
    experts: int
    groups: int
    group_size: int
    slots: Slots
    capacity_factor: float
    convention: Convention
    rounding: Rounding
    minimum: int
    multiple: int
    cap: bool
    using: tuple[Using, ...]

class NormAttrs(View):
    """Attributes of what is a norm with parameters: those that all of them have."""
    operations = frozenset({"rms_norm", "layer_norm"})
    axis: str
    eps: float

class ReductionAttrs(View):
    """Attributes of what reduces axes away: those that all of them have."""
    operations = frozenset({"sum", "mean", "max", "logsumexp"})
    axes: tuple[str, ...]

class ProductAttrs(View):
    """Attributes of what is a product of matrices: those that all of them have."""
    operations = frozenset({"contract", "convolve"})
    over: tuple[str, ...]

class ChoosingAttrs(View):
    """Attributes of what chooses experts by scores: those that all of them have."""
    operations = frozenset({"expert_choice", "route"})
    axis: str
    choice: str

class CollectiveAttrs(View):
    """Attributes of what moves data between devices: those that all of them have."""
    operations = frozenset(
        {"shard", "all_gather", "all_reduce", "reduce_scatter", "all_to_all", "ragged_all_to_all"}
    )
    mesh: tuple[str, ...]
