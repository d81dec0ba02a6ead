"""Repeat what a reproducer holds: its graph, pipeline, options and own passes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from moecc.errors import CheckError, InputError, MoeccError
from moecc.formats.files import read_utf8
from moecc.formats.open import open_checkpoint
from moecc.ir.graph import Graph
from moecc.ir.text import parse
from moecc.model.initialise import reads_small
from moecc.model.open import registry_with
from moecc.pipeline.passes import Context
from moecc.pipeline.reproducer import Replay, check_loaded, read_reproducer
from moecc.pipeline.runner import run_pipeline
from moecc.pipeline.text import Pipeline
from moecc.tasks.check import check_pipeline
from moecc.tasks.failures import ComparisonTest


def replay(path: str | Path, files: Sequence[str] = ()) -> Replay:
    """Run the pipeline of a reproducer once more, and return what was run if nothing fails.

    Args:
      path: the reproducer.
      files: the user's files of passes; those that the reproducer names are not run.

    Raises:
      InputError: the file is no reproducer, or needs passes and `files` is empty.
      UsageError: `files` lack a pass, or cannot be run.
      MoeccError: the failure, if it happens again.
    """
    place = Path(path)
    if not place.is_file():
        raise InputError("no such file", where=str(path))
    stated = read_reproducer(place)
    check_loaded(place, stated, files)
    graph = parse(read_utf8(place, sys.maxsize, "a .moe file"), str(path))
    pipeline = Pipeline.parse(stated.pipeline, registry_with(files))
    with ExitStack() as opened:
        context = _context(graph, stated, opened)
        if stated.check:
            check_pipeline(graph, pipeline, context=context)
        if stated.compare:
            found = ComparisonTest(stated.compare, context)(graph, pipeline)
            if found is not None:
                raise CheckError(str(found), where=str(path))
        run_pipeline(graph, pipeline, context=context)
    return stated


def _context(graph: Graph, stated: Replay, opened: ExitStack) -> Context:
    """Return the context of the passes; it reads the checkpoint if that is still there."""
    plain = Context(seed=stated.seed, allow_unmatched=stated.allow_unmatched)
    place = graph.attrs.get("checkpoint")
    if not isinstance(place, str) or not place:
        return plain
    try:
        checkpoint = opened.enter_context(open_checkpoint(place))
    except MoeccError:
        return plain
    return Context(stated.seed, stated.allow_unmatched, read=reads_small(checkpoint))
