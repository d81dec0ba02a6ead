"""The number of this process and the number of processes, from the environment."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from moecc.errors import Problem, UsageError

COORDINATOR, PROCESSES, PROCESS = "MOECC_COORDINATOR", "MOECC_PROCESSES", "MOECC_PROCESS"
DISTRIBUTED = "MOECC_DISTRIBUTED"
CLUSTER = "cluster"
"""The value of MOECC_DISTRIBUTED that lets JAX detect its cluster."""

MOST_PROCESSES = 100_000

_ADDRESS = re.compile(r"[^\s:]+:(\d{1,5})\Z|\[[0-9a-fA-F:]+\]:(\d{1,5})\Z")


@dataclass(frozen=True)
class ProcessInfo:
    """The number of a process among all, and their coordinator.

    Attributes:
      coordinator: host and port of the process where the others connect; empty if JAX finds it.
      processes: the number of processes; 0 if JAX finds it.
      process: the number of this one, from 0; -1 if JAX finds it.
    """

    coordinator: str = ""
    processes: int = 0
    process: int = -1

    @property
    def is_found_by_jax(self) -> bool:
        """Whether JAX reads the rest from a cluster's own variables."""
        return not self.coordinator

    def environment(self) -> dict[str, str]:
        """Return the environment variables that state this information."""
        return {
            COORDINATOR: self.coordinator,
            PROCESSES: str(self.processes),
            PROCESS: str(self.process),
        }


def process_info(environment: Mapping[str, str] | None = None) -> ProcessInfo | None:
    """Return the process information in `environment`, or None for a single process.

    The variables are ``MOECC_COORDINATOR``, ``MOECC_PROCESSES`` and ``MOECC_PROCESS``; or
    ``MOECC_DISTRIBUTED=cluster``, which lets JAX read those of Slurm, Open MPI, GKE or
    GCE.  Nothing is guessed: a shell inside a Slurm job is not a cluster of its own.

    Raises:
      UsageError: some of the variables are missing, or are not numbers.
    """
    given = os.environ if environment is None else environment
    mode = given.get(DISTRIBUTED, "")
    if mode not in ("", "off", CLUSTER):
        raise UsageError(
            "unknown value", where=DISTRIBUTED, expected=f"{CLUSTER}, or off", found=mode
        )
    names = (COORDINATOR, PROCESSES, PROCESS)
    there = [n for n in names if given.get(n)]
    if not there:
        return ProcessInfo() if mode == CLUSTER else None
    if len(there) < len(names):
        missing = ", ".join(n for n in names if n not in there)
        raise UsageError(
            "a variable that states the number of a process is missing",
            where="environment",
            expected=missing,
            hint="moecc launch local sets all of them",
        )
    problems = list(_problems(given))
    if problems:
        raise UsageError(problems)
    return ProcessInfo(given[COORDINATOR], int(given[PROCESSES]), int(given[PROCESS]))


def check_alone(what: str) -> None:
    """Check that this process is the only one.

    Raises:
      UsageError: it is one of several, in which `what` is not supported.
    """
    if process_info() is not None:
        raise UsageError(
            f"{what} runs in one process",
            where="environment",
            expected="no MOECC_ variables of a multi-process run",
            hint="several processes run --backend xla",
        )


def _problems(given: Mapping[str, str]) -> list[Problem]:
    found = []
    match = _ADDRESS.match(given[COORDINATOR])
    if match is None or not 0 < int(match[1] or match[2]) < 65536:
        found.append(
            Problem("not an address", COORDINATOR, "host:port, 10.0.0.1:8476", given[COORDINATOR])
        )
    count = given[PROCESSES]
    if not count.isdecimal() or not 0 < int(count) <= MOST_PROCESSES:
        found.append(Problem("not a number of processes", PROCESSES, "1 or more", count))
        return found
    number = given[PROCESS]
    if not number.isdecimal() or int(number) >= int(count):
        found.append(
            Problem("not the number of a process", PROCESS, f"0 to {int(count) - 1}", number)
        )
    return found
