"""``moecc compile``: compile a step of a model for hardware that need not be attached."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from ctypes.util import find_library
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import IO, Annotated, Literal

from moecc import errors
from moecc.ahead.request import CompilerFailed, Request, update_of
from moecc.ahead.worker import ANSWER, ARTEFACT, PROGRAM, REQUEST, prepare
from moecc.errors import MachineError, MoeccError, Problem, UsageError
from moecc.jobs.command import (
    AnyModelName,
    Force,
    Load,
    OptionalMachine,
    OutputFile,
    PipelineText,
    Report,
    SavedPlanFile,
    Spelling,
    check_writable,
    read_pipeline,
    write_whole,
)
from moecc.launch.processes import LIFELINE
from moecc.plan.machines import Machine, find_machine
from moecc.plan.report import batch_text, step_text
from moecc.plan.search import search, seconds_text
from moecc.plan.step import ProgramConfig, StepConfig, mesh_text, option_name, read_plan
from moecc.plan.time import Estimator
from moecc.support.console import say
from moecc.support.extras import require
from moecc.support.process import signals_raised
from moecc.support.text import amount, count_text, size_text
from moecc.support.untyped import JsonDict

# Compile in a subprocess, which is ended when its time limit is exceeded.

# The allocator of a process that compiles: jemalloc, where the machine has it.
#
# A compiler makes and frees many small objects, and a sixth of the time of libtpu goes to glibc's
# ``malloc`` and ``free`` (docs/compiling.md).

PRELOAD = "LD_PRELOAD"

_RETURNED = "dirty_decay_ms:1000,muzzy_decay_ms:0"
"""Freed memory goes back to the system after a second."""


def allocator_environment() -> dict[str, str]:
    """Return the variables under which a process allocates with jemalloc.

    Without jemalloc there are none, and where something else is preloaded it stays.
    """
    library = None if PRELOAD in os.environ else _jemalloc()
    if library is None:
        return {}
    return {PRELOAD: library, "MALLOC_CONF": os.environ.get("MALLOC_CONF", _RETURNED)}


@cache
def _jemalloc() -> str | None:
    """Return the name of the library, if the linker knows it."""
    return find_library("jemalloc") if sys.platform == "linux" else None


ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "JAX_TRACEBACK_IN_LOCATIONS_LIMIT": "0",
    "MALLOC_ARENA_MAX": "2",
}
"""Variables that keep jax from looking for accelerators, libtpu from asking a cloud about itself,
and the compiler small: no tracebacks in the program, and threads that share free memory."""

_TAIL = 3000


@dataclass(frozen=True)
class CompileOutcome:
    """The outcome of a compilation.

    Attributes:
      data: the report, as JSON values.
      program: the emitted program, if requested.
      artefact: the exported artefact, if requested.
    """

    data: JsonDict
    program: str = ""
    artefact: bytes = b""


def environment(machine: Machine) -> dict[str, str]:
    """Return the environment in which jax can compile for `machine`."""
    variables = {**os.environ, **ENVIRONMENT, **allocator_environment()}
    if machine.kind == "cpu":
        flag = f"--xla_force_host_platform_device_count={machine.devices}"
        variables["XLA_FLAGS"] = f"{variables.get('XLA_FLAGS', '')} {flag}".strip()
    return variables


def compile_in_subprocess(
    request: Request, time_limit_seconds: float | None = None
) -> CompileOutcome:
    """Run the compilation `request` in another process.

    Raises:
      MachineError: the time limit is exceeded, an extra is missing, or the process was killed.
      InputError, UsageError: as `moecc.ahead.worker.prepare` and the backend.
    """
    machine = find_machine(request.machine)
    with tempfile.TemporaryDirectory(prefix="moecc-compile-") as name:
        folder = Path(name)
        (folder / REQUEST).write_text(json.dumps(request.to_json()), "utf-8")
        with (folder / "log").open("wb") as log, _worker(folder, machine, log) as process:
            try:
                process.wait(time_limit_seconds)
            except subprocess.TimeoutExpired:
                raise MachineError(
                    f"compiling took longer than {time_limit_seconds:g} seconds",
                    where=f"{request.model} for {request.machine}",
                    hint="--time-limit allows more",
                ) from None
        return _read(folder, process.returncode)


@contextmanager
def _worker(folder: Path, machine: Machine, log: IO[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """Run the worker; it never outlives this context."""
    command = [sys.executable, "-m", "moecc.ahead.worker", str(folder)]
    held, writing = os.pipe()
    process = subprocess.Popen(
        command, stdout=log, stderr=log, start_new_session=True, pass_fds=(held,),
        env=environment(machine) | {LIFELINE: str(held)},
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        os.close(held)
        os.close(writing)


def _read(folder: Path, code: int) -> CompileOutcome:
    answer = folder / ANSWER
    if not answer.exists():
        log = (folder / "log").read_text("utf-8", "replace")[-_TAIL:]
        if code == -signal.SIGKILL or "std::bad_alloc" in log or "MemoryError" in log:
            raise MachineError(
                "the compiler was killed, most likely because this machine has too little memory"
            )
        if code < 0:
            raise CompilerFailed(
                f"the compiler crashed ({signal.Signals(-code).name})", found=_last_words(log)
            )
        raise RuntimeError(f"the process that compiles ended with {code}:\n{log}")
    data = json.loads(answer.read_text("utf-8"))
    if "error" in data:
        raise _error(data)
    program, artefact = folder / PROGRAM, folder / ARTEFACT
    return CompileOutcome(
        data,
        program.read_text("utf-8") if program.exists() else "",
        artefact.read_bytes() if artefact.exists() else b"",
    )


_FATAL = re.compile(r"^F\d{4} [\d:.]+ +\d+ (\S+\] .*?)\s*$", re.MULTILINE)
"""The line of a failed check, as C++ programs of Google log it."""


def _last_words(log: str) -> str:
    """Return what a compiler says of its crash: its failed check, or the last line."""
    match = _FATAL.search(log)
    return match[1] if match else next(iter(log.strip().splitlines()[-1:]), "nothing")


MOST_TRIED = 3
"""How many other plans are compiled where the compiler fails."""


def nearest_that_compiles(request: Request, time_limit_seconds: float) -> str:
    """Return the options of the nearest plan that compiles, or that none of those tried does.

    The same mesh with another rematerialisation is nearest, then plans in the order of their time.
    """
    prepared = prepare(request)
    failed, asked = prepared.estimate, prepared.asked
    free = replace(request.config, mesh=None, remat=None, via=None, dense_weights=None, rules=None)
    estimator = Estimator(asked.work, asked.machine, free)
    again = (
        estimator.estimate(replace(failed.strategy, remat=remat))
        for remat in (asked.work.remats if free.train else ())
        if remat != failed.strategy.remat
    )
    ranking = search(asked.work, asked.machine, free, asked.work_on)
    nearest = [
        *sorted((each for each in again if each.fits), key=lambda each: each.seconds),
        *(each for each in ranking.searched if each.strategy != failed.strategy),
    ]
    for estimate in nearest[:MOST_TRIED]:
        options = estimate.strategy.options
        say(f"note: the compiler failed; trying {options}")
        config = replace(free, **estimate.strategy.settings)
        try:
            tried = compile_in_subprocess(replace(request, config=config), time_limit_seconds).data
        except MachineError:
            continue
        if tried["fits"]:
            slower = estimate.seconds / failed.seconds - 1
            return f"{options} compiles; by the plan it takes {slower:+.0%}"
    return f"nor do the {len(nearest[:MOST_TRIED])} nearest plans compile: another --mesh may"


def _error(data: JsonDict) -> MoeccError:
    """Return the error that the worker reported, as its own class or the nearest base."""
    if data["error"] == CompilerFailed.__name__:
        return CompilerFailed([Problem(**problem) for problem in data["problems"]])
    kinds = (errors.InputError, errors.UsageError, errors.CheckError, errors.MachineError)
    kind = next(k for k in kinds if k.exit_code == data["exit_code"])
    return kind([Problem(**problem) for problem in data["problems"]])


# The human-readable report of a compilation, with the plan's prediction beside each figure.


def compile_text(data: JsonDict) -> str:
    """Return a result of `moecc.ahead.worker.report` for people."""
    return "\n".join([*_heading(data), *_memory(data), *_work(data), *_collectives(data)])


def _heading(data: JsonDict) -> Iterator[str]:
    machine = data["machine"]
    yield (
        f"{data['model']} for {machine['name']}: {amount(machine['devices'], 'device')}, "
        f"{step_text(data)}, {data['dtype']}, weights {data['weight_dtype']}"
    )
    yield f"  parameters   {data['parameters']:,}"
    yield f"  batch        {batch_text(data['batch'])}"
    capacity = data["capacity"]
    bound = (
        "" if capacity is None else f", capacity {capacity['factor']} x {capacity['convention']}"
    )
    layout = f"{mesh_text(data['mesh'])}, dense weights {data['dense_weights']}"
    yield f"  mesh         {layout}, remat {data['remat']}{bound}"
    yield f"  program      {_program(data)}"
    yield f"  passes       {data['pipeline']}"
    seconds, host = data["seconds"], size_text(data["host_peak_bytes"])
    yield (
        f"  compiled     in {seconds['compile']:.1f} s after {seconds['lower']:.1f} s of lowering, "
        f"with {host} of host memory{', with the least effort' if data['quick'] else ''}"
    )


def _program(data: JsonDict) -> str:
    """Return where the program's collectives come from, and how tokens reach their experts."""
    whose = {
        "explicit": "the graph's own collectives in one shard_map",
        "gspmd": "collectives by XLA's partitioner (GSPMD)",
    }[data["partition"]]
    if data["via"] is None:
        return whose
    return f"{whose}, experts via {data['via']}{' in slices' if data['sliced'] else ''}"


