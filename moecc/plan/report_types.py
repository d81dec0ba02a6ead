"""The JSON of ``moecc plan``, as types: what `moecc.plan.report` writes and renderers read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypedDict


class MachineReport(TypedDict):
    """The machine, in numbers of one device."""

    name: str
    devices: int
    usable_bytes: int
    peak_flops: float
    hbm_bytes_per_second: float
    sources: list[str]


class BatchReport(TypedDict):
    """What a step computes on, in how many parts; lengths by stack."""

    tokens: int
    sequences: int
    lengths: dict[str, int]
    micro_batches: int


class StrategyReport(TypedDict):
    """What a plan decides."""

    mesh: dict[str, int]
    rules: list[str]
    dense_weights: str
    via: str
    dispatch: str
    remat: str
    sliced: bool


class SummaryReport(StrategyReport):
    """A plan in a few numbers."""

    exact: bool
    seconds: float
    mfu: float
    total_bytes: float


class OtherReport(SummaryReport):
    """A plan that is not the best."""

    why_slower: str


class TransferReport(TypedDict):
    """What a part of a step sends."""

    op: str
    axes: list[str]
    why: str
    times: float
    tensor_bytes: float
    sent_bytes: float
    seconds: float


class PartSeconds(TypedDict):
    """How long a part takes, and why."""

    total: float
    compute: float
    hbm: float
    local: float
    waiting: float
    hidden: float


class PartReport(TypedDict):
    """A part of a step."""

    name: str
    count: int
    bound: str
    flops: float
    hbm_bytes: float
    seconds: PartSeconds
    transfers: list[TransferReport]


class AttentionReport(TypedDict):
    """The kernel of the attentions of a part, and why those that are tried first are not."""

    part: str
    kernel: str
    why: dict[str, str]


class PlanReport(SummaryReport):
    """A plan with its memory and time by part."""

    flops: float
    memory_bytes: Mapping[str, float]
    arguments_bytes: float
    temporary_bytes: float
    fits: bool
    seconds_by_kind: Mapping[str, float]
    collectives: Mapping[str, Mapping[str, float]]
    parts: list[PartReport]
    attention: list[AttentionReport]


class Idea(TypedDict):
    """Something that one would try beside the best plan.

    Attributes:
      name: what it is.
      how: its numbers: ``4 stages of 8 layers``.
      options: what asks for it; empty where nothing does.
      lowered: whether moecc compiles it.
      seconds: of a step; None where it is impossible.
      total_bytes: of a device; None likewise.
      why: why it is faster, slower, or impossible.
    """

    name: str
    how: str
    options: str
    lowered: bool
    seconds: float | None
    total_bytes: float | None
    why: str


class Report(TypedDict):
    """All that ``moecc plan`` reports."""

    model: str
    machine: MachineReport
    step: str
    optimizer: str | None
    dtype: str
    weight_dtype: str
    reduce_dtype: str | None
    batch: BatchReport
    parameters: int
    experts: int
    model_flops: float
    best: PlanReport
    others: list[OtherReport]
    lossy: SummaryReport | None
    tried: int
    fitting: int
    explored: list[Idea]
