"""``moecc plan``: predict the cost of a model on a machine, and find the best mesh."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from moecc.cli.console import Format
from moecc.cli.face import add_command
from moecc.cli.options import (
    AnyModelArgument,
    BatchTokensOption,
    ComputeTypeOption,
    FormatOption,
    LoadOption,
    MachineOption,
    RulesOption,
    SequenceOption,
)

if TYPE_CHECKING:
    from moecc.plan.report_types import Report
    from moecc.plan.search import Constraints
    from moecc.plan.strategy import StepConfig


class Step(StrEnum):
    """What is planned."""

    train = "train"
    forward = "forward"


class Optimizer(StrEnum):
    """The optimizer of the parameters."""

    adamw = "adamw"
    adafactor = "adafactor"


class Remat(StrEnum):
    """What the backward pass recomputes."""

    none = "none"
    save = "save"
    full = "full"


class Via(StrEnum):
    """How tokens reach experts on other devices."""

    capacity = "capacity"
    ragged = "ragged"
    hierarchical = "hierarchical"
    ring = "ring"
    replicated = "replicated"


class DenseWeights(StrEnum):
    """How parameters that are not experts' are sharded over the experts' axis."""

    whole = "whole"
    cut = "split"


@dataclass(frozen=True)
class PlanRequest:
    """The arguments and options of ``moecc plan``."""

    model: AnyModelArgument
    machine: MachineOption
    pipeline: Annotated[
        str, typer.Option("-p", "--pipeline", help="Passes to run first; see moecc passes.")
    ] = ""
    load: LoadOption = None
    batch_tokens: BatchTokensOption = None
    sequence: SequenceOption = None
    mesh: Annotated[
        str | None,
        typer.Option("--mesh", metavar="AXIS=N,…", help="The mesh, instead of the best."),
    ] = None
    via: Annotated[
        Via | None, typer.Option("--via", help="How tokens reach experts on other devices.")
    ] = None
    remat: Annotated[Remat | None, typer.Option("--remat", help="What is computed twice.")] = None
    dense_weights: Annotated[
        DenseWeights | None,
        typer.Option("--dense-weights", help="Parameters of no expert, along the experts' axis."),
    ] = None
    rules: RulesOption = None
    step: Annotated[Step, typer.Option("--step", help="What is planned.")] = Step.train
    optimizer: Annotated[
        Optimizer, typer.Option("--optimizer", help="Adafactor is factored, without momentum.")
    ] = Optimizer.adamw
    dtype: ComputeTypeOption = "bf16"
    weight_dtype: Annotated[
        str, typer.Option("--weight-dtype", help="The type of the parameters.")
    ] = "f32"
    svg: Annotated[str | None, typer.Option("--svg", metavar="FILE", help="Draw the plan.")] = None
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False
    format: FormatOption = Format.human


def plan(request: PlanRequest) -> None:
    """Predict memory, time and traffic of MODEL on a machine, and find the best mesh.

    Nothing is read but headers, nothing compiled or run. docs/planning.md says what is
    counted, and what is not.
    """
    from moecc.cli.console import report, say
    from moecc.cli.files import check_writable, write_whole
    from moecc.plan.chart import chart
    from moecc.plan.report import plan_text

    if request.svg is not None:
        check_writable(request.svg, force=request.force)
    data = planned(request)
    if request.svg is not None:
        write_whole(request.svg, chart(data).encode(), force=request.force)
        say(f"the plan is drawn in {request.svg}")
    report("plan", data, lambda: plan_text(data), request.format)


def planned(request: PlanRequest) -> Report:
    """Return the plan as JSON values.

    Raises:
      UsageError: an option cannot be parsed.
      InputError: the model or a pass on it is invalid, or nothing fits.
    """
    from moecc.cli.pipelines import read_pipeline
    from moecc.model.open import open_model
    from moecc.pipeline.runner import run_pipeline
    from moecc.plan.batches import make_batch, parse_lengths
    from moecc.plan.machines import Machine, parse_machine
    from moecc.plan.report import plan_json
    from moecc.plan.search import search
    from moecc.plan.workload import Workload, workload

    passes = read_pipeline(request.pipeline, request.load or [])
    where = parse_machine(request.machine)
    constraints = _constraints(request)
    lengths = parse_lengths(request.sequence) if request.sequence is not None else None
    config = _step_config(request)
    with open_model(request.model, config_alone=True) as opened:
        run_pipeline(opened.graph, passes)
        graph = opened.graph

    def work_on(other: Machine) -> Workload:
        return workload(graph, make_batch(graph, other.devices, request.batch_tokens, lengths))

    work = work_on(where)
    ranking = search(work, where, config, constraints, work_on=work_on)
    return plan_json(request.model, work, where, config, ranking)


def _constraints(request: PlanRequest) -> Constraints:
    from moecc.plan.meshes import plan_mesh
    from moecc.plan.search import Constraints

    names = None if request.rules is None else tuple(request.rules.split(","))
    fixed = None if request.mesh is None else plan_mesh(request.mesh, names)
    return Constraints(fixed, request.via, request.remat, request.dense_weights, names)


def _step_config(request: PlanRequest) -> StepConfig:
    from moecc.plan.strategy import StepConfig
    from moecc.support.parse_units import float_type

    types = float_type(request.dtype), float_type(request.weight_dtype)
    return StepConfig(request.step is Step.train, request.optimizer.value, *types)


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    add_command(
        app,
        "plan",
        PlanRequest,
        plan,
        "Example: moecc plan preset:mixtral-8x7b --machine tpu:v5p:4x4x4",
    )
