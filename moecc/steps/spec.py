"""What decides a compiled step, besides its graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from moecc.analysis.head import CHUNK_BYTES
from moecc.sharding.layout import Layout
from moecc.train.recipe import GuardSection, OptimizerSection
from moecc.types.dtypes import F32, DType


@dataclass(frozen=True)
class StepSpec:
    """How a graph is trained, or run.

    Attributes:
      sizes: what the variables of the graph stand for, for the whole batch.
      dtype: the type of the computation.
      optimizer: the update; None for the forward pass alone.
      micro_batches: parts of a batch whose gradients are added.
      weight_dtype: the type of the parameters that are trained, and of their moments.
      reduce_dtype: the type in which gradients are added and reduced; None for `dtype`.
      guard: which steps are skipped; None for none.
      bias_rate: step of the loss-free balance bias.
      output_z: coefficient of the z-loss of the output's softmax.
      platform: what it is lowered for, ``tpu``, ``gpu`` or ``cpu``.
      layout: what XLA's partitioner shards the graph by; None where the graph is on a mesh, or
        runs on one device.
      chunk_bytes: logits of about so many bytes are in memory at once, on each device.
    """

    sizes: Mapping[str, int]
    dtype: DType
    optimizer: OptimizerSection | None = None
    micro_batches: int = 1
    weight_dtype: DType = F32
    reduce_dtype: DType | None = None
    guard: GuardSection | None = field(default_factory=GuardSection)
    bias_rate: float = 0.0
    output_z: float = 0.0
    platform: str = "cpu"
    layout: Layout | None = None
    chunk_bytes: int = CHUNK_BYTES
