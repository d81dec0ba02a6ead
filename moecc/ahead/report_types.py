"""The JSON of ``moecc compile``, as types: what the worker writes and the text is made of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypedDict

from moecc.plan.report_types import BatchReport


class CompileMachine(TypedDict):
    """The machine that is compiled for."""

    name: str
    devices: int
    usable_bytes: int


class CompileSeconds(TypedDict):
    """How long the compilation took."""

    lower: float
    compile: float


class BoundReport(TypedDict):
    """The capacity of the experts."""

    factor: float
    convention: str


class Predicted(TypedDict):
    """What the plan said of the same step."""

    arguments_bytes: float
    outputs_bytes: float | None
    temporaries_bytes: float
    needed_bytes: float
    fits: bool
    flops: float
    seconds: float
    mfu: float
    collectives: Mapping[str, Mapping[str, float]]
    overlap: Mapping[str, Mapping[str, float]]


class CompileReport(TypedDict):
    """All that ``moecc compile`` says."""

    model: str
    machine: CompileMachine
    step: str
    optimizer: str | None
    dtype: str
    weight_dtype: str
    reduce_dtype: str | None
    batch: BatchReport
    parameters: int
    mesh: dict[str, int]
    dense_weights: str
    remat: str
    partition: str
    via: str | None
    sliced: bool
    pipeline: str
    quick: bool
    capacity: BoundReport | None
    remarks: list[str]
    seconds: CompileSeconds
    host_peak_bytes: int
    memory: Mapping[str, int] | None
    needed_bytes: int
    fits: bool
    would_fit: str | None
    flops: int
    model_flops: float
    collectives: Mapping[str, Mapping[str, int]]
    overlap: Mapping[str, Mapping[str, int]]
    unknown_loops: int
    opaque: Mapping[str, int]
    predicted: Predicted
