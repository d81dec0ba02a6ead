"""Compile in a subprocess, which is ended when its time limit is exceeded."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes.util import find_library
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO

from moecc import errors
from moecc.ahead.request import CompileReport, Request
from moecc.ahead.worker import ANSWER, ARTEFACT, PROGRAM, REQUEST
from moecc.errors import MachineError, MoeccError, Problem
from moecc.launch.processes import LIFELINE
from moecc.plan.machines import Machine, find_machine
from moecc.support.untyped import JsonDict

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
    found = None if PRELOAD in os.environ else _jemalloc()
    if found is None:
        return {}
    return {PRELOAD: found, "MALLOC_CONF": os.environ.get("MALLOC_CONF", _RETURNED)}


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
"""What keeps jax from looking for accelerators, and libtpu from asking a cloud about itself; and
what keeps a compiler small: no tracebacks in the program, and threads that share free memory."""

_TAIL = 3000


@dataclass(frozen=True)
class CompileOutcome:
    """The outcome of a compilation.

    Attributes:
      data: the report, as JSON values.
      program: the emitted program, if requested.
      artefact: the exported artefact, if requested.
    """

    data: CompileReport
    program: str = ""
    artefact: bytes = b""


def environment(machine: Machine) -> dict[str, str]:
    """Return the environment in which jax can compile for `machine`."""
    made = {**os.environ, **ENVIRONMENT, **allocator_environment()}
    if machine.kind == "cpu":
        flag = f"--xla_force_host_platform_device_count={machine.devices}"
        made["XLA_FLAGS"] = f"{made.get('XLA_FLAGS', '')} {flag}".strip()
    return made


def compile_in_subprocess(
    request: Request, time_limit_seconds: float | None = None
) -> CompileOutcome:
    """Run the compilation `request` in another process.

    Raises:
      MachineError: the time limit is exceeded, an extra is missing, or the process was killed.
      InputError, UsageError: as `moecc.ahead.prepare.prepare` and the backend.
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
    held, kept = os.pipe()
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
        os.close(kept)


def _read(folder: Path, code: int) -> CompileOutcome:
    answer = folder / ANSWER
    if not answer.exists():
        log = (folder / "log").read_text("utf-8", "replace")[-_TAIL:]
        if code == -signal.SIGKILL or "std::bad_alloc" in log or "MemoryError" in log:
            raise MachineError(
                "the compiler was killed, most likely because this machine has too little memory"
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


def _error(data: JsonDict) -> MoeccError:
    """Return the error that the worker reported, as its own class or the nearest base."""
    kinds = (errors.InputError, errors.UsageError, errors.CheckError, errors.MachineError)
    kind = next(k for k in kinds if k.exit_code == data["exit_code"])
    return kind([Problem(**problem) for problem in data["problems"]])
