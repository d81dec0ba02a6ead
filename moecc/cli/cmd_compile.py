"""``moecc compile``: compile a step of a model for hardware that need not be attached."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from moecc.cli.cmd_plan import DenseWeights, Optimizer, Remat, Step, Via
from moecc.cli.console import Format
from moecc.cli.face import add_command
from moecc.cli.options import (
    AnyModelArgument,
    BatchTokensOption,
    ComputeTypeOption,
    FormatOption,
    LoadOption,
    MicroBatchesOption,
    PlanOption,
    ReduceTypeOption,
    RulesOption,
    SequenceOption,
    WeightTypeOption,
)

if TYPE_CHECKING:
    from moecc.ahead.process import CompileOutcome
    from moecc.ahead.request import Request


_PLANNED = (
    "machine", "pipeline", "mesh", "rules", "via", "remat", "dense_weights", "slice",
    "batch_tokens", "sequence", "weight_dtype", "reduce_dtype",
)  # fmt: skip
"""The options that a plan says, which are not given beside it."""


class Emit(StrEnum):
    """The program that is printed."""

    stablehlo = "stablehlo"
    hlo = "hlo"


class Partition(StrEnum):
    """The origin of a program's collectives."""

    explicit = "explicit"
    gspmd = "gspmd"


@dataclass(frozen=True)
class CompileRequest:
    """The arguments and options of ``moecc compile``."""

    model: AnyModelArgument
    machine: Annotated[
        str | None,
        typer.Option(
            "--machine",
            metavar="M",
            help="As of moecc plan: v5e-16, h100x8, FILE.toml; or that of --plan.",
        ),
    ] = None
    plan: PlanOption = None
    pipeline: Annotated[
        str, typer.Option("-p", "--pipeline", help="Passes to run first; see moecc passes.")
    ] = ""
    load: LoadOption = None
    step: Annotated[Step, typer.Option("--step", help="What is compiled.")] = Step.train
    batch_tokens: BatchTokensOption = None
    sequence: SequenceOption = None
    optimizer: Annotated[
        Optimizer, typer.Option("--optimizer", help="Adafactor is factored, without momentum.")
    ] = Optimizer.adamw
    set: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Of the optimizer, as in a recipe: optimizer.clip=0.",
        ),
    ] = None
    remat: Annotated[Remat | None, typer.Option("--remat", help="What is computed twice.")] = None
    dtype: ComputeTypeOption = "bf16"
    weight_dtype: WeightTypeOption = None
    micro_batches: MicroBatchesOption = 1
    reduce_dtype: ReduceTypeOption = None
    mesh: Annotated[
        str | None,
        typer.Option("--mesh", metavar="AXIS=N,…", help="The mesh, instead of the plan's."),
    ] = None
    dense_weights: Annotated[
        DenseWeights | None,
        typer.Option("--dense-weights", help="Parameters of no expert, along the experts' axis."),
    ] = None
    rules: RulesOption = None
    partition: Annotated[
        Partition,
        typer.Option("--partition", help="The graph's own collectives, or XLA's partitioner."),
    ] = Partition.explicit
    via: Annotated[
        Via | None, typer.Option("--via", help="How tokens reach experts on other devices.")
    ] = None
    slice: Annotated[
        bool, typer.Option("--slice", help="Along model, each device sends a part of a row.")
    ] = False
    chunks: Annotated[
        int,
        typer.Option(
            "--chunks", metavar="N", min=1, help="Rows are exchanged in parts, beside experts."
        ),
    ] = 1
    overlap: Annotated[
        bool, typer.Option("--overlap", help="For v5p: gathers and reductions beside products.")
    ] = False
    quick: Annotated[
        bool, typer.Option("--quick", help="The least effort of the compiler; a slower program.")
    ] = False
    capacity_factor: Annotated[
        float | None, typer.Option("--capacity-factor", help="Bounds the rows of an expert.")
    ] = None
    emit: Annotated[
        Emit | None, typer.Option("--emit", help="Print the program, not the report.")
    ] = None
    save: Annotated[
        str | None,
        typer.Option("--save", metavar="FILE", help="Write an artefact of jax.export."),
    ] = None
    time_limit: Annotated[
        float, typer.Option("--time-limit", metavar="SECONDS", help="Of the compilation.")
    ] = 3600.0
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False
    format: FormatOption = Format.human


