"""Exports of a run while it is trained: written, read back, and compared with their manifest."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from moecc.formats.manifest import check_manifest
from moecc.ir.graph import Graph
from moecc.model.open import open_model
from moecc.pipeline.text import Pipeline
from moecc.tasks.convert import plan, write
from moecc.train.events import Event, Exported, Saved, TrainJob
from moecc.translate.export import export_graph
from moecc.translate.gguf import architecture_of
from moecc.translate.propose import check_target

EXPORTS = "exports"
"""The folder of a run with its exports, by the numbers of their steps."""

DEFAULT_TARGET = "auto"


def exported(job: TrainJob, events: Iterable[Event]) -> Iterator[Event]:
    """Yield `events`, and `Exported` after a step that was saved and is due to be exported.

    Raises:
      InputError: the family cannot express the model.
      CheckError: what was written is not what is read back.
      MachineError: the disk is full.
    """
    every = job.recipe.run.export_steps
    for event in events:
        yield event
        if isinstance(event, Saved) and every and event.step % every == 0:
            yield Exported(event.step, export_step(job, event.step))


def check_export(graph: Graph, target: str) -> None:
    """Check the family that is named for exports, if one is.

    Raises:
      UsageError: there is no such family.
      InputError: it cannot express `graph`.
    """
    if target and target != DEFAULT_TARGET and architecture_of(target) is None:
        check_target(target)
        export_graph(graph, target)


def export_step(job: TrainJob, step: int) -> Path:
    """Write ``exports/N`` of a run, and compare it with its manifest. Raises as `exported`."""
    out = job.run / EXPORTS / str(step)
    out.parent.mkdir(exist_ok=True)
    with open_model(f"{job.run}@{step}") as model:
        target = job.recipe.run.export_to or DEFAULT_TARGET
        # The folder is beside its source, in a place of its own.
        write(plan(model, Pipeline.parse(""), target), out, force=True)
    check_manifest(out)
    return out
