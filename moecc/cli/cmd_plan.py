"""``moecc plan``: what a model costs on a machine, and the mesh that suits it best."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from moecc.cli.console import Format
from moecc.cli.options import (
    AnyModelArgument,
    BatchTokensOption,
    ComputeTypeOption,
    FormatOption,
    MachineOption,
    RulesOption,
    SequenceOption,
)


class Step(StrEnum):
    """What is planned."""

    train = "train"
    forward = "forward"


class Optimizer(StrEnum):
    """What updates the parameters."""

    adamw = "adamw"
    adafactor = "adafactor"


class Remat(StrEnum):
    """What the backward pass computes again."""

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
    """How parameters that are no experts' lie along the experts' axis."""

    whole = "whole"
    cut = "split"


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""

    @app.command("plan", epilog="Example: moecc plan preset:mixtral-8x7b --machine tpu:v5p:4x4x4")
    def plan(
        model: AnyModelArgument,
        machine: MachineOption,
        pipeline: Annotated[
            str, typer.Option("-p", "--pipeline", help="Passes to run first; see moecc passes.")
        ] = "",
        batch_tokens: BatchTokensOption = None,
        sequence: SequenceOption = None,
        mesh: Annotated[
            str | None,
            typer.Option("--mesh", metavar="AXIS=N,…", help="The mesh, instead of the best."),
        ] = None,
        via: Annotated[
            Via | None, typer.Option("--via", help="How tokens reach experts on other devices.")
        ] = None,
        remat: Annotated[
            Remat | None, typer.Option("--remat", help="What is computed twice.")
        ] = None,
        dense_weights: Annotated[
            DenseWeights | None,
            typer.Option(
                "--dense-weights", help="Parameters of no expert, along the experts' axis."
            ),
        ] = None,
        rules: RulesOption = None,
        step: Annotated[Step, typer.Option("--step", help="What is planned.")] = Step.train,
        optimizer: Annotated[
            Optimizer, typer.Option("--optimizer", help="Adafactor is factored, without momentum.")
        ] = Optimizer.adamw,
        dtype: ComputeTypeOption = "bf16",
        weight_dtype: Annotated[
            str, typer.Option("--weight-dtype", help="The type of the parameters.")
        ] = "f32",
        svg: Annotated[
            str | None, typer.Option("--svg", metavar="FILE", help="Draw the plan.")
        ] = None,
        force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
        format: FormatOption = Format.human,
    ) -> None:
        """Predict memory, time and traffic of MODEL on a machine, and find the best mesh.

        Nothing is read but headers, nothing compiled or run. docs/planning.md says what is
        counted, and what is not.
        """
        from moecc.cli.console import report, say
        from moecc.cli.files import check_writable, write_whole
        from moecc.cli.pipelines import read_pipeline
        from moecc.models import open_model
        from moecc.pipeline.runner import run_pipeline
        from moecc.plan.batches import make_batch, parse_lengths
        from moecc.plan.chart import chart
        from moecc.plan.machines import Machine, parse_machine
        from moecc.plan.meshes import plan_mesh
        from moecc.plan.report import plan_json, plan_text
        from moecc.plan.search import Wish, search
        from moecc.plan.strategy import Setting
        from moecc.plan.workload import Workload, workload
        from moecc.settings import float_type

        if svg is not None:
            check_writable(svg, force=force)
        passes = read_pipeline(pipeline)
        where = parse_machine(machine)
        names = None if rules is None else tuple(rules.split(","))
        fixed = None if mesh is None else plan_mesh(mesh, names)
        wish = Wish(fixed, via, remat, dense_weights, names)
        lengths = parse_lengths(sequence) if sequence is not None else None
        setting = Setting(
            step is Step.train, optimizer.value, float_type(dtype), float_type(weight_dtype)
        )
        with open_model(model) as opened:
            run_pipeline(opened.graph, passes)
            graph = opened.graph

        def work_on(other: Machine) -> Workload:
            return workload(graph, make_batch(graph, other.devices, batch_tokens, lengths))

        work = work_on(where)
        ranking = search(work, where, setting, wish, work_on=work_on)
        data = plan_json(model, work, where, setting, ranking)
        if svg is not None:
            write_whole(svg, chart(data).encode(), force=force)
            say(f"the plan is drawn in {svg}")
        report("plan", data, lambda: plan_text(data), format)
