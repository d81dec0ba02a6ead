"""``moecc replay``: let a pipeline fail once more, from its reproducer."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

from moecc.errors import CheckError, MoeccError
from moecc.formats.files import read_utf8
from moecc.formats.open import open_checkpoint
from moecc.ir.graph import Graph
from moecc.ir.text import parse
from moecc.jobs.checks import check_pipeline
from moecc.jobs.command import Load, Report, Spelling
from moecc.jobs.failures import ComparisonTest
from moecc.model.inputs import require_file
from moecc.model.open import reads_small, registry_with
from moecc.rewrite.passes import Context
from moecc.rewrite.pipeline import Pipeline
from moecc.rewrite.runner import Replay, check_loaded, read_reproducer, run_pipeline
from moecc.version import __version__

# Repeat what a reproducer holds: its graph, pipeline, options and own passes.


def replay(reproducer: Annotated[str, Spelling("REPRODUCER")], *, load: Load = ()) -> Report:
    """Repeat a failure from its reproducer.

    It ends with the message and exit code of the failure. Files of your own that it needs are
    named in it, and run only where --load names them, too.

    Args:
      reproducer: File that a failure left, with its graph and pipeline.

    Raises:
      InputError: the file is no reproducer, or needs passes and `load` is empty.
      UsageError: `load` lacks a pass, or cannot be run.
      MoeccError: the failure, if it happens again.

    Example:
      moecc replay moecc-crash-1.moe
    """
    require_file(reproducer)
    path = Path(reproducer)
    stated = read_reproducer(path)
    check_loaded(path, stated, load)
    # First: a file may define operations of the graph.
    pipeline = Pipeline.parse(stated.pipeline, registry_with(load))
    graph = parse(read_utf8(path, sys.maxsize, "a .moe file"), reproducer)
    with ExitStack() as opened:
        context = _context(graph, stated, opened)
        if stated.check:
            check_pipeline(graph, pipeline, context=context)
        if stated.compare:
            failure = ComparisonTest(stated.compare, context)(graph, pipeline)
            if failure is not None:
                raise CheckError(str(failure), where=reproducer)
        run_pipeline(graph, pipeline, context=context)
    since = "" if stated.moecc == __version__ else f"; it failed in moecc {stated.moecc}"
    data = {"fails": False, "pipeline": stated.pipeline, "failed_in": stated.moecc}
    text = f"nothing fails: {stated.pipeline}{since}"
    return Report("replay", data, lambda: text, is_aside=True)


def _context(graph: Graph, stated: Replay, opened: ExitStack) -> Context:
    """Return the context of the passes; it reads the checkpoint if that is still there."""
    plain = Context(seed=stated.seed, allow_unmatched=stated.allow_unmatched)
    checkpoint_name = graph.attrs.get("checkpoint")
    if not isinstance(checkpoint_name, str) or not checkpoint_name:
        return plain
    try:
        checkpoint = opened.enter_context(open_checkpoint(checkpoint_name))
    except MoeccError:
        return plain
    return Context(stated.seed, stated.allow_unmatched, read=reads_small(checkpoint))
