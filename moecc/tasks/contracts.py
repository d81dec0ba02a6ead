"""Check the promises of the passes of a conversion, before anything is written."""

from __future__ import annotations

from dataclasses import dataclass, replace

from moecc.errors import CheckError, MoeccError, described
from moecc.ir.graph import Graph
from moecc.pipeline.passes import Context, Preserves
from moecc.pipeline.text import Pipeline, format_pass

TOLERANCE = 1e-12
"""Errors up to this are those of float64, and differ from machine to machine."""

SEEDS = (0,)
"""The seed of the random data on which a conversion checks each pass; ``--check`` takes two."""


@dataclass(frozen=True)
class PassReceipt:
    """One pass: its text, its promise, and the relative error measured on the small model."""

    text: str
    promised: Preserves
    measured: float


@dataclass(frozen=True)
class Contracts:
    """What the passes of a conversion were found to keep, on the model at reduced sizes.

    Attributes:
      passes: those that were checked.
      unchecked: why they were not; empty if they were.
    """

    passes: tuple[PassReceipt, ...] = ()
    unchecked: str = ""


def check_contracts(graph: Graph, pipeline: Pipeline, context: Context) -> Contracts:
    """Hold each pass of a conversion to its promise, on `graph` at reduced sizes.

    Raises:
      CheckError: a pass broke its promise, or left an invalid graph.
    """
    from moecc.tasks.check import check_pipeline

    # Neither weights nor statistics are read: they have the sizes of the real model.
    seed, models = context.seed, context.models
    statistics = None if context.statistics is None else replace(context.statistics, shapes=None)
    plain = Context(seed=seed, allow_unmatched=context.allow_unmatched, models=models,
                    statistics=statistics)  # fmt: skip
    try:
        checked = check_pipeline(graph, pipeline, context=plain, seeds=SEEDS)
    except CheckError:
        raise
    except MoeccError as error:
        return Contracts(unchecked=error.problems[0].what)
    except Exception as error:  # a crash has its reproducer when the real model is converted
        return Contracts(unchecked=described(error))
    return Contracts(
        tuple(PassReceipt(format_pass(c.item), c.promise, _rounded(c.measured)) for c in checked)
    )


def _rounded(error: float) -> float:
    """Return an error of two digits; 0 for one that rounding explains, which machines differ in."""
    return float(f"{error:.1e}") if error > TOLERANCE else 0.0


NOT_CHECKED = Contracts(unchecked="--no-check")
"""What is said if nobody wanted the passes to be checked."""
