"""Golden checkpoints by pipelines that promise equality, and the equal cells of the proof table.

    python -m tests.oracle.matrix [--jobs N] [--sample N] [--work DIR] [--out FILE]

A run is a checkpoint and a pipeline whose promise is ``exact`` or ``reassociation``; both graphs
are proved equal, for all inputs, weights and sizes.  A cell goes end to end: the source's graph
against that which the exported file is read back as, its tensors replaced by their expressions over
the source.  Writes a dated JSON: each run with its verdict and time, and each that is not proved
with its reason.  A run that was stopped goes on with the parts that are missing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from family_configs import MemoryCheckpoint

from moecc.errors import MoeccError
from moecc.ir import Graph, clone
from moecc.rewrite.passes import Context, Preserves, Statistics
from moecc.rewrite.pipeline import Pipeline
from moecc.rewrite.runner import run_pipeline
from moecc.translate.export import Export, export_graph
from moecc.translate.importing import import_checkpoint
from moecc.version import __version__
from moecc.weights.arithmetic import Cast
from moecc.weights.expr import Expr, Source, transform

from ..proof.cells import Cell, cells, opened, with_branch  # noqa: TID252

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
TABLE = ROOT / "docs" / "proofs" / "table.json"
RECORD = ROOT / "docs" / "proofs" / "equal.json"

UP = "upcycle{experts=4 router-std=1}"

ANY_PIPELINES = (
    "canonicalize",
    "canonicalize{exact=true}",
    "cse,dce",
    "fuse-attention",
    "fuse-gate-up",
    "roll-layers",
    "roll-layers{remat=block}",
    "roll-layers,unroll-layers",
    "tie-head",
    "trace-values",
    "record-modes",
    "expand-blocks{every=1}",
    "canonicalize,cse,dce,fuse-gate-up,fuse-attention,roll-layers",
    "annotate-sharding{mesh=data:2 rules=data-parallel},lower-collectives",
    "annotate-sharding{mesh=model:2 rules=tensor-parallel},lower-collectives",
    "annotate-sharding{mesh=model:2 rules=sequence-parallel},lower-collectives",
    "annotate-sharding{mesh=fsdp:2 rules=fsdp},lower-collectives,cse",
    "annotate-sharding{mesh=data:2,model:2 rules=st-moe,zero},lower-collectives",
    "annotate-sharding{mesh=data:2,model:2 rules=tensor-parallel},lower-collectives,strip-sharding",
    "annotate-sharding{mesh=data:2,fsdp:2 rules=data-parallel,fsdp},lower-collectives,roll-layers",
    "annotate-sharding{mesh=data:2,model:2 rules=tensor-parallel,sequence-parallel,zero},"
    "lower-collectives,roll-layers",
)
"""Pipelines of every model."""

DENSE_PIPELINES = (
    "upcycle{experts=4}",
    "upcycle{experts=4 top-k=1 gates=switch router-init=zero}",
    "upcycle{experts=4 top-k=4 router-std=1}",
    "upcycle{experts=4 gates=softmax top-k=4}",
    "upcycle{experts=4 granularity=2 top-k=2 router-std=1}",
    "upcycle{experts=4 granularity=2 top-k=4 router-std=1}",
    "upcycle{experts=4 granularity=4 top-k=4 router-std=1}",
    "upcycle{experts=4 granularity=2 top-k=2 scale-placement=up-down}",
    "upcycle{experts=4 granularity=2 pad=7 router-std=1}",
    "upcycle{experts=4 shared=0.5 router-std=1}",
    "upcycle{experts=4 shared=0.5 shared-gate=none router-std=1}",
    "upcycle{experts=4 gates=sigmoid-renormalised router-std=1}",
    "upcycle{experts=4 gates=sigmoid-renormalised balance-bias=true}",
    "upcycle{experts=4 gates=renormalised gate-scale=2.5}",
    "upcycle{experts=4 gates=sparsemixer router-init=zero}",
    "upcycle{experts=4 routing=prototypes top-k=2 router-std=1}",
    "upcycle{experts=4 routing=hash}",
    "upcycle{experts=4 slots=capacity groups=2 router-std=1},add-losses ; "
    "annotate-sharding{mesh=data:2 rules=data-parallel},lower-collectives",
    "upcycle{experts=4 expert-bias=multiplicative extra-ffn=after}",
    "upcycle{experts=4 expert-bias=additive extra-ffn=before layers=every:2}",
    "st-moe{experts=4 layers=all}",
    f"{UP},add-losses{{importance-coef=0.1 z-coef=0.01}}",
    f"{UP},grow{{times=2}}",
    f"{UP},grow{{times=2 chosen=same}}",
    "upcycle{experts=4 gates=sigmoid-renormalised balance-bias=true},zero-experts{count=2}",
    f"{UP},grow,merge",
    "upcycle{experts=4 granularity=2 top-k=4 router-std=1},to-dense{how=concat}",
    f"{UP},to-dense{{how=first}}",
    f"{UP},weight-rows",
    f"{UP},canonicalize,cse,dce,roll-layers",
    f"{UP},annotate-sharding{{mesh=expert:2 rules=expert-parallel}},lower-collectives",
    f"{UP},annotate-sharding{{mesh=data:2,expert:2 rules=expert-parallel}},"
    "expert-parallel{via=ragged},lower-collectives",
    "upcycle{experts=4 slots=capacity capacity-factor=1 router-std=1},add-losses ; "
    "trace-routing,roll-layers",
    "upcycle{experts=4 slots=capacity groups=8 router-std=1},add-losses ; "
    "annotate-sharding{mesh=data:2,model:2 rules=st-moe},expert-parallel{via=capacity chunks=2},"
    "lower-collectives",
    "upcycle{experts=4 routing=expert-choice capacity-factor=2 groups=4},add-losses ; "
    "annotate-sharding{mesh=data:2,expert:2 rules=expert-parallel},lower-collectives,roll-layers",
)
"""Pipelines of dense models; what stands before a semicolon makes the graph that is compared."""

MIXTURE_PIPELINES = (
    "canonicalize,add-losses",
    "grow{times=2}",
    "grow{times=2 chosen=same}",
    "zero-experts{count=2}",
    "trace-routing",
    "weight-rows",
    "annotate-sharding{mesh=expert:2 rules=expert-parallel},"
    "expert-parallel{via=ring},lower-collectives",
    "annotate-sharding{mesh=expert:2 rules=expert-replicated},lower-collectives",
    "specialize{groups=4},add-losses ; annotate-sharding{mesh=far:2,near:2 "
    "rules=expert-hierarchical},expert-parallel{via=hierarchical},lower-collectives",
    "annotate-sharding{mesh=data:2,model:2 rules=st-moe},expert-parallel{via=ragged slice=model},"
    "lower-collectives,roll-layers",
)
"""Pipelines of mixtures of experts."""

PIPELINES = ANY_PIPELINES + DENSE_PIPELINES + MIXTURE_PIPELINES


UNPROMISED = ("rejected", "approximate", "up to")


@dataclass(frozen=True)
class Row:
    """The outcome of a run or of a cell.

    Attributes:
      verdict: ``proved``, ``refuted``, ``unknown``, ``crashed``; ``rejected`` where a pass or an
        export refuses, ``approximate`` where nothing is promised, ``up to`` where an equality is
        promised up to a bound.
      promise: of the pipeline.
      seconds: of the prover.
      reason: why it is not proved: where the graphs part, and by what.
    """

    verdict: str
    promise: str = ""
    seconds: float = 0.0
    reason: str = ""


@cache
def golden_names() -> tuple[str, ...]:
    """Return the golden checkpoints."""
    return tuple(sorted(p.parent.name for p in GOLDEN.glob("*/config.json")))


@cache
def source_graph(name: str) -> Graph:
    """Return the graph of a golden checkpoint."""
    return import_checkpoint(opened(name))


def has_experts(name: str) -> bool:
    """Return whether a golden checkpoint is a mixture."""
    return any(n.op.assigns_slots for n in source_graph(name).every_node())


def runs() -> Iterator[tuple[str, str]]:
    """Yield checkpoints and the pipelines that are meant for them."""
    for name in golden_names():
        meant = MIXTURE_PIPELINES if has_experts(name) else DENSE_PIPELINES
        for pipeline in ANY_PIPELINES + meant:
            yield name, pipeline


def equal_cells() -> list[Cell]:
    """Return the cells that the proof table says are equal."""
    results = json.loads(TABLE.read_text("utf-8"))["cells"]
    return [c for c in cells() if results[c.source][c.target][c.method][0] == "="]


def with_outputs_of(before: Graph, after: Graph) -> Graph:
    """Return `after` without the outputs that a pass added."""
    same = clone(after)
    for name in [n for n in same.output_names if n not in before.output_names]:
        same.drop_output(name)
    return same


def transformed(name: str, pipeline: str) -> tuple[Graph, Graph, str] | Row:
    """Return the graph before and after a pipeline with its promise, or why there is none."""
    before = clone(source_graph(name))
    context = Context(read=lambda e, *a: _read(name, e), allow_unmatched=False)
    first, _, last = pipeline.rpartition(" ; ")
    try:
        if first:
            run_pipeline(before, Pipeline.parse(first), context=context)
        after = clone(before)
        promise = run_pipeline(after, Pipeline.parse(last), context=context).preserves
    except MoeccError as error:
        return Row("rejected", reason=error.problems[0].message.splitlines()[0])
    return _unpromised(promise) or (before, with_outputs_of(before, after), promise.kind)


def _unpromised(promise: Preserves, up_to: str = "") -> Row | None:
    """Return the row of a promise that is no equality."""
    if promise.kind == "approximate":
        return Row("approximate", promise.kind, reason=promise.reason)
    bound = promise.up_to or up_to
    return Row("up to", promise.kind, reason=bound) if bound else None


def _read(name: str, expr: Expr) -> Any:
    from moecc.weights.evaluate import evaluate

    return evaluate(expr, opened(name).read)


def run_pair(name: str, pipeline: str) -> Row:
    """Prove that a pipeline keeps the function of a golden checkpoint."""
    graphs = transformed(name, pipeline)
    return graphs if isinstance(graphs, Row) else judged(*graphs)


def judged(before: Graph, after: Graph, promise: str) -> Row:
    """Return the verdict of the prover, in real arithmetic."""
    from moecc.prove import prove

    started = time.process_time()
    try:
        verdict = prove(before, after)
    except Exception:  # a crash is a result of the matrix
        last = traceback.format_exc().strip().splitlines()[-1]
        return Row("crashed", promise, time.process_time() - started, last[:300])
    reason = "" if verdict.status == "proved" else reason_of(verdict)
    return Row(verdict.status, promise, time.process_time() - started, reason)


def reason_of(verdict: Any) -> str:
    """Return the node and the terms at which the graphs part, in one line."""
    text = " | ".join([str(verdict.node), *map(str, verdict.terms or ())])
    return " ".join(text.split())[:300]


def run_cell(cell: Cell) -> Row:
    """Prove that a written checkpoint, read back, is the function of its source."""
    graphs = composed(cell)
    return graphs if isinstance(graphs, Row) else judged(*graphs)


def composed(cell: Cell) -> tuple[Graph, Graph, str] | Row:
    """Return the graph of a cell's source, and the graph of its written result over the source."""
    before = source_graph(cell.source)
    graph, checkpoint = clone(before), with_branch(cell.source, cell.method)
    try:
        shapes = {n.partition(":")[2]: info.shape for n, info in checkpoint.tensors.items()}
        statistics = Statistics(("text",), shapes) if "activation" in cell.passes else None
        context = Context(models=tuple(checkpoint.branches), statistics=statistics)
        promise = run_pipeline(graph, Pipeline.parse(cell.passes), context=context).preserves
        export = export_graph(graph, cell.target)
    except MoeccError as error:
        return Row("rejected", reason=error.problems[0].message.splitlines()[0])
    return _unpromised(promise, export.up_to) or (before, read_back(export), promise.kind)


