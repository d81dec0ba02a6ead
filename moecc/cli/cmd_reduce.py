"""``moecc reduce``: make an input that fails small."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from moecc.cli.console import Format
from moecc.cli.face import add_command
from moecc.cli.options import (
    AllowUnmatchedOption,
    CompareOption,
    FormatOption,
    GraphArgument,
    LoadOption,
    PipelineOption,
    SeedOption,
)

if TYPE_CHECKING:
    from moecc.pipeline.passes import Context
    from moecc.tasks.failures import FailureTest
    from moecc.tasks.reduce import Reduction


@dataclass(frozen=True)
class ReduceRequest:
    """The arguments and options of ``moecc reduce``."""

    file: GraphArgument
    pipeline: PipelineOption = ""
    compare: CompareOption = None
    test: Annotated[
        str | None,
        typer.Option(
            "--test", metavar="COMMAND", help="What fails: a command, with {} for the graph's file."
        ),
    ] = None
    output: Annotated[
        str | None,
        typer.Option("-o", "--output", metavar="FILE", help="Where to write, else stdout."),
    ] = None
    time_limit: Annotated[
        float, typer.Option("--time-limit", metavar="S", min=0, help="Then the smallest so far.")
    ] = 60.0
    seed: SeedOption = 0
    allow_unmatched: AllowUnmatchedOption = False
    load: LoadOption = None
    force: Annotated[bool, typer.Option("--force", help="Replace an existing FILE.")] = False
    format: FormatOption = Format.human


def reduce(request: ReduceRequest) -> None:
    """Make FILE and the pipeline small while they fail in the same way, and print what is left.

    A failure is a crash of a pass, an invalid graph, a broken promise; with --compare a value or a
    weight that is wrong after the passes; with --test the exit code of a command.
    """
    from moecc.cli.console import say
    from moecc.cli.files import check_writable
    from moecc.cli.pipelines import read_failing
    from moecc.pipeline.passes import Context
    from moecc.pipeline.reproducer import Replay, loaded_files, reproducer_text
    from moecc.tasks.reduce import reduce as made_small

    if request.output is not None and request.output != "-":
        check_writable(request.output, force=request.force)
    graph, passes, seed = read_failing(
        request.file, request.pipeline, request.load or [], request.seed
    )
    context = Context(seed=seed, allow_unmatched=True)
    done = made_small(
        graph, passes, _test(request, context), context=context,
        time_limit_seconds=request.time_limit,
    )  # fmt: skip
    for line in _summary(done, len(graph), len(passes)):
        say(line)
    check = done.failure.kind in ("promise", "invalid")
    replay = Replay(
        str(done.pipeline), seed, True, check, loaded_files(done.pipeline), request.compare or "",
    )  # fmt: skip
    _write(request, done, reproducer_text(done.graph, replay, f"{done.failure}".splitlines()[0]))


def _write(request: ReduceRequest, done: Reduction, text: str) -> None:
    from moecc.cli.files import write_artefact

    write_artefact(
        "reduce", text, request.output, force=request.force, format=request.format,
        pipeline=str(done.pipeline), failure=str(done.failure), nodes=len(done.graph),
    )  # fmt: skip


def _test(request: ReduceRequest, context: Context) -> FailureTest:
    from moecc.errors import UsageError
    from moecc.tasks.failures import CommandTest, ComparisonTest, PromiseTest

    if request.test is not None and request.compare is not None:
        raise UsageError("--test and --compare exclude each other")
    if request.test is not None:
        return CommandTest(request.test)
    if request.compare is not None:
        return ComparisonTest(request.compare, context)
    return PromiseTest(context)


def _summary(done: Reduction, nodes: int, passes: int) -> list[str]:
    rows = [
        f"{nodes} nodes became {len(done.graph)}, {passes} passes {len(done.pipeline)}, "
        f"in {done.seconds:.1f} s and {done.tries} tries"
        + ("" if done.finished else "; the time was over"),
        str(done.failure),
    ]
    return [*rows, f"pipeline: {done.pipeline}"] if len(done.pipeline) else rows


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    add_command(
        app,
        "reduce",
        ReduceRequest,
        reduce,
        "Example: moecc reduce model.moe -p 'canonicalize,mine' --load mine.py -o small.moe",
    )
