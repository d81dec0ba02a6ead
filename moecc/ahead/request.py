"""What is asked of a compilation ahead of time, and what a backend answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Protocol, runtime_checkable

from moecc.errors import MachineError, Problem, UsageError, raise_problems
from moecc.ir.graph import Graph
from moecc.plan.machines import Machine
from moecc.plan.step import ProgramConfig
from moecc.sharding.layout import Layout
from moecc.support.untyped import Json
from moecc.train.recipe import OptimizerSection
from moecc.train.recipe_text import parse_update


class CompilerFailed(MachineError):
    """The compiler crashed, or rejects a program that it was given; with its own words."""


@dataclass(frozen=True)
class Request:
    """A compilation, as the command line asks for it.

    Attributes:
      model: a model or preset.
      machine: by name.
      config: the settings of the step.
      emit: the program that is wanted besides, ``stablehlo`` or ``hlo``.
      export: whether an artefact of ``jax.export`` is.
      quick: whether it is to take as little time as it can, at the price of the program's speed.
      load: files with families and passes of the user's own.
      pipeline: passes that are run before those of the step.
      sets: settings of the optimizer, ``optimizer.key=value``.
    """

    model: str
    machine: str
    config: ProgramConfig = field(default_factory=ProgramConfig)
    emit: str | None = None
    export: bool = False
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
        lists = {name: tuple(data[name]) for name in ("load", "sets")}
        return cls(**{**data, **lists, "config": ProgramConfig(**data["config"])})


@dataclass(frozen=True)
class Job:
    """What a backend compiles.

    Attributes:
      machine: where it is to run.
      layout: where everything lies.
      sizes: what the variables of the graph stand for, for the whole batch.
      request: the settings of the step, and what is wanted of the compiler.
      update: the optimizer of a training step and its settings; None for the forward pass.
    """

    machine: Machine
    layout: Layout
    sizes: Mapping[str, int]
    request: Request
    update: OptimizerSection | None


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
      remarks: choices made for want of a program by the compiler's defaults.
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
    remarks: tuple[str, ...] = ()
    program: str = ""
    artefact: bytes = b""


@runtime_checkable
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


# The update of a step that is compiled: an optimizer and its settings, as recipes spell them.

COMPILED = ("clip", "update_clip", "b1", "b2", "eps", "decay")
"""The keys of ``[optimizer]`` that are constants of a compiled step."""

_SECTION = "optimizer."
_OTHERS = {
    "name": "--optimizer names it",
    "groups": "a recipe has groups: moecc train",
}
_MORE = "a recipe has more: moecc train"
_RATE = "the rate is an argument of the step: the caller has the schedule"


def update_of(optimizer: str, sets: Sequence[str]) -> OptimizerSection:
    """Return the update of a step.

    Args:
      optimizer: its name.
      sets: texts ``optimizer.key=value``, as of ``moecc train``.

    Raises:
      UsageError: a text is no such thing, or has a key that a compiled step does not have.
    """
    problems = [problem for text in sets for problem in _foreign(text)]
    raise_problems(problems, UsageError)
    return parse_update(optimizer, sets)


def _foreign(text: str) -> list[Problem]:
    """Return what is wrong with the key of a text."""
    key = text.partition("=")[0].strip()
    name = key.removeprefix(_SECTION).partition(".")[0]
    is_option = name in OptimizerSection.__dataclass_fields__
    if key.startswith(_SECTION) and (name in COMPILED or not is_option):
        return []
    hint = _OTHERS.get(name, _RATE) if key.startswith(_SECTION) else _MORE
    problem = f"{key!r} is no part of a compiled step"
    expected = ", ".join(f"{_SECTION}{name}" for name in COMPILED)
    return [Problem(problem, f"--set {text}", expected, hint=hint)]


# What a backend gives of a step that it exported.


class LoadedStep(Protocol):
    """A program of a saved step.

    Attributes:
      platforms: what it was compiled for.
      devices: how many it runs on.
      arguments: shapes and types of what it takes, parameters and inputs by name.
    """

    platforms: tuple[str, ...]
    devices: int
    arguments: Json

    def __call__(self, *arguments: Json) -> Json:
        """Run the program. Raises InputError for other arguments."""
        ...


@runtime_checkable
class StepLoader(Protocol):
    """A backend that reads programs which it exported."""

    def load_step(self, data: bytes, where: str) -> LoadedStep:
        """Return a program. Raises InputError, MachineError."""
        ...