def read_back(export: Export) -> Graph:
    """Return the graph that an export is read as, its tensors replaced by their expressions."""
    tensors = dict(export.tensors)
    arrays = {n: np.zeros(e.type.shape, e.type.dtype.numpy) for n, e in tensors.items()}
    graph = import_checkpoint(MemoryCheckpoint(export.config_json, arrays))

    def over_the_source(part: Expr) -> Expr:
        if not isinstance(part, Source):
            return part
        written = tensors[part.name]
        renamed = _with_names(written, part)
        return renamed if renamed.type == part.type else Cast(renamed, part.type.dtype)

    for param in graph.params.values():
        if param.weight is not None:
            param.weight = transform(param.weight, over_the_source)
    return graph


def _with_names(written: Expr, source: Source) -> Expr:
    """Return a tensor under the names that the target's graph has for its axes."""
    from moecc.weights.movement import Rename

    names = source.type.names
    between = [f"axis{i}_" for i in range(len(names))]
    for old, new in (*zip(written.type.names, between, strict=True),):
        written = Rename(written, old, new)
    for old, new in zip(between, names, strict=True):
        written = Rename(written, old, new)
    return written


def _work(job: tuple[str, ...]) -> tuple[tuple[str, ...], list[Any]]:
    kind, *words = job
    row = run_pair(*words) if kind == "run" else run_cell(cell_named(*words))
    return job, [row.verdict, row.promise, round(row.seconds, 3), row.reason]


