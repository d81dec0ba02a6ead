"""The compiling process: reads a request from a folder, and writes its report there."""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from threading import Event, Thread

from moecc.ahead.request import Compiler, Job, Request, Result, update_of
from moecc.analysis import check_trainable, reads_tokens
from moecc.backend import backend_with
from moecc.errors import InputError, MoeccError, UsageError
from moecc.ir.graph import Graph
from moecc.ir.ops.slots import SlotsOp
from moecc.ir.structure import clone
from moecc.launch.processes import hold_lifeline
from moecc.model.open import open_model, registry_with
from moecc.plan.machines import Machine, find_machine
from moecc.plan.report import step_json
from moecc.plan.search import PlanQuery, check_constraints, dispatch_of, search, way_out
from moecc.plan.step import ProgramConfig, Strategy
from moecc.plan.time import Estimate, Estimator
from moecc.plan.workload import Batch, Workload, make_batch, planned_graph, workload
from moecc.rewrite.pipeline import Pipeline
from moecc.rewrite.runner import run_pipeline
from moecc.sharding.layout import Layout
from moecc.sharding.rules import remark_on_groups
from moecc.sharding.vias import BY_NAME, EXPLICIT, GSPMD, LOCAL
from moecc.support.untyped import JsonDict
from moecc.train.graphs import Bound, MeshPasses, StepPasses, run_passes, specialize, weights_rows
from moecc.train.settings import recorded_losses

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
    asked: PlanQuery
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
    config, train = request.config, request.config.train
    config.check()
    _check_exchange(config)
    registry = registry_with(request.load)
    with open_model(request.model, config_alone=True) as model:
        graph = model.graph
    first = Pipeline.parse(request.pipeline, registry)
    run_pipeline(graph, first)
    if train:
        check_trainable(
            graph,
            hint="-p tie-head makes logits by the embedding; --step forward needs none"
            if reads_tokens(graph)
            else "--step forward compiles the forward pass",
        )
    parts = config.micro_batches
    batch = make_batch(graph, machine.devices, config.batch_tokens, config.lengths, parts)
    slots = [SlotsOp.of_node(n) for n in graph if n.op.assigns_slots and not n.op.chooses]
    is_dropless = all(op.slots == "ragged" for op in slots)
    bound = None
    if slots and (not is_dropless or config.capacity_factor or config.partition == GSPMD):
        bound = _bounded(graph, config, slots, is_dropless)
    planned = planned_graph(graph, train)
    work = workload(planned, batch)
    of_batch = cache(partial(workload, planned))

    def work_on(device: Machine, parts: int) -> Workload:
        lengths, tokens = config.lengths, config.batch_tokens
        return of_batch(make_batch(graph, device.devices, tokens, lengths, parts))

    asked = PlanQuery(machine, _fixed(config, work), work, work_on)
    strategy = _in_chunks(config, _strategy(config, asked), work)
    if slots and bound is None and strategy.via == "capacity":
        bound = _bounded(graph, config, slots, is_dropless)
    remarks = []
    if bound and is_dropless and config.capacity_factor is None:
        remarks = [
            "the model keeps every row; it is compiled with a capacity factor of "
            f"{bound.factor}, which may drop some: --capacity-factor sets another, "
            "--via ragged or ring has none"
        ]
    if work.experts and (text := remark_on_groups(strategy.layout.rules, strategy.layout.sizes)):
        remarks.append(text)
    passes = str(_passes(graph, config, bound, strategy))
    pipeline = ",".join(filter(None, (str(first), passes)))
    step = clone(graph)
    run_passes(step, passes)
    update = update_of(config.optimizer, request.sets) if train else None
    job = Job(machine, strategy.layout, _sizes(graph, batch, parts), request, update)
    estimate = Estimator(work, machine, config).estimate(strategy)
    return PreparedJob(step, job, asked, estimate, bound, pipeline, tuple(remarks))


def _check_exchange(config: ProgramConfig) -> None:
    """Raise UsageError if XLA's partitioner does not support the requested exchange."""
    if config.partition != GSPMD or (config.via in (None, "capacity") and not config.sliced):
        return
    raise UsageError(
        "the partitioner of XLA exchanges whole slots under a capacity",
        expected="via capacity",
        found=f"via {config.via or 'capacity'}{' in slices' if config.sliced else ''}",
        hint=f"--partition {EXPLICIT} has every way",
    )


def _bounded(graph: Graph, config: ProgramConfig, slots: list[SlotsOp], is_dropless: bool) -> Bound:
    """Bound the rows of experts by the factor of the settings, of the model, or the default."""
    mode, stated = "train" if config.train else "eval", graph.stated_config
    factor = (
        config.capacity_factor
        or stated.get(f"{mode}_capacity_factor")
        or _stated(slots)
        or CAPACITY_FACTOR
    )
    # A model without a capacity has no convention for it either.
    bound = Bound(float(factor), "assignments" if is_dropless else slots[0].convention)
    run_passes(graph, specialize(mode, bound, None))
    return bound


