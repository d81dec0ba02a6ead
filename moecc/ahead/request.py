"""What is asked of a compilation ahead of time, and what a backend answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Protocol

from moecc.ir.graph import Graph
from moecc.plan.machines import Machine
from moecc.plan.strategy import StepConfig
from moecc.sharding.layout import Layout
from moecc.sharding.partitions import EXPLICIT
from moecc.support.untyped import Json
from moecc.train.recipe import OptimizerSection

EMITS = ("stablehlo", "hlo")


@dataclass(frozen=True)
class Request:
    """A compilation, as the command line asks for it; None leaves a choice to the plan.

    Attributes:
      model: a model or preset.
      machine: by name.
      step: ``train`` or ``forward``.
      batch_tokens: tokens of a step.
      lengths: of a sequence, by stack.
      optimizer: of a training step.
      remat: what the backward pass computes again.
      dtype: the type of the computation.
      weight_dtype: the type of the parameters; None for f32 in training, else `dtype`.
      micro_batches: parts of a batch whose gradients are added.
      reduce_dtype: the type in which gradients are added and reduced; None for `dtype`.
      mesh: the mesh.
      dense_weights: how parameters that are no experts' lie along the experts' axis.
      rules: layouts by name or file, in place of those that the mesh's axes stand for.
      partition: one of `PARTITIONS`.
      via: how tokens reach experts, of `moecc.sharding.vias.VIAS`.
      sliced: whether devices along ``model`` each send a part of a row to the experts.
      chunks: in how many parts rows are exchanged, beside the experts' work on others.
      capacity_factor: bounds the rows of an expert.
      emit: of `EMITS`, the program that is wanted besides.
      export: whether an artefact of ``jax.export`` is.
      overlap: whether the compiler is to have collectives beside products.
      quick: whether it is to take as little time as it can, at the price of the program's speed.
      load: files with families and passes of the user's own.
      pipeline: passes that are run before those of the step.
      sets: settings of the optimizer, ``optimizer.key=value``.
    """

    model: str
    machine: str
    step: str = "train"
    batch_tokens: int | None = None
    lengths: tuple[int, ...] | None = None
    optimizer: str = "adamw"
    remat: str | None = None
    dtype: str = "bf16"
    weight_dtype: str | None = None
    micro_batches: int = 1
    reduce_dtype: str | None = None
    mesh: str | None = None
    dense_weights: str | None = None
    rules: tuple[str, ...] | None = None
    partition: str = EXPLICIT
    via: str | None = None
    sliced: bool = False
    chunks: int = 1
    capacity_factor: float | None = None
    emit: str | None = None
    export: bool = False
    overlap: bool = False
    quick: bool = False
    load: tuple[str, ...] = ()
    pipeline: str = ""
    sets: tuple[str, ...] = ()

    def to_json(self) -> dict[str, object]:
        """Return the request as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Json) -> Request:
        """Return the request that `to_json` wrote."""
        lists = {n: data[n] and tuple(data[n]) for n in ("lengths", "rules", "load", "sets")}
        return cls(**{**data, **lists})


@dataclass(frozen=True)
class Job:
    """What a backend compiles.

    Attributes:
      machine: where it is to run.
      layout: where everything lies.
      sizes: what the variables of the graph stand for, for the whole batch.
      config: what is given: types, micro-batches, the optimizer of a training step.
      emit: of `EMITS`, the program that is wanted besides.
      export: whether an artefact of ``jax.export`` is.
      partition: one of `PARTITIONS`.
      update: the optimizer of a training step and its settings; None for the forward pass.
      overlap: whether the compiler is to have collectives beside products.
      quick: whether it is to take as little time as it can, at the price of the program's speed.
    """

    machine: Machine
    layout: Layout
    sizes: Mapping[str, int]
    config: StepConfig
    emit: str | None = None
    export: bool = False
    partition: str = EXPLICIT
    update: OptimizerSection | None = None
    overlap: bool = False
    quick: bool = False


@dataclass(frozen=True)
class Result:
    """What came of a job.

    Attributes:
      lower_seconds: tracing, and lowering to StableHLO.
      compile_seconds: what XLA took.
      host_peak_bytes: the most memory of the process that compiled.
      memory: of one device, bytes by kind; None where the compiler refused the program.
      needed_bytes: of one device, at the worst moment.
      available_bytes: what the compiler says that a device has, where it says so.
      flops: of one device: dots and convolutions, two for each multiplication.
      collectives: by kind the ``count``, ``runs`` and ``bytes`` of one device's program, and
        ``worst_bytes`` where the routing decides.
      overlap: by kind the ``overlapped_bytes`` that the schedule has beside products, and the
        ``exposed_bytes``.
      unknown_loops: loops of which is not known how often they run; they count once.
      opaque: kernels whose multiplications are not known, by name.
      program: what was to be emitted.
      artefact: what was to be exported.
    """

    lower_seconds: float
    compile_seconds: float
    host_peak_bytes: int
    memory: Mapping[str, int] | None
    needed_bytes: int
    available_bytes: int | None = None
    flops: int = 0
    collectives: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    overlap: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    unknown_loops: int = 0
    opaque: Mapping[str, int] = field(default_factory=dict)
    program: str = ""
    artefact: bytes = b""


class Compiler(Protocol):
    """A backend that compiles ahead of time."""

    def compile_ahead(self, graph: Graph, job: Job) -> Result:
        """Compile a step of `graph`.

        Raises:
          MachineError: an extra is missing, in one line with what to install.
          UsageError: the compiler refuses the machine's topology.
          InputError: the mesh does not suit the graph.
        """
        ...