def _memory(data: JsonDict) -> Iterator[str]:
    usable, needed = data["machine"]["usable_bytes"], data["needed_bytes"]
    predicted = data["predicted"]
    spare = size_text(abs(usable - needed))
    fits = f"fits, {spare} to spare" if data["fits"] else f"does not fit: {spare} too much"
    yield f"  a device     {size_text(needed)} of {size_text(usable)}: {fits}"
    if data["would_fit"]:
        yield f"               {data['would_fit']}, by the plan"
    yield f"{'':15}{'compiled':>12}{'planned':>12}"
    memory = data["memory"] or {}
    for title in ("arguments", "temporaries"):
        key = f"{title}_bytes"
        size = size_text(memory[key]) if key in memory else "-"
        yield f"    {title:<11}{size:>12}{size_text(predicted[key]):>12}"
    if "outputs_bytes" in memory:
        new = memory["outputs_bytes"] - memory["aliased_bytes"]
        yield f"    {'new outputs':<11}{size_text(new):>12}"
    yield f"    {'peak':<11}{size_text(needed):>12}{size_text(predicted['needed_bytes']):>12}"


def _work(data: JsonDict) -> Iterator[str]:
    if data["memory"] is None:
        return
    flops, model = data["flops"], data["model_flops"]
    yield f"    {'FLOPs':<11}{count_text(flops):>12}{count_text(data['predicted']['flops']):>12}"
    share = f"{model / max(flops, 1):.0%} of what is computed"
    if model > flops:
        # What kernels and loops hide is said below; without them only attention computes less.
        hides = data["opaque"] or data["unknown_loops"]
        skips = "is computed: attention skips blocks of masked scores"
        share = f"more than {'the program shows' if hides else skips}"
    yield f"    of the model alone {count_text(model)}, {share}"
    if data["unknown_loops"]:
        yield f"    {data['unknown_loops']} loops of unknown length are counted once"
    for name, count in data["opaque"].items():
        yield f"    {count} runs of {name} have multiplications that the program does not show"


