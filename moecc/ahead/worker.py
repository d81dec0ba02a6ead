"""The compiling process: reads a request from a folder, and writes its report there."""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from threading import Event, Thread
from typing import cast

from moecc.ahead.prepare import PreparedJob, prepare
from moecc.ahead.request import Compiler, Request, Result
from moecc.backend import get_backend
from moecc.errors import MoeccError
from moecc.launch.processes import hold_lifeline
from moecc.plan.overlap import overlap
from moecc.plan.report import batch_json
from moecc.plan.search import way_out
from moecc.support.untyped import JsonDict

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
        compiler = cast(Compiler, get_backend("xla"))
        with trimmed():
            result = compiler.compile_ahead(prepared.graph, prepared.job)
        if result.program:
            (folder / PROGRAM).write_text(result.program, "utf-8")
        if result.artefact:
            (folder / ARTEFACT).write_bytes(result.artefact)
        answer: object = report(request, prepared, result)
    except MoeccError as error:
        problems = [asdict(problem) for problem in error.problems]
        answer = {"error": type(error).__name__, "exit_code": error.exit_code, "problems": problems}
    (folder / ANSWER).write_text(json.dumps(answer), "utf-8")


def report(request: Request, prepared: PreparedJob, result: Result) -> JsonDict:
    """Return the report of `moecc compile` as JSON values."""
    job, estimate, work = prepared.job, prepared.estimate, prepared.asked.work
    config = job.config
    usable = result.available_bytes or job.machine.usable_bytes
    memory = estimate.memory
    return {
        "model": request.model,
        "machine": {
            "name": job.machine.name,
            "devices": job.machine.devices,
            "usable_bytes": usable,
        },
        "step": config.step,
        "optimizer": config.optimizer if config.train else None,
        "dtype": config.compute_type.name,
        "weight_dtype": config.weight_type.name,
        "reduce_dtype": config.reduce_type.name if config.train else None,
        "batch": batch_json(work.batch, config),
        "parameters": work.parameters,
        "mesh": dict(job.layout.sizes),
        "dense_weights": job.layout.dense_weights,
        "remat": estimate.strategy.remat,
        "partition": config.partition,
        "via": estimate.strategy.via if work.experts else None,
        "sliced": estimate.strategy.sliced,
        "pipeline": prepared.pipeline,
        "quick": job.quick,
        "capacity": None
        if prepared.bound is None
        else {"factor": prepared.bound.factor, "convention": prepared.bound.convention},
        "remarks": list(prepared.remarks),
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
            "overlap": {
                op.replace("_", "-"): o for op, o in overlap(estimate, job.overlap).items()
            },
        },
    }


def would_fit_text(prepared: PreparedJob, usable: int, needed: int) -> str:
    """Return what would fit by the plan, as far as it is off here held to be off there."""
    share = usable / prepared.asked.machine.usable_bytes
    planned = prepared.estimate.memory.total
    return way_out(replace(prepared.asked, share=share * min(1.0, planned / needed)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
