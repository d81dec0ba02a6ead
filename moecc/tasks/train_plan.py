"""Whether a saved plan is of the step that a recipe trains."""

from __future__ import annotations

from collections.abc import Iterator

from moecc.errors import InputError, MoeccError, Problem
from moecc.families.describe import count_parameters
from moecc.pipeline.text import Pipeline
from moecc.plan.step import SavedPlan
from moecc.train.events import TrainJob

_HINT = "moecc plan MODEL -p PIPELINE --save FILE, of the recipe's model and passes"


def check_plan(plan: SavedPlan, job: TrainJob, path: str) -> None:
    """Check that a plan is of a training step, of the passes and the size of a run's model.

    A model that was converted before needs no passes, so that passes are compared where both plan
    and recipe have some.

    Args:
      plan: the plan.
      job: the run.
      path: of the plan, for messages.

    Raises:
      InputError: it is of another step or model; with everything that differs.
    """
    problems = list(_differences(plan, job, path))
    if problems:
        raise InputError(problems)


def _differences(plan: SavedPlan, job: TrainJob, path: str) -> Iterator[Problem]:
    section = job.recipe.model
    if not plan.config.train:
        yield Problem("the plan is of another step", f"{path}: request.step", "train",
                      plan.config.step, "moecc plan … --step train --save FILE")  # fmt: skip
    if plan.pipeline and section.pipeline and _passes(plan.pipeline) != _passes(section.pipeline):
        expected = f"{section.pipeline}, as model.pipeline is"
        yield Problem("the plan is of other passes", f"{path}: request.pipeline", expected,
                      plan.pipeline, _HINT)  # fmt: skip
    count = count_parameters(job.graph).total
    if plan.parameters not in (None, count):
        planned = f"{plan.parameters:,}, of {plan.model} with {plan.pipeline or 'no passes'}"
        trained = f"{count:,}, of {section.source} with {section.pipeline or 'no passes'}"
        yield Problem("the plan is of a model with other parameters", f"{path}: parameters",
                      trained, planned, _HINT)  # fmt: skip


def _passes(text: str) -> object:
    """Return passes so that equal ones compare equal; those of a user's file stay text."""
    try:
        return tuple(Pipeline.parse(text))
    except MoeccError:
        return text


def plan_remarks(plan: SavedPlan, job: TrainJob) -> list[str]:
    """Return what a plan's figures are of that the run has otherwise, in a sentence.

    None of it makes the mesh of the plan wrong.
    """
    recipe = job.recipe
    tokens = recipe.data.batch * (recipe.data.seq + recipe.data.decoder_seq)
    pairs = (
        ("optimizer", plan.config.optimizer, recipe.optimizer.name),
        ("dtype", plan.config.dtype, recipe.run.dtype),
        ("tokens of a batch", plan.config.batch_tokens, tokens),
    )
    found = [f"{n} {said}, here {has}" for n, said, has in pairs if said not in (None, has)]
    return [f"the plan's time and memory are of other settings: {'; '.join(found)}"] * bool(found)