def compile_step(request: CompileRequest) -> int:
    """Compile a step of MODEL for a machine, and say what it needs and moves.

    No weights are read and no accelerator is needed: libtpu compiles for TPUs, the CUDA
    plug-in of jax for GPUs. Exit code 1 if the program does not fit.
    """
    from moecc.ahead.process import compile_in_subprocess
    from moecc.cli.console import say
    from moecc.cli.files import check_writable, write_whole
    from moecc.support.process import signals_raised

    _check_effort(request)
    job = ahead_request(request if request.plan is None else planned(request, request.plan))
    if request.save is not None:
        check_writable(request.save, force=request.force)
    _require(job)
    with signals_raised():  # the worker must not outlive this process
        answer = compile_in_subprocess(job, request.time_limit)
    for remark in answer.data["remarks"]:
        say(f"note: {remark}")
    if request.save is not None:
        write_whole(request.save, answer.artefact, force=request.force)
        say(f"the exported program is in {request.save}")
    _print(answer, request)
    return 0 if answer.data["fits"] else 1


def _require(job: Request) -> None:
    """Raise MachineError for all that is missing, the compiler of the machine included."""
    from moecc.plan.machines import find_machine
    from moecc.support.extras import require

    own = {"tpu": ("tpu",), "gpu": ("gpu-aot",)}.get(find_machine(job.machine).kind, ())
    step = ("train",) if job.config.train else ()
    require("compiling", ("xla", *(["export"] if job.export else [])), (*step, *own))


def ahead_request(request: CompileRequest) -> Request:
    """Return the request to the compiling process.

    Raises:
      UsageError: machine, mesh, rules, lengths, micro-batches or type cannot be parsed.
    """
    from moecc.ahead.request import Request, update_of
    from moecc.cli.pipelines import read_pipeline
    from moecc.errors import UsageError
    from moecc.plan.machines import find_machine
    from moecc.plan.step import StepConfig

    # The compiling process parses all again; errors are reported before it is started.
    if request.machine is None:
        raise UsageError("no machine is named", expected="--machine M, or --plan FILE")
    find_machine(request.machine)
    config = replace(StepConfig.of_options(request), sliced=request.slice)
    config.check()
    sets = tuple(request.set or ())
    update_of(config.optimizer, sets)
    load = request.load or []
    return Request(
        model=request.model,
        machine=request.machine,
        config=config,
        emit=request.emit and request.emit.value,
        export=request.save is not None,
        overlap=request.overlap,
        quick=request.quick,
        load=tuple(load),
        pipeline=str(read_pipeline(request.pipeline, load)),
        sets=sets,
    )


def _check_effort(request: CompileRequest) -> None:
    """Raise UsageError if the least effort is to overlap, which it leaves out."""
    from moecc.errors import UsageError

    if request.quick and request.overlap:
        raise UsageError(
            "the least effort of the compiler puts no collective beside products",
            expected="--quick or --overlap",
            found="both",
            hint="without --quick the report shows what overlaps",
        )


def planned(request: CompileRequest, file: str) -> CompileRequest:
    """Return a request with the step, the mesh and the ways of a saved plan.

    Raises:
      InputError: the file is no plan.
      UsageError: options say what the plan says, too.
    """
    from moecc.errors import Problem, UsageError
    from moecc.plan.step import read_plan

    twice = [name for name in _PLANNED if getattr(request, name)]
    twice += ["micro_batches"] if request.micro_batches > 1 else []
    if twice:
        raise UsageError(
            [Problem("the plan says it", f"--{name.replace('_', '-')}", found=f"--plan {file}",
                     hint="leave one of the two out") for name in twice]
        )  # fmt: skip
    plan = read_plan(file)
    config = plan.config
    return replace(
        request,
        machine=plan.machine,
        pipeline=plan.pipeline,
        step=Step(config.step),
        optimizer=Optimizer(config.optimizer),
        remat=Remat(config.remat or "full"),
        dense_weights=DenseWeights(config.dense_weights or "whole"),
        via=Via(config.via) if config.via else None,
        slice=config.sliced,
        **{name: getattr(config, name) for name in (
            "batch_tokens", "sequence", "mesh", "rules", "dtype", "weight_dtype", "micro_batches",
            "reduce_dtype",
        )},
    )  # fmt: skip


def _print(answer: CompileOutcome, request: CompileRequest) -> None:
    from moecc.ahead.text import compile_text
    from moecc.cli.console import report

    if request.emit is not None:
        print(answer.program)
    else:
        report("compile", answer.data, lambda: compile_text(answer.data), request.format)


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    add_command(
        app,
        "compile",
        CompileRequest,
        compile_step,
        "Example: moecc compile preset:st-moe-base --machine tpu:v5p:2x2x2 --step train",
    )