def _collectives(data: JsonDict) -> Iterator[str]:
    compiled, predicted = data["collectives"], data["predicted"]["collectives"]
    if not compiled:
        return
    yield f"  {'collectives of a device':<25}{'text':>6}{'runs':>8}{'bytes':>12}{'planned':>12}"
    for kind in sorted({*compiled, *predicted}):
        total = compiled.get(kind, {"count": 0, "runs": 0, "bytes": 0})
        planned = size_text(predicted[kind]["bytes"]) if kind in predicted else "-"
        yield (
            f"    {kind:<23}{total['count']:>6}{total['runs']:>8}"
            f"{size_text(total['bytes']):>12}{planned:>12}"
        )
        if "worst_bytes" in total:
            worst = size_text(total["worst_bytes"])
            yield f"      balanced: where all rows go to one device, {worst}"
    if not data["quick"]:  # Nothing is beside products where nothing was tried.
        yield from _overlap(data)
        yield from _step_time(data)


def _overlap(data: JsonDict) -> Iterator[str]:
    """Yield how much of the collectives is beside products, and how much is waited for."""
    pairs = (data["overlap"], data["predicted"]["overlap"])
    beside, planned = (sum(k["overlapped_bytes"] for k in kinds.values()) for kinds in pairs)
    exposed, waiting = (sum(k["exposed_bytes"] for k in kinds.values()) for kinds in pairs)
    yield f"    {'beside products':<37}{size_text(beside):>12}{size_text(planned):>12}"
    yield f"    {'exposed':<37}{size_text(exposed):>12}{size_text(waiting):>12}"


