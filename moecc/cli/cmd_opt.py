"""``moecc opt``: run passes over a graph; text in, text out."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moecc.cli import complete
from moecc.cli.console import Format
from moecc.cli.face import add_command
from moecc.cli.options import FormatOption, LoadOption

if TYPE_CHECKING:
    from moecc.ir.graph import Graph
    from moecc.pipeline.passes import Context
    from moecc.pipeline.runner import Instrument
    from moecc.pipeline.text import Pipeline


@dataclass(frozen=True)
class OptRequest:
    """The arguments and options of ``moecc opt``."""

    file: Annotated[str, typer.Argument(metavar="FILE|-", help="A .moe graph, or stdin.")]
    pipeline: Annotated[
        str,
        typer.Option(
            "-p",
            "--pipeline",
            help="The passes; see moecc passes.",
            autocompletion=complete.pipelines,
        ),
    ] = ""
    output: Annotated[
        str | None,
        typer.Option("-o", "--output", metavar="FILE", help="Where to write, else stdout."),
    ] = None
    print_before: Annotated[
        str | None,
        typer.Option("--print-before", metavar="all|NAME,…", help="Print the graph to stderr."),
    ] = None
    print_after: Annotated[
        str | None,
        typer.Option(
            "--print-after", metavar="all|changed|NAME,…", help="Print the graph to stderr."
        ),
    ] = None
    diff: Annotated[bool, typer.Option("--diff", help="Print what each pass changed.")] = False
    dump_dir: Annotated[
        str | None,
        typer.Option("--dump-dir", metavar="DIR", help="Write 003_upcycle.moe and so on."),
    ] = None
    check: Annotated[bool, typer.Option("--check", help="Hold each pass to what it preserves.")] = (
        False
    )
    timing: Annotated[bool, typer.Option("--timing", help="Say how long each took.")] = False
    stats: Annotated[bool, typer.Option("--stats", help="Say what each pass counted.")] = False
    remarks: Annotated[bool, typer.Option("--remarks", help="Print remarks and near misses.")] = (
        False
    )
    seed: Annotated[int, typer.Option("--seed", help="Of all random choices.")] = 0
    allow_unmatched: Annotated[
        bool, typer.Option("--allow-unmatched", help="A pass may find nothing to do.")
    ] = False
    load: LoadOption = None
    html: Annotated[
        str | None,
        typer.Option("--html", metavar="FILE", help="Write a page of the graph before and after."),
    ] = None
    force: Annotated[bool, typer.Option("--force", help="Replace an existing FILE.")] = False
    format: FormatOption = Format.human


def opt(request: OptRequest) -> None:
    """Run a pipeline over a graph; the verifier runs after every pass.

    The graph goes to stdout or -o, everything else to stderr.
    """
    from moecc.cli.files import check_writable, graph_text, write_artefact
    from moecc.cli.pipelines import read_pipeline
    from moecc.ir.structure import clone
    from moecc.model.open import read_graph
    from moecc.pipeline.passes import Context
    from moecc.pipeline.reproducer import temporary_folder
    from moecc.pipeline.runner import run_pipeline

    passes = read_pipeline(request.pipeline, request.load or [])
    for file in (request.output, request.html):
        if file is not None and file != "-":
            check_writable(file, force=request.force)
    watching = _instruments(request)
    graph = read_graph(request.file)
    before, remarks = clone(graph) if request.html is not None else graph, list[str]()
    context = Context(
        seed=request.seed, allow_unmatched=request.allow_unmatched,
        remark=lambda remark: remarks.append(str(remark)),
    )  # fmt: skip
    if request.check:
        _check(graph, passes, context)
    folder = partial(Path, request.dump_dir) if request.dump_dir else temporary_folder
    run_pipeline(graph, passes, context=context, instruments=watching, crash_folder=folder)
    if request.html is not None:
        _write_page(request.html, before, graph, passes, remarks, force=request.force)
    text = graph_text(graph, request.output)
    said = {"pipeline": str(passes), "remarks": remarks}
    write_artefact("opt", text, request.output, force=request.force, format=request.format, **said)


def _write_page(
    file: str, before: Graph, after: Graph, passes: Pipeline, remarks: list[str], *, force: bool
) -> None:
    from moecc.cli.console import say
    from moecc.cli.files import write_whole
    from moecc.tasks.graph_page import graph_page

    text = graph_page(before, after if len(passes) else None, str(passes), remarks)
    write_whole(file, text.encode(), force=force)
    say(f"the graph is in {file}")


def _check(graph: Graph, passes: Pipeline, context: Context) -> None:
    from moecc.cli.console import say
    from moecc.tasks.check import check_pipeline

    for checked in check_pipeline(graph, passes, context=context):
        say(f"checked: {checked}")


def _names(stated: str, *words: str) -> str | frozenset[str]:
    """Return one of `words`, or the names of passes that are stated."""
    return stated if stated in words else frozenset(n.strip() for n in stated.split(","))


def _instruments(request: OptRequest) -> list[Instrument]:
    from moecc.pipeline import runner as instruments

    made: list[Instrument] = []
    if request.print_before is not None:
        made.append(instruments.PrintBefore(_names(request.print_before, "all"), sys.stderr))
    if request.print_after is not None:
        which = _names(request.print_after, "all", "changed")
        made.append(instruments.PrintAfter(which, sys.stderr))
    if request.diff:
        made.append(instruments.DiffAfter(sys.stderr))
    if request.dump_dir is not None:
        made.append(instruments.DumpFolder(Path(request.dump_dir)))
    if request.timing:
        made.append(instruments.Timing(sys.stderr))
    if request.stats:
        made.append(instruments.StatisticsTable(sys.stderr))
    if request.remarks:
        made.append(instruments.Remarks(sys.stderr))
    return made


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    add_command(
        app,
        "opt",
        OptRequest,
        opt,
        "Example: moecc import SmolLM2-135M | moecc opt - -p 'upcycle{experts=8}' --diff",
    )
