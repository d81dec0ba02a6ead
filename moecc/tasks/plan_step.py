"""Plan a step of a model on a machine: what `moecc plan` and ``Model.plan`` call."""

from __future__ import annotations

from functools import cache, partial

from moecc.ir.graph import Graph
from moecc.plan.batches import make_batch
from moecc.plan.explore import Known, explore
from moecc.plan.machines import Machine, find_machine
from moecc.plan.report import Report, SummaryReport, plan_json, searched_json
from moecc.plan.search import search
from moecc.plan.step import StepConfig
from moecc.plan.workload import Workload, workload
from moecc.train.graphs import planned_graph


def check_step(machine: str, config: StepConfig) -> None:
    """Check the settings of a step before a model is opened. Raises: UsageError, InputError."""
    config.check()
    find_machine(machine)


def plan_step(
    graph: Graph, name: str, machine: str, config: StepConfig, explored: bool = False
) -> tuple[Report, list[SummaryReport]]:
    """Return the plan of a step of `graph` as JSON values, and all strategies that fit.

    Args:
      graph: of the model, without any pass of the step.
      name: of the model, in the report.
      machine: by name or file.
      config: the settings of the step.
      explored: whether the report has further ideas with their price.

    Raises:
      UsageError: the machine or a setting cannot be parsed.
      InputError: the model is invalid, or nothing fits.
    """
    check_step(machine, config)
    device, graph = find_machine(machine), planned_graph(graph, config.train)
    of_batch = cache(partial(workload, graph))

    def work_on(target: Machine, parts: int) -> Workload:
        devices = target.devices
        return of_batch(make_batch(graph, devices, config.batch_tokens, config.lengths, parts))

    work = work_on(device, config.micro_batches)
    ranking = search(work, device, config, work_on=work_on)
    known = Known(work, device, config, ranking, work_on, of_batch)
    ideas = explore(known) if explored else ()
    return plan_json(name, work, device, config, ranking, ideas), searched_json(ranking, work)