def _stated(places: list[SlotsOp]) -> float | None:
    stated = {p.capacity_factor for p in places if p.slots == "capacity"}
    return float(stated.pop()) if len(stated) == 1 else None


def _losses(graph: Graph, parts: int) -> dict[str, object] | None:
    """Return the options with which losses are added to a graph; None where it has them.

    Those of one of several micro-batches are added anew, by the options that the graph records.
    """
    options = recorded_losses(graph)
    if options is None:
        return {"metrics": False} | ({"parts": parts} if parts > 1 else {})
    return None if parts == 1 else options | {"parts": parts, "replace": True}


def _passes(
    graph: Graph, config: ProgramConfig, bound: Bound | None, strategy: Strategy
) -> StepPasses:
    """Return the passes from the model's graph to the one that is compiled."""
    layout, is_explicit, train = strategy.layout, config.partition == EXPLICIT, config.train
    return StepPasses(
        "train" if train else "eval",
        routed=bool(layout.experts),
        bound=bound,
        groups=layout.shards["batch"] * strategy.chunks,
        losses=_losses(graph, config.micro_batches) if train and layout.experts else None,
        weighted=train and weights_rows(strategy.remat, layout.mesh.devices > 1),
        mesh=MeshPasses(
            str(layout.mesh), layout.names, strategy.via, strategy.sliced, strategy.chunks
        )
        if is_explicit
        else None,
        remat=strategy.remat,
        split=strategy.stream_axis if is_explicit and train else None,
    )


def _fixed(config: ProgramConfig, work: Workload) -> ProgramConfig:
    """Return `config` with the defaults of a mesh that it names, or of XLA's partitioner."""
    if config.mesh is None:
        # The partitioner exchanges slots under a capacity alone.
        is_explicit = config.partition == EXPLICIT or not work.experts
        return config if is_explicit else replace(config, via="capacity")
    dense = None if config.rules else config.dense_weights or "whole"
    return replace(config, remat=config.remat or "full", dense_weights=dense)


def _strategy(config: ProgramConfig, asked: PlanQuery) -> Strategy:
    """Return the strategy that the settings fix, or the plan's best if the mesh is open."""
    work, mesh = asked.work, config.device_mesh
    if mesh is None:
        return search(work, asked.machine, asked.config, asked.work_on).best.strategy
    check_constraints(work, asked.machine, config)
    if config.sliced and not work.experts:
        raise InputError("the model has no experts whose rows would be sent in slices")
    dense, replicated = config.dense_weights or "whole", config.via == "replicated"
    if config.layout_names is None:
        layout = Layout(mesh, work.experts, dense, replicated)
    else:
        layout = Layout.ruled(mesh, work.experts, config.layout_names)
    via = config.via or ("capacity" if layout.shards["expert"] > 1 else LOCAL)
    remat = config.remat or ("full" if config.train else "none")
    return Strategy(layout, via, dispatch_of(via, work), remat, config.sliced)


def _in_chunks(config: ProgramConfig, strategy: Strategy, work: Workload) -> Strategy:
    """Return a strategy whose rows are exchanged in the chunks that are asked for.

    Raises:
      InputError: no slots are exchanged, or a device has no token group for each chunk.
    """
    if config.chunks == 1:
        return strategy
    way = BY_NAME.get(strategy.via)
    if way is None or not way.is_chunked or config.partition != EXPLICIT:
        raise InputError(
            "slots that the graph's own collectives exchange are cut in chunks",
            where="--chunks", expected="--via capacity", found=f"via {strategy.via}",
        )  # fmt: skip
    each = work.batch.sequences // strategy.layout.shards["batch"]
    if each % config.chunks:
        raise InputError(
            "a device needs token groups for each chunk", where="--chunks",
            expected=f"a divisor of {each}, the sequences of a device", found=str(config.chunks),
        )  # fmt: skip
    return replace(strategy, chunks=config.chunks)


def _sizes(graph: Graph, part: Batch, parts: int) -> dict[str, int]:
    batch = replace(part, sequences=part.sequences * parts)
    names = {a.size for v in graph.inputs.values() for a in v.type if isinstance(a.size, str)}
    return {name: batch.size(name) for name in names}


# Return memory that a compiler has freed to the system while it runs.
#
# glibc keeps freed memory, separately for each thread.  A compiler of many passes frees most of
# what it allocates, and its peak is lower if freed memory is returned.

_SECONDS = 1.0


