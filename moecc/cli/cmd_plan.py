"""``moecc plan``: predict the cost of a model on a machine, and find the best mesh."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from moecc.cli import complete
from moecc.cli.console import Format
from moecc.cli.face import add_command
from moecc.cli.options import (
    AnyModelArgument,
    BatchTokensOption,
    ComputeTypeOption,
    FormatOption,
    LoadOption,
    MachineOption,
    MicroBatchesOption,
    ReduceTypeOption,
    RulesOption,
    SequenceOption,
    WeightTypeOption,
)

if TYPE_CHECKING:
    from moecc.ir.graph import Graph
    from moecc.plan.report import Report, SummaryReport
    from moecc.plan.step import StepConfig
    from moecc.plan.sweeps import SweepReport


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
    block = "block"
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
        str,
        typer.Option(
            "-p",
            "--pipeline",
            help="Passes to run first; see moecc passes.",
            autocompletion=complete.pipelines,
        ),
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
    weight_dtype: WeightTypeOption = None
    micro_batches: MicroBatchesOption = 1
    reduce_dtype: ReduceTypeOption = None
    explore: Annotated[
        bool, typer.Option("--explore", help="Price what one would try besides, and say why.")
    ] = False
    sweep: Annotated[
        list[str] | None,
        typer.Option(
            "--sweep",
            metavar="AXIS=N,…",
            help="Plan with each of: experts=8,16 top-k=1,2 capacity-factor=1.25,dropless.",
        ),
    ] = None
    html: Annotated[
        str | None, typer.Option("--html", metavar="FILE", help="Write a page of the plan.")
    ] = None
    save: Annotated[
        str | None,
        typer.Option("--save", metavar="FILE", help="Write what compile and train --plan read."),
    ] = None
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False
    format: FormatOption = Format.human


def plan(request: PlanRequest) -> None:
    """Predict memory, time and traffic of MODEL on a machine, and find the best mesh.

    Nothing is read but headers, nothing compiled or run. docs/planning.md says what is
    counted, and what is not.
    """
    from moecc.cli.console import report
    from moecc.cli.files import check_writable
    from moecc.plan.report import plan_text

    for file in filter(None, (request.html, request.save)):
        check_writable(file, force=request.force)
    if request.sweep is not None:
        _sweep(request, request.sweep)
        return
    data, searched = planned(request)
    _write(request, "plan", _files(request, data, searched))
    report("plan", data, lambda: plan_text(data), request.format)


def _sweep(request: PlanRequest, texts: list[str]) -> None:
    """Plan a sweep instead of one model."""
    from moecc.cli.console import report
    from moecc.plan.sweeps import sweep_text

    data = swept(request, texts)
    _write(request, "sweep", _sweep_files(request, data))
    report("sweep", data, lambda: sweep_text(data), request.format)


def _write(request: PlanRequest, what: str, files: Iterable[tuple[str, str]]) -> None:
    from moecc.cli.console import say
    from moecc.cli.files import write_whole

    for file, text in files:
        write_whole(file, text.encode(), force=request.force)
        say(f"the {what} is in {file}")


def _sweep_files(request: PlanRequest, data: SweepReport) -> Iterator[tuple[str, str]]:
    """Yield the files of a sweep that are asked for, and their texts."""
    if request.html is not None:
        from moecc.plan.page import sweep_page

        yield request.html, sweep_page(data, request.pipeline)


def _files(
    request: PlanRequest, data: Report, searched: list[SummaryReport]
) -> Iterator[tuple[str, str]]:
    """Yield the files that are asked for, and their texts."""
    if request.html is not None:
        from moecc.plan.page import plan_page

        yield request.html, plan_page(data, searched, request.pipeline)
    if request.save is not None:
        from moecc.plan.step import saved_text

        asked = {"model": request.model, "machine": request.machine, "pipeline": request.pipeline}
        yield request.save, saved_text(data, asked | _step(request).planned_settings())


def _step(request: PlanRequest) -> StepConfig:
    from moecc.plan.step import StepConfig

    return StepConfig.of_options(request)


def planned(request: PlanRequest) -> tuple[Report, list[SummaryReport]]:
    """Return the plan as JSON values, and all strategies that fit.

    Raises:
      UsageError: an option cannot be parsed.
      InputError: the model or a pass on it is invalid, or nothing fits.
    """
    from moecc.cli.pipelines import read_pipeline
    from moecc.ir.structure import without_opaque
    from moecc.model.open import open_model
    from moecc.pipeline.runner import run_pipeline
    from moecc.tasks.plan_step import check_step, plan_step

    passes = read_pipeline(request.pipeline, request.load or [])
    step = _step(request)
    check_step(request.machine, step)
    with open_model(request.model, config_alone=True) as opened:
        run_pipeline(opened.graph, passes)
        graph = without_opaque(opened.graph)
    found = plan_step(graph, request.model, request.machine, step, request.explore)
    if request.step is Step.train:
        _remark_on_logits(graph)
    return found


def _remark_on_logits(graph: Graph) -> None:
    """Say whether the step of a graph without logits is planned alone."""
    from moecc.analysis import is_trainable, reads_tokens
    from moecc.cli.console import say

    if is_trainable(graph):
        return
    if reads_tokens(graph):
        what = "compile takes its training step after -p tie-head, as train on masked tokens does"
    else:
        what = "its training step is planned, but neither compile nor train takes it"
    say(f"note: the model has no logits: {what}")


def swept(request: PlanRequest, texts: list[str]) -> SweepReport:
    """Return the sweep that `texts` spell, as JSON values.

    Raises:
      UsageError: an option cannot be parsed, or does not go with a sweep.
      InputError: no model of the sweep can be made and fits.
    """
    from moecc.cli.pipelines import read_pipeline
    from moecc.errors import Problem, UsageError
    from moecc.model.open import open_model
    from moecc.plan.sweeps import parse_sweep
    from moecc.tasks.plan_step import check_step
    from moecc.tasks.plan_sweep import Swept, plan_sweep

    ones = {"--save writes": request.save is not None, "--explore is about": request.explore}
    if said := [what for what, is_given in ones.items() if is_given]:
        raise UsageError(
            [Problem(f"{what} one plan, and a sweep has several",
                     hint="plan the model that you choose, without --sweep") for what in said]
        )  # fmt: skip
    sweep, passes = parse_sweep(texts), read_pipeline(request.pipeline, request.load or [])
    step = _step(request)
    check_step(request.machine, step)
    with open_model(request.model, config_alone=True) as opened:
        each = Swept(opened.graph, passes, request.model, request.machine, step)
        return plan_sweep(each, sweep)


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    add_command(
        app,
        "plan",
        PlanRequest,
        plan,
        "Example: moecc plan preset:mixtral-8x7b --machine tpu:v5p:4x4x4",
    )
