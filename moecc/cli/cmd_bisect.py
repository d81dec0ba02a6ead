"""``moecc bisect``: find the pass, the rewrite and the value that are wrong."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

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
    from moecc.tasks.bisection import Bisection


@dataclass(frozen=True)
class BisectRequest:
    """The arguments and options of ``moecc bisect``."""

    file: GraphArgument
    pipeline: PipelineOption = ""
    compare: CompareOption = None
    seed: SeedOption = 0
    allow_unmatched: AllowUnmatchedOption = False
    load: LoadOption = None
    format: FormatOption = Format.human


def bisect(request: BisectRequest) -> None:
    """Find the first pass of a pipeline that is wrong, its first wrong rewrite, and the value.

    The model is made small first, if it can be.
    """
    from moecc.cli.console import report
    from moecc.cli.pipelines import read_failing
    from moecc.pipeline.passes import Context
    from moecc.tasks.bisect import bisect as find
    from moecc.tasks.shrink import small_if_possible

    graph, passes, seed = read_failing(
        request.file, request.pipeline, request.load or [], request.seed
    )
    context = Context(seed=seed, allow_unmatched=request.allow_unmatched)
    # Weights are compared as they are written, so their expressions have to stay.
    small = graph if request.compare == "weights" else small_if_possible(graph)
    found = find(small, passes, context=context, compare=request.compare or "")
    report("bisect", found.as_dict(), lambda: bisection_text(found), request.format)


def bisection_text(found: Bisection) -> str:
    """Return a human-readable bisection."""
    from moecc.pipeline.text import format_pass
    from moecc.tasks.bisection import PASS

    rows = [f"failure  {found.failure}", f"step     {found.step}"]
    if found.item is not None:
        seen = "" if found.step == PASS else "first seen after "
        rows.append(f"pass     {seen}{found.number}, {format_pass(found.item)}")
    if found.rewrite:
        which, of = found.rewrites
        rows.append(f"rewrite  {found.rewrite} ({which} of {of})")
    if found.gap is not None:
        rows.append(f"value    {found.gap}")
    return "\n".join(rows)


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    add_command(
        app,
        "bisect",
        BisectRequest,
        bisect,
        "Example: moecc bisect model.moe -p 'canonicalize,mine' --load mine.py",
    )