@contextmanager
def trimmed() -> Iterator[None]:
    """Trim the heap every second, in a thread, if the C library supports it."""
    trim = _trim() if sys.platform == "linux" else None
    if trim is None:
        yield
        return
    done = Event()

    def run() -> None:
        while not done.wait(_SECONDS):
            trim(0)

    thread = Thread(target=run, name="trim", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _trim() -> ctypes._NamedFuncPointer | None:
    # Another C library, such as musl, has no such function.
    return getattr(ctypes.CDLL(None), "malloc_trim", None)


REQUEST, ANSWER, PROGRAM, ARTEFACT = "request.json", "answer.json", "program.txt", "artefact.bin"
"""The files in the folder between the two processes."""


def main(folder: Path) -> None:
    """Run the request in `folder`."""
    hold_lifeline()
    request = Request.from_json(json.loads((folder / REQUEST).read_text("utf-8")))
    try:
        prepared = prepare(request)
        compiler = backend_with(Compiler)
        with trimmed():
            result = compiler.compile_ahead(prepared.graph, prepared.job)
        if result.program:
            (folder / PROGRAM).write_text(result.program, "utf-8")
        if result.artefact:
            (folder / ARTEFACT).write_bytes(result.artefact)
        answer: object = report(prepared, result)
    except MoeccError as error:
        problems = [asdict(problem) for problem in error.problems]
        answer = {"error": type(error).__name__, "exit_code": error.exit_code, "problems": problems}
    (folder / ANSWER).write_text(json.dumps(answer), "utf-8")


def report(prepared: PreparedJob, result: Result) -> JsonDict:
    """Return the report of `moecc compile` as JSON values."""
    job, estimate, work = prepared.job, prepared.estimate, prepared.asked.work
    request = job.request
    config = request.config
    usable = result.available_bytes or job.machine.usable_bytes
    memory = estimate.memory
    return {
        "model": request.model,
        "machine": {
            "name": job.machine.name,
            "devices": job.machine.devices,
            "usable_bytes": usable,
        },
        **step_json(work, config),
        "mesh": dict(job.layout.sizes),
        "dense_weights": job.layout.dense_weights,
        "remat": estimate.strategy.remat,
        "partition": config.partition,
        "via": estimate.strategy.via if work.experts else None,
        "sliced": estimate.strategy.sliced,
        "pipeline": prepared.pipeline,
        "quick": request.quick,
        "capacity": None
        if prepared.bound is None
        else {"factor": prepared.bound.factor, "convention": prepared.bound.convention},
        "remarks": [*prepared.remarks, *result.remarks],
        "seconds": {"lower": result.lower_seconds, "compile": result.compile_seconds},
        "host_peak_bytes": result.host_peak_bytes,
        "memory": None if result.memory is None else dict(result.memory),
        "needed_bytes": result.needed_bytes,
        "fits": result.needed_bytes <= usable,
        "would_fit": None
        if result.needed_bytes <= usable
        else would_fit_text(prepared, usable, result.needed_bytes),
        "flops": result.flops,
        "model_flops": estimate.model_flops / job.machine.devices,
        "collectives": {kind: dict(total) for kind, total in result.collectives.items()},
        "overlap": {kind: dict(total) for kind, total in result.overlap.items()},
        "unknown_loops": result.unknown_loops,
        "opaque": dict(result.opaque),
        "corrected": corrected_json(estimate, result),
        "predicted": {
            "arguments_bytes": memory.arguments,
            "outputs_bytes": memory.state if config.train else None,
            "temporaries_bytes": memory.heap,
            "needed_bytes": memory.total,
            "fits": estimate.fits,
            "flops": estimate.flops,
            "seconds": estimate.seconds,
            "mfu": estimate.mfu,
            "collectives": {
                op.replace("_", "-"): {"count": c["count"], "bytes": c["tensor_bytes"]}
                for op, c in estimate.collectives.items()
            },
            "overlap": {op.replace("_", "-"): row for op, row in estimate.overlap.items()},
        },
    }


def corrected_json(estimate: Estimate, result: Result) -> JsonDict:
    """Return the time of a step whose exposed bytes are those of the compiled program.

    A byte takes as long as one of the plan's exposed bytes, whatever its kind: compilers write one
    kind of collective as another.
    """
    local, seconds = estimate.by_kind["local"], estimate.seconds
    planned, compiled = (
        sum(row["exposed_bytes"] for row in kinds.values())
        for kinds in (estimate.overlap, result.overlap)
    )
    corrected = local + (seconds - local) * compiled / planned if planned else seconds
    return {"seconds": corrected, "mfu": estimate.mfu * seconds / corrected}


def would_fit_text(prepared: PreparedJob, usable: int, needed: int) -> str:
    """Return what would fit by the plan, as far as it is off here held to be off there."""
    share = usable / prepared.asked.machine.usable_bytes
    planned = prepared.estimate.memory.total
    return way_out(replace(prepared.asked, share=share * min(1.0, planned / needed)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