def _step_time(data: JsonDict) -> Iterator[str]:
    """Yield the time of a step as planned, and with what the program's schedule exposes."""
    planned, corrected = data["predicted"], data["corrected"]
    times = f"{seconds_text(corrected['seconds']):>12}{seconds_text(planned['seconds']):>12}"
    yield f"  {'step, exposed collectives as scheduled':<39}{times}"
    yield f"    {'of the peak':<37}{corrected['mfu']:>12.1%}{planned['mfu']:>12.1%}"


def compile(
    model: AnyModelName,
    *,
    machine: OptionalMachine = None,
    plan: SavedPlanFile = None,
    pipeline: PipelineText = "",
    load: Load = (),
    config: ProgramConfig = ProgramConfig(),
    set: Annotated[Sequence[str], Spelling("KEY=VALUE")] = (),
    quick: bool = False,
    emit: Literal["stablehlo", "hlo"] | None = None,
    save: OutputFile = None,
    time_limit: Annotated[float, Spelling("SECONDS")] = 3600.0,
    force: Force = False,
) -> Report:
    """Compile a step for a machine that is not attached.

    The report has the memory and the collectives of the program. No weights are read and no
    accelerator is needed: libtpu compiles for TPUs, the CUDA plug-in of jax for GPUs. The exit code
    is 1 if the program does not fit.

    Args:
      set: Setting of the optimizer, as in a recipe: optimizer.clip=0; may be repeated.
      quick: Compile with the least effort; the program is slower.
      emit: Program to print in place of the report.
      save: File to write an artefact of jax.export to.
      time_limit: Time after which the compilation is given up.

    Example:
      moecc compile preset:st-moe-base --machine tpu:v5p:2x2x2 --step train
    """
    if quick and config.overlap:
        raise UsageError(
            "the least effort of the compiler puts no collective beside products",
            expected="--quick or --overlap",
            found="both",
            hint="without --quick the report shows what overlaps",
        )
    if plan is not None:
        machine, pipeline, config = _planned(plan, machine, pipeline, config)
    if machine is None:
        raise UsageError("no machine is named", expected="--machine M, or --plan FILE")
    # The compiling process parses all again; errors are reported before it is started.
    kind = find_machine(machine).kind
    config.check()
    update_of(config.optimizer, set)
    request = Request(
        model, machine, config, emit, save is not None, quick, tuple(load),
        str(read_pipeline(pipeline, load)), tuple(set),
    )  # fmt: skip
    check_writable(save, force=force)
    compilers = {"tpu": ("tpu",), "gpu": ("gpu-aot",)}.get(kind, ())
    extras = ("xla", "export") if save is not None else ("xla",)
    require("compiling", extras, (*(("train",) if config.train else ()), *compilers))
    with signals_raised():  # the worker must not outlive this process
        try:
            outcome = compile_in_subprocess(request, time_limit)
        except CompilerFailed as error:
            hint = nearest_that_compiles(request, time_limit)
            raise CompilerFailed(
                replace(problem, where=f"{model} for {machine}", hint=hint)
                for problem in error.problems
            ) from None
    data = outcome.data
    for remark in data["remarks"]:
        say(f"note: {remark}")
    if save is not None:
        write_whole(save, outcome.artefact, force=force)
        say(f"the exported program is in {save}")
    code = 0 if data["fits"] else 1
    if emit is not None:
        return Report("compile", None, lambda: f"{outcome.program}\n", is_raw=True, exit_code=code)
    return Report("compile", data, lambda: compile_text(data), exit_code=code)


def _planned(
    file: str, machine: str | None, pipeline: str, config: ProgramConfig
) -> tuple[str, str, ProgramConfig]:
    """Return machine, pipeline and settings of a saved plan, which no option may state, too."""
    default = ProgramConfig()
    names = [name for name, text in (("machine", machine), ("pipeline", pipeline)) if text]
    planned = (*(f.name for f in fields(StepConfig)), "sliced")
    names += [name for name in planned if getattr(config, name) != getattr(default, name)]
    if names:
        raise UsageError(
            Problem("the plan says it", option_name(name), found=f"--plan {file}",
                    hint="leave one of the two out") for name in names
        )  # fmt: skip
    saved = read_plan(file)
    settings = replace(
        saved.config, partition=config.partition, chunks=config.chunks,
        capacity_factor=config.capacity_factor, remat=saved.config.remat or "full",
        dense_weights=saved.config.dense_weights or "whole",
    )  # fmt: skip
    return saved.machine, saved.pipeline, settings
