"""A job of `moecc compile`, done with XLA."""

from __future__ import annotations

import time
from importlib.util import find_spec

from moecc.ahead.request import Job, Result
from moecc.errors import MachineError
from moecc.ir.graph import Graph
from moecc.sharding.partitions import GSPMD
from moecc.steps.spec import StepSpec
from moecc.support.extras import install_hint
from moecc_backends.xla.aot.census import census
from moecc_backends.xla.aot.overlap_options import overlap_options
from moecc_backends.xla.aot.program import (
    Compiled,
    DoesNotFit,
    compile_lowered,
    host_peak_bytes,
    lower,
)
from moecc_backends.xla.aot.topology import devices
from moecc_backends.xla.run.precision import in_precision
from moecc_backends.xla.train.abstract_step import AbstractStep, make_step

LEAST_EFFORT = {"exec_time_optimization_effort": -1.0}
"""What XLA may spend on the speed of a program, from -1 to 1; its default is 0."""


def compile_ahead(graph: Graph, job: Job) -> Result:
    """Compile a step of `graph`, or lower it alone where only StableHLO is wanted.

    Raises:
      MachineError: an extra is missing.
      UsageError: libtpu refuses the topology.
      InputError: the mesh does not suit the graph.
    """
    if job.export and find_spec("flatbuffers") is None:
        raise MachineError("exporting needs flatbuffers", hint=install_hint("export"))
    given = job.config
    with in_precision(given.dtype, given.weight_dtype, given.reduce_dtype):
        return _compiled(graph, job)


def _compiled(graph: Graph, job: Job) -> Result:
    layout = job.layout if job.partition == GSPMD else None
    given = job.config
    spec = StepSpec(
        job.sizes, given.dtype, job.update, given.micro_batches, given.weight_dtype,
        given.reduce_dtype, platform=job.machine.kind, layout=layout,
    )  # fmt: skip
    step = make_step(graph, spec, devices(job.machine))
    start = time.perf_counter()
    lowered = lower(step.function, step.arguments, job.machine)
    seconds = time.perf_counter() - start
    program = lowered.as_text() if job.emit == "stablehlo" else ""
    artefact = _exported(step, job) if job.export else b""
    try:
        compiled = compile_lowered(lowered, seconds, job.machine, options_of(job))
    except DoesNotFit as error:
        took = time.perf_counter() - start - seconds
        return Result(
            seconds, took, host_peak_bytes(), None, error.needed_bytes, error.available_bytes,
            program=program, artefact=artefact,
        )  # fmt: skip
    return _result(compiled, program if job.emit != "hlo" else compiled.hlo, artefact)


def options_of(job: Job) -> dict[str, str | float]:
    """Return the options of XLA with which a job is compiled."""
    overlapping = overlap_options(job.machine) if job.overlap else {}
    return {**overlapping, **(LEAST_EFFORT if job.quick else {})}


def _result(compiled: Compiled, program: str, artefact: bytes) -> Result:
    found = census(compiled.hlo)
    return Result(
        lower_seconds=compiled.lowered_seconds,
        compile_seconds=compiled.compiled_seconds,
        host_peak_bytes=compiled.host_peak_bytes,
        memory=compiled.memory.to_json(),
        needed_bytes=compiled.memory.peak,
        flops=found.flops,
        collectives=found.by_kind(),
        overlap=found.overlap(),
        unknown_loops=found.unknown_loops,
        opaque=found.opaque,
        program=program,
        artefact=artefact,
    )


def _exported(step: AbstractStep, job: Job) -> bytes:
    from jax import export

    platform = {"gpu": "cuda"}.get(job.machine.kind, job.machine.kind)
    made = export.export(step.function, platforms=[platform])(*step.arguments)
    return bytes(made.serialize())