@cache
def _cells() -> dict[tuple[str, str, str], Cell]:
    return {(c.source, c.target, c.method): c for c in equal_cells()}


def cell_named(source: str, target: str, method: str) -> Cell:
    """Return the equal cell of a source, a target and a method."""
    return _cells()[source, target, method]


def jobs_of(sample: int | None, seed: int = 0) -> list[tuple[str, ...]]:
    """Return all runs and cells, or a sample of each."""
    pairs = [("run", *r) for r in runs()]
    table = [("cell", c.source, c.target, c.method) for c in equal_cells()]
    if sample is None:
        return [*pairs, *table]
    chance = random.Random(seed)
    return [*chance.sample(pairs, sample), *chance.sample(table, sample)]


def main() -> int:
    """Run the matrix and write its record."""
    parser = argparse.ArgumentParser(prog="python -m tests.oracle.matrix", description=__doc__)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--sample", type=int, help="number of runs and of cells to draw (default: all)"
    )
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "equal")
    parser.add_argument("--out", type=Path, default=RECORD)
    asked = parser.parse_args()
    asked.work.mkdir(parents=True, exist_ok=True)
    log = asked.work / "rows.jsonl"
    rows: dict[tuple[str, ...], list[Any]] = {}
    if log.exists():
        for line in log.read_text("utf-8").splitlines():
            job, row = json.loads(line)
            rows[tuple(job)] = row
    jobs = [j for j in jobs_of(asked.sample) if j not in rows]
    with ProcessPoolExecutor(asked.jobs) as pool, log.open("a", encoding="utf-8") as lines:
        futures = [pool.submit(_work, j) for j in jobs]
        for number, future in enumerate(as_completed(futures), 1):
            job, row = future.result()
            rows[job] = row
            print(json.dumps([job, row]), file=lines, flush=True)
            if number % 200 == 0:
                print(f"{number} of {len(jobs)}", file=sys.stderr)
    record = summary({j: rows[j] for j in jobs_of(asked.sample)})
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", "utf-8")
    print(json.dumps({k: record[k] for k in ("runs", "cells")}))
    return 0


