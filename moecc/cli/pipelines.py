"""Passes and families of a user's own files, and pipeline strings with the passes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moecc.ir.graph import Graph
    from moecc.pipeline.registry import Registry
    from moecc.pipeline.text import Pipeline


def registry_with(files: Sequence[str]) -> Registry:
    """Return the installed passes and those defined by `files`, and add the files' families.

    Raises:
      UsageError: a file cannot be run or defines nothing, or a name is taken.
    """
    from moecc.pipeline.registry import installed

    registry = installed()
    for file in files:
        from moecc.families.outside import add_families

        registry = registry.with_file(Path(file), required=not add_families(file))
    return registry


def read_pipeline(text: str, files: Sequence[str] = ()) -> Pipeline:
    """Return the pipeline of `text`, after printing its warnings to stderr.

    Raises:
      UsageError: all problems of the text.
    """
    from moecc.cli.console import say
    from moecc.pipeline.text import Pipeline

    pipeline = Pipeline.parse(text, registry_with(files))
    for warning in pipeline.warnings():
        say(f"warning: {warning}")
    return pipeline


def read_failing(
    file: str, pipeline: str, load: Sequence[str], seed: int
) -> tuple[Graph, Pipeline, int]:
    """Return graph, pipeline and seed of something that fails: of a reproducer, its own.

    Raises:
      InputError: the file is no graph.
      UsageError: all problems of the pipeline.
    """
    from moecc.model.open import read_graph
    from moecc.pipeline.reproducer import is_reproducer, read_reproducer

    if not pipeline and is_reproducer(file):
        stated = read_reproducer(Path(file))
        pipeline, load, seed = stated.pipeline, [*load, *stated.load], stated.seed
    return read_graph(file), read_pipeline(pipeline, load), seed
