"""Prepare a job from a request: the graph of a step, its layout, and the plan's prediction."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, partial

from moecc.ahead.request import Job, Request, update_of
from moecc.analysis import check_trainable, reads_tokens
from moecc.errors import InputError, UsageError
from moecc.ir.attributes import SlotAttrs
from moecc.ir.graph import Graph
from moecc.ir.structure import clone
from moecc.model.open import open_model, registry_with
from moecc.pipeline.runner import run_pipeline
from moecc.pipeline.text import Pipeline
from moecc.plan.batches import Batch, make_batch
from moecc.plan.candidates import Constraints, check_constraints, plan_mesh
from moecc.plan.machines import Machine, find_machine
from moecc.plan.search import Asked, search
from moecc.plan.strategy import StepConfig, Strategy, step_config
from moecc.plan.time import Estimate, Estimator
from moecc.plan.workload import Workload, workload
from moecc.sharding.layout import Layout
from moecc.sharding.vias import BY_NAME, EXPLICIT, GSPMD, LOCAL
from moecc.train.graphs import (
    Bound,
    MeshPasses,
    StepPasses,
    planned_graph,
    run_passes,
    specialize,
    weights_rows,
)
from moecc.train.settings import LOSSES

CAPACITY_FACTOR = 1.25
"""What bounds the rows of an expert where the model says nothing: ST-MoE's in training (§2.2)."""


@dataclass(frozen=True)
class PreparedJob:
    """A job, with the plan's prediction.

    Attributes:
      graph: the graph to compile.
      job: how it is compiled.
      asked: what a plan was asked, and its workload.
      estimate: the plan's prediction.
      bound: the bound on an expert's rows; None if there is none.
      pipeline: the passes that produced the graph from the model's, the user's own first.
      remarks: choices made on the user's behalf.
    """

    graph: Graph
    job: Job
    asked: Asked
    estimate: Estimate
    bound: Bound | None
    pipeline: str
    remarks: tuple[str, ...]


def prepare(request: Request) -> PreparedJob:
    """Return the job for `request`.

    Raises:
      UsageError: a machine, mesh or type is unknown; the partitioner lacks the exchange.
      InputError: the model cannot be read, the mesh is invalid for it, or nothing fits.
    """
    machine = find_machine(request.machine)
    train = request.step == "train"
    setting = step_config(
        train, request.optimizer, request.dtype, request.weight_dtype, request.micro_batches,
        request.reduce_dtype,
    )  # fmt: skip
    _check_exchange(request)
    registry = registry_with(request.load)
    with open_model(request.model, config_alone=True) as model:
        graph = model.graph
    first = Pipeline.parse(request.pipeline, registry)
    run_pipeline(graph, first)
    if train:
        _check_logits(graph)
    parts = request.micro_batches
    batch = make_batch(graph, machine.devices, request.batch_tokens, request.lengths, parts)
    bound, remarks = _bounded(graph, request, train)
    planned = planned_graph(graph, train)
    work = workload(planned, batch)
    of_batch = cache(partial(workload, planned))

    def work_on(other: Machine, parts: int) -> Workload:
        lengths, tokens = request.lengths, request.batch_tokens
        return of_batch(make_batch(graph, other.devices, tokens, lengths, parts))

    asked = Asked(machine, setting, _constraints(request, work), work, work_on)
    strategy = _in_chunks(request, _strategy(request, asked), work)
    passes = str(_passes(graph, request.partition, setting, bound, strategy))
    pipeline = ",".join(filter(None, (str(first), passes)))
    step = clone(graph)
    run_passes(step, passes)
    job = Job(
        machine, strategy.layout, _sizes(graph, batch, parts), setting, request.emit,
        request.export, request.partition,
        update_of(request.optimizer, request.sets) if train else None, request.overlap,
        request.quick,
    )  # fmt: skip
    estimate = Estimator(work, machine, setting).estimate(strategy)
    return PreparedJob(step, job, asked, estimate, bound, pipeline, tuple(remarks))


def _check_logits(graph: Graph) -> None:
    """Raise InputError if the graph has no logits, of which a training step takes the loss."""
    check_trainable(
        graph,
        hint="-p tie-head makes logits by the embedding; --step forward needs none"
        if reads_tokens(graph)
        else "--step forward compiles the forward pass",
    )


def _check_exchange(request: Request) -> None:
    """Raise UsageError if XLA's partitioner does not support the requested exchange."""
    if request.partition != GSPMD or (request.via in (None, "capacity") and not request.sliced):
        return
    raise UsageError(
        "the partitioner of XLA exchanges whole slots under a capacity",
        expected="via capacity",
        found=f"via {request.via or 'capacity'}{' in slices' if request.sliced else ''}",
        hint=f"--partition {EXPLICIT} has every way",
    )


