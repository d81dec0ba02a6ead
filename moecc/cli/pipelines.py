"""Passes and families of a user's own files, and pipeline strings with the passes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moecc.ir.graph import Graph
    from moecc.pipeline.text import Pipeline


def read_pipeline(text: str, files: Sequence[str] = ()) -> Pipeline:
    """Return the pipeline of `text`, after printing its warnings to stderr.

    Raises:
      UsageError: all problems of the text.
    """
    from moecc.cli.console import warn
    from moecc.model.open import registry_with
    from moecc.pipeline.text import Pipeline

    pipeline = Pipeline.parse(text, registry_with(files))
    for warning in pipeline.warnings():
        warn(str(warning))
    return pipeline


def read_failing(
    file: str, pipeline: str, load: Sequence[str], seed: int
) -> tuple[Graph, Pipeline, int]:
    """Return graph, pipeline and seed of something that fails: of a reproducer, its own.

    Raises:
      InputError: the file is no graph, or a reproducer that needs passes and `load` is empty.
      UsageError: all problems of the pipeline.
    """
    from moecc.model.open import read_graph
    from moecc.pipeline.reproducer import check_loaded, is_reproducer, read_reproducer

    if not pipeline and is_reproducer(file):
        stated = read_reproducer(Path(file))
        check_loaded(Path(file), stated, load)
        pipeline, seed = stated.pipeline, stated.seed
    return read_graph(file), read_pipeline(pipeline, load), seed