def summary(rows: dict[tuple[str, ...], list[Any]]) -> dict[str, Any]:
    """Return the record: counts, and every row that is not proved with its reason."""
    record: dict[str, Any] = {
        "date": datetime.now(UTC).date().isoformat(),
        "moecc": __version__,
        "python": platform.python_version(),
        "pipelines": len(PIPELINES),
        "checkpoints": len(golden_names()),
        "drawn": len(rows),
        "of": len(jobs_of(None)),
    }
    for kind, key in (("run", "runs"), ("cell", "cells")):
        of_kind = {j: r for j, r in rows.items() if j[0] == kind}
        promised = {j: r for j, r in of_kind.items() if r[0] not in UNPROMISED}
        proved = sum(r[0] == "proved" for r in promised.values())
        seconds = sorted(r[2] for r in promised.values())
        record[key] = {
            "promised": len(promised),
            "proved": proved,
            "share": round(proved / len(promised), 4) if promised else None,
            "verdicts": dict(Counter(r[0] for r in of_kind.values())),
            "median_seconds": seconds[len(seconds) // 2] if seconds else None,
            "largest_seconds": seconds[-1] if seconds else None,
        }
    not_proved = [
        {"what": list(j), "verdict": r[0], "promise": r[1], "reason": r[3]}
        for j, r in sorted(rows.items())
        if r[0] in ("refuted", "unknown", "crashed")
    ]
    record["not_proved"] = not_proved
    record["up_to"] = {" | ".join(j): r[3] for j, r in sorted(rows.items()) if r[0] == "up to"}
    record["rows"] = {
        " | ".join(j): [r[0], r[2]] for j, r in sorted(rows.items()) if r[0] == "proved"
    }
    return record


if __name__ == "__main__":
    raise SystemExit(main())
