"""``moecc compile``: a step of a model, compiled for a machine that need not be there."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from moecc.cli.cmd_plan import DenseWeights, Optimizer, Remat, Step, Via
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


class Emit(StrEnum):
    """The program that is printed."""

    stablehlo = "stablehlo"
    hlo = "hlo"


class Partition(StrEnum):
    """Whose collectives a program has."""

    explicit = "explicit"
    gspmd = "gspmd"


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""

    @app.command(
        "compile",
        epilog="Example: moecc compile preset:st-moe-base --machine tpu:v5p:2x2x2 --step train",
    )
    def compile(
        model: AnyModelArgument,
        machine: MachineOption,
        step: Annotated[Step, typer.Option("--step", help="What is compiled.")] = Step.train,
        batch_tokens: BatchTokensOption = None,
        sequence: SequenceOption = None,
        optimizer: Annotated[
            Optimizer, typer.Option("--optimizer", help="Adafactor is factored, without momentum.")
        ] = Optimizer.adamw,
        remat: Annotated[
            Remat | None, typer.Option("--remat", help="What is computed twice.")
        ] = None,
        dtype: ComputeTypeOption = "bf16",
        mesh: Annotated[
            str | None,
            typer.Option("--mesh", metavar="AXIS=N,…", help="The mesh, instead of the plan's."),
        ] = None,
        dense_weights: Annotated[
            DenseWeights | None,
            typer.Option(
                "--dense-weights", help="Parameters of no expert, along the experts' axis."
            ),
        ] = None,
        rules: RulesOption = None,
        partition: Annotated[
            Partition,
            typer.Option("--partition", help="The graph's own collectives, or XLA's partitioner."),
        ] = Partition.explicit,
        via: Annotated[
            Via | None, typer.Option("--via", help="How tokens reach experts on other devices.")
        ] = None,
        slice: Annotated[
            bool, typer.Option("--slice", help="Along model, each device sends a part of a row.")
        ] = False,
        capacity_factor: Annotated[
            float | None, typer.Option("--capacity-factor", help="Bounds the rows of an expert.")
        ] = None,
        emit: Annotated[
            Emit | None, typer.Option("--emit", help="Print the program, not the report.")
        ] = None,
        save: Annotated[
            str | None,
            typer.Option("--save", metavar="FILE", help="Write an artefact of jax.export."),
        ] = None,
        time_limit: Annotated[
            float, typer.Option("--time-limit", metavar="SECONDS", help="Of the compilation.")
        ] = 3600.0,
        force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
        format: FormatOption = Format.human,
    ) -> None:
        """Compile a step of MODEL for a machine, and say what it needs and moves.

        No weights are read and no accelerator is needed: libtpu compiles for TPUs, the CUDA
        plug-in of jax for GPUs. Exit code 1 if the program does not fit.
        """
        from moecc.ahead.apart import compile_apart
        from moecc.ahead.request import Request
        from moecc.ahead.text import compile_text
        from moecc.cli.console import report, say
        from moecc.cli.files import check_writable, write_whole
        from moecc.plan.batches import parse_lengths
        from moecc.plan.machines import parse_machine
        from moecc.plan.meshes import plan_mesh
        from moecc.settings import float_type

        parse_machine(machine)
        names = None if rules is None else tuple(rules.split(","))
        if mesh is not None:
            plan_mesh(mesh, names)
        if save is not None:
            check_writable(save, force=force)
        request = Request(
            model=model,
            machine=machine,
            step=step.value,
            batch_tokens=batch_tokens,
            lengths=None if sequence is None else parse_lengths(sequence),
            optimizer=optimizer.value,
            remat=None if remat is None else remat.value,
            dtype=float_type(dtype).name,
            mesh=mesh,
            dense_weights=None if dense_weights is None else dense_weights.value,
            rules=names,
            partition=partition.value,
            via=None if via is None else via.value,
            sliced=slice,
            capacity_factor=capacity_factor,
            emit=None if emit is None else emit.value,
            export=save is not None,
        )
        answer = compile_apart(request, time_limit)
        for remark in answer.data["remarks"]:
            say(f"note: {remark}")
        if save is not None:
            write_whole(save, answer.artefact, force=force)
            say(f"the exported program is in {save}")
        if emit is not None:
            print(answer.program)
        else:
            report("compile", answer.data, lambda: compile_text(answer.data), format)
        if not answer.data["fits"]:
            raise typer.Exit(1)
