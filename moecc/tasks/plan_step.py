"""Plan a step of a model on a machine: what `moecc plan` and ``Model.plan`` call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial

from moecc.errors import Problem, UsageError, nearest
from moecc.ir.graph import Graph
from moecc.plan.batches import make_batch, parse_lengths
from moecc.plan.candidates import Constraints, plan_mesh
from moecc.plan.explore import Known, explore
from moecc.plan.machines import Machine, find_machine
from moecc.plan.report import Report, SummaryReport, plan_json, searched_json
from moecc.plan.search import search
from moecc.plan.strategy import (
    DENSE_WEIGHTS,
    OPTIMIZERS,
    REMATS,
    STEPS,
    StepConfig,
    micro_batch_problems,
    step_config,
)
from moecc.plan.workload import Workload, workload
from moecc.sharding.vias import VIAS
from moecc.train.graphs import planned_graph


@dataclass(frozen=True)
class StepRequest:
    """What is asked of a plan, in the words of the command line; None leaves it to the search.

    Attributes:
      step: ``train`` or ``forward``.
      batch_tokens: of a step, on all devices.
      sequence: its length, or one for each input, separated by commas.
      mesh: ``AXIS=N,…`` in place of the best.
      via: how tokens reach experts on other devices.
      remat: what the backward pass computes again.
      dense_weights: how parameters of no expert are sharded over the experts' axis.
      rules: names of sharding rules, separated by commas.
      optimizer: of a training step.
      dtype: of the computation.
      weight_dtype: of the parameters; None for f32 in training, else that of the computation.
      micro_batches: parts of a batch whose gradients are added.
      reduce_dtype: in which gradients are added and reduced; None for that of the computation.
    """

    step: str = "train"
    batch_tokens: int | None = None
    sequence: str | None = None
    mesh: str | None = None
    via: str | None = None
    remat: str | None = None
    dense_weights: str | None = None
    rules: str | None = None
    optimizer: str = "adamw"
    dtype: str = "bf16"
    weight_dtype: str | None = None
    micro_batches: int = 1
    reduce_dtype: str | None = None

    def problems(self) -> list[Problem]:
        """Return a problem for each value that is not one of its choices."""
        choices: dict[str, Sequence[str]] = {
            "step": STEPS, "optimizer": OPTIMIZERS, "via": VIAS, "remat": REMATS,
            "dense_weights": DENSE_WEIGHTS,
        }  # fmt: skip
        found = [
            Problem(f"unknown {name.replace('_', ' ')}", expected=" | ".join(allowed),
                    found=repr(value), hint=nearest(str(value), allowed))
            for name, allowed in choices.items()
            if (value := getattr(self, name)) is not None and value not in allowed
        ]  # fmt: skip
        return [*found, *micro_batch_problems(self.step == "train", self.micro_batches)]


@dataclass(frozen=True)
class _Parsed:
    """A request whose texts were parsed."""

    machine: Machine
    constraints: Constraints
    lengths: tuple[int, ...] | None
    config: StepConfig


def check_step(machine: str, request: StepRequest) -> None:
    """Check the texts of a request before a model is opened. Raises: UsageError, InputError."""
    _parsed(machine, request)


def plan_step(
    graph: Graph, name: str, machine: str, request: StepRequest, explored: bool = False
) -> Report:
    """Return the plan of a step of `graph`, called `name` in the report, as JSON values.

    With `explored` it has what one would try besides.

    Raises:
      UsageError: the machine or an option cannot be parsed.
      InputError: the model is invalid, or nothing fits.
    """
    return plan_and_search(graph, name, machine, request, explored)[0]


def plan_and_search(
    graph: Graph, name: str, machine: str, request: StepRequest, explored: bool = False
) -> tuple[Report, list[SummaryReport]]:
    """Return the plan of a step, and all strategies that fit. Raises: as `plan_step`."""
    asked = _parsed(machine, request)
    graph = planned_graph(graph, asked.config.train)

    of_batch = cache(partial(workload, graph))

    def work_on(other: Machine, parts: int) -> Workload:
        return of_batch(
            make_batch(graph, other.devices, request.batch_tokens, asked.lengths, parts)
        )

    work = work_on(asked.machine, request.micro_batches)
    ranking = search(work, asked.machine, asked.config, asked.constraints, work_on=work_on)
    known = Known(work, asked.machine, asked.config, ranking, work_on, of_batch)
    ideas = explore(known) if explored else ()
    report = plan_json(name, work, asked.machine, asked.config, ranking, ideas)
    return report, searched_json(ranking, work)


def _parsed(machine: str, request: StepRequest) -> _Parsed:
    if problems := request.problems():
        raise UsageError(problems)
    where = find_machine(machine)
    names = None if request.rules is None else tuple(request.rules.split(","))
    fixed = None if request.mesh is None else plan_mesh(request.mesh, names)
    constraints = Constraints(fixed, request.via, request.remat, request.dense_weights, names)
    lengths = None if request.sequence is None else parse_lengths(request.sequence)
    config = step_config(
        request.step == "train", request.optimizer, request.dtype, request.weight_dtype,
        request.micro_batches, request.reduce_dtype,
    )  # fmt: skip
    return _Parsed(where, constraints, lengths, config)