def _bounded(graph: Graph, request: Request, train: bool) -> tuple[Bound | None, list[str]]:
    """Bound the rows of experts by a capacity; return the bound, and remarks on it.

    A dropless model stays dropless unless the way to the experts is ``capacity``.
    """
    places = [
        SlotAttrs.of_node(node) for node in graph if node.op.assigns_slots and not node.op.chooses
    ]
    is_dropless = all(p.slots == "ragged" for p in places)
    keeps = request.via not in (None, "capacity") and request.capacity_factor is None
    if not places or (is_dropless and keeps):
        return None, []
    config = graph.attrs.get("config") or {}
    own = config.get("train_capacity_factor" if train else "eval_capacity_factor")
    factor = request.capacity_factor or own or _stated(places) or CAPACITY_FACTOR
    # A model without a capacity has no convention for it either.
    bound = Bound(float(factor), "assignments" if is_dropless else places[0].convention)
    run_passes(graph, specialize("train" if train else "eval", bound, None))
    if request.capacity_factor is None and is_dropless:
        return bound, [
            f"the model keeps every row; it is compiled with a capacity factor of {factor}, "
            "which may drop some: --capacity-factor sets another, --via ragged or ring has none"
        ]
    return bound, []


def _stated(places: list[SlotAttrs]) -> float | None:
    stated = {p.capacity_factor for p in places if p.slots == "capacity"}
    return float(stated.pop()) if len(stated) == 1 else None


def _losses(graph: Graph, parts: int) -> dict[str, object] | None:
    """Return the options with which losses are added to a graph; None where it has them.

    Those of one of several micro-batches are added anew, by the options that the graph records.
    """
    own = graph.attrs.get(LOSSES)
    if not isinstance(own, dict):
        return {"metrics": False} | ({"parts": parts} if parts > 1 else {})
    if parts == 1:
        return None
    given = {name.replace("_", "-"): value for name, value in own.items() if value is not None}
    return given | {"parts": parts, "replace": True}


def _passes(
    graph: Graph, partition: str, setting: StepConfig, bound: Bound | None, strategy: Strategy
) -> StepPasses:
    """Return the passes from the model's graph to the one that is compiled."""
    layout, is_explicit, train = strategy.layout, partition == EXPLICIT, setting.train
    return StepPasses(
        "train" if train else "eval",
        routed=bool(layout.experts),
        bound=bound,
        groups=layout.shards["batch"] * strategy.chunks,
        losses=_losses(graph, setting.micro_batches) if train and layout.experts else None,
        weighted=train and weights_rows(strategy.remat, layout.mesh.devices > 1),
        mesh=MeshPasses(
            str(layout.mesh), layout.names, strategy.via, strategy.sliced, strategy.chunks
        )
        if is_explicit
        else None,
        remat=strategy.remat,
        split=strategy.stream_axis if is_explicit and train else None,
    )


def _constraints(request: Request, work: Workload) -> Constraints:
    """Return what the request fixes; on a mesh that it names, with what is taken by default."""
    rules, dense, remat = request.rules, request.dense_weights, request.remat
    if request.mesh is None:
        return Constraints(None, _via(request, work), remat, dense, rules)
    dense = None if rules else dense or "whole"
    return Constraints(plan_mesh(request.mesh, rules), request.via, remat or "full", dense, rules)


def _strategy(request: Request, asked: Asked) -> Strategy:
    """Return the strategy that the request fixes, or the plan's best if the mesh is open."""
    work, machine, setting, rules = asked.work, asked.machine, asked.config, request.rules
    fixed, mesh = asked.constraints, asked.constraints.mesh
    if mesh is None:
        found = search(work, machine, setting, fixed, work_on=asked.work_on)
        return found.best.strategy
    check_constraints(work, machine, Constraints(mesh, request.via, rules=rules))
    if request.sliced and not work.experts:
        raise InputError("the model has no experts whose rows would be sent in slices")
    dense, replicated = request.dense_weights or "whole", request.via == "replicated"
    if rules is None:
        layout = Layout(mesh, work.experts, dense, replicated)
    else:
        layout = Layout.ruled(mesh, work.experts, rules)
    via = request.via or ("capacity" if layout.shards["expert"] > 1 else LOCAL)
    remat = request.remat or ("full" if setting.train else "none")
    dispatch = "grouped" if work.dropless else "index"
    return Strategy(layout, via, dispatch, remat, request.sliced)


def _in_chunks(request: Request, strategy: Strategy, work: Workload) -> Strategy:
    """Return a strategy whose rows are exchanged in the chunks that are asked for.

    Raises:
      InputError: no slots are exchanged, or a device has no token group for each chunk.
    """
    if request.chunks == 1:
        return strategy
    way = BY_NAME.get(strategy.via)
    if way is None or not way.is_chunked or request.partition != EXPLICIT:
        raise InputError(
            "slots that the graph's own collectives exchange are cut in chunks",
            where="--chunks", expected="--via capacity", found=f"via {strategy.via}",
        )  # fmt: skip
    each = work.batch.sequences // strategy.layout.shards["batch"]
    if each % request.chunks:
        raise InputError(
            "a device needs token groups for each chunk", where="--chunks",
            expected=f"a divisor of {each}, the sequences of a device", found=str(request.chunks),
        )  # fmt: skip
    return replace(strategy, chunks=request.chunks)


def _via(request: Request, work: Workload) -> str | None:
    """Return the requested way to the experts; None leaves it to the plan."""
    if request.partition == EXPLICIT or not work.experts:
        return request.via
    return "capacity"


def _sizes(graph: Graph, part: Batch, parts: int) -> dict[str, int]:
    batch = replace(part, sequences=part.sequences * parts)
    names = {a.size for v in graph.inputs.values() for a in v.type if isinstance(a.size, str)}
    return {name: batch.size(name) for name in names}
