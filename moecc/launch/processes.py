"""Processes of one job: their numbers, from the environment, and how they meet."""

from __future__ import annotations

import errno
import faulthandler
import os
import re
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Literal, NoReturn

from moecc.errors import MachineError, Problem, UsageError, printable, raise_problems

COORDINATOR, PROCESSES, PROCESS = "MOECC_COORDINATOR", "MOECC_PROCESSES", "MOECC_PROCESS"
DISTRIBUTED = "MOECC_DISTRIBUTED"
CLUSTER = "cluster"
"""The value of MOECC_DISTRIBUTED with which the variables of a scheduler are read."""

MOST_PROCESSES = 100_000

_ADDRESS = re.compile(r"[^\s:]+:(\d{1,5})\Z|\[[0-9a-fA-F:]+\]:(\d{1,5})\Z")


@dataclass(frozen=True)
class ProcessInfo:
    """The number of a process among all, and their coordinator.

    Attributes:
      coordinator: host and port of the process where the others connect; empty if the cluster
        states it.
      processes: the number of processes; 0 if the cluster states it.
      process: the number of this one, from 0; -1 if the cluster states it.
    """

    coordinator: str = ""
    processes: int = 0
    process: int = -1

    @property
    def is_of_cluster(self) -> bool:
        """Whether a cluster's own variables state the rest."""
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
    ``MOECC_DISTRIBUTED=cluster``, with which `cluster_process` or JAX finds them in those of a
    cluster.  Nothing is guessed: a shell inside a Slurm job is not a cluster of its own.

    Raises:
      UsageError: some of the variables are missing, or are not numbers.
    """
    variables = os.environ if environment is None else environment
    mode = variables.get(DISTRIBUTED, "")
    if mode not in ("", "off", CLUSTER):
        raise UsageError(
            "unknown value", where=DISTRIBUTED, expected=f"{CLUSTER}, or off", found=mode
        )
    names = (COORDINATOR, PROCESSES, PROCESS)
    there = [n for n in names if variables.get(n)]
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
    problems = list(_problems(variables))
    raise_problems(problems, UsageError)
    return ProcessInfo(variables[COORDINATOR], int(variables[PROCESSES]), int(variables[PROCESS]))


# The variables of schedulers, which state the number of each process.

_FIRST_HOST = re.compile(r"([^,\[]+)(?:\[(\w+)[^\]]*\]([^,]*))?")
"""The first of ``node001``, ``node001,node002`` or ``node[001-004,007],login``."""
_ORTE = re.compile(r"(\d+)\.\d+;(?:tcp://([^,:]+)|tcp6://\[([^,\]]+))")
_FIRST_PORT, _PORTS = 49152, 16384
"""The ports of which one is chosen by the number of a job (RFC 6335, dynamic ports)."""
_TPU_PORT = 8476


def cluster_process(variables: Mapping[str, str]) -> tuple[ProcessInfo, int | None] | None:
    """Return the process that Slurm, Open MPI or GKE states, and its number on its machine.

    The number is None where one process has all devices of its machine. None as a whole stands for
    another cluster, or none. ``JAX_COORDINATOR_ADDRESS`` and ``JAX_COORDINATOR_PORT`` come first.

    Raises:
      UsageError: variables are missing, or are not numbers.
    """
    for name, read in (
        ("SLURM_PROCID", _slurm_variables),
        ("OMPI_COMM_WORLD_RANK", _ompi_variables),
        ("TPU_WORKER_ID", _gke_variables),
    ):
        if name not in variables:
            continue
        try:
            host, port, count, number, local = read(variables)
        except (KeyError, ValueError) as error:
            raise UsageError(
                "the variables of the cluster are incomplete", where=name, found=str(error)
            ) from None
        host = f"[{host}]" if ":" in host else host
        address = f"{host}:{variables.get('JAX_COORDINATOR_PORT') or port}"
        address = variables.get("JAX_COORDINATOR_ADDRESS") or address
        # As if a user had stated them: whole numbers in range, and an address with a port.
        process = process_info(ProcessInfo(address, count, number).environment())
        assert process is not None, "all of the variables are given"
        return process, local
    return None


_Stated = tuple[str, int, int, int, int | None]
"""Host and port of the coordinator, processes, number of this one, its number on its machine."""


def _slurm_variables(variables: Mapping[str, str]) -> _Stated:
    nodes = variables.get("SLURM_STEP_NODELIST") or variables["SLURM_JOB_NODELIST"]
    match = _FIRST_HOST.match(nodes)
    if match is None:
        raise ValueError(f"SLURM_STEP_NODELIST={nodes}")
    port = _FIRST_PORT + int(variables["SLURM_JOB_ID"]) % _PORTS
    count, number, local = (int(variables[f"SLURM_{n}"]) for n in ("NTASKS", "PROCID", "LOCALID"))
    return "".join(part or "" for part in match.groups()), port, count, number, local


def _ompi_variables(variables: Mapping[str, str]) -> _Stated:
    uri = variables.get("OMPI_MCA_orte_hnp_uri", "")
    match = _ORTE.match(uri)
    if match is None and not variables.get("JAX_COORDINATOR_ADDRESS"):
        raise ValueError(f"OMPI_MCA_orte_hnp_uri={uri}, and no JAX_COORDINATOR_ADDRESS")
    host, job = (match[2] or match[3], int(match[1])) if match else ("", 0)
    # Open MPI numbers jobs by multiples of 4096.
    port = _FIRST_PORT + job // 4096 % _PORTS
    names = ("SIZE", "RANK", "LOCAL_RANK")
    count, number, local = (int(variables[f"OMPI_COMM_WORLD_{name}"]) for name in names)
    return host, port, count, number, local


def _gke_variables(variables: Mapping[str, str]) -> _Stated:
    names = variables.get("TPU_PROCESS_ADDRESSES") or variables["TPU_WORKER_HOSTNAMES"]
    workers = names.split(",")
    host = variables.get("MEGASCALE_COORDINATOR_ADDRESS") or workers[0]
    slices = int(variables.get("MEGASCALE_NUM_SLICES") or 1)
    slice_number = int(variables.get("MEGASCALE_SLICE_ID") or 0)
    number = slice_number * len(workers) + int(variables["TPU_WORKER_ID"])
    return host.partition(":")[0], _TPU_PORT, slices * len(workers), number, None


def check_alone(noun: str) -> None:
    """Check that this process is the only one.

    Raises:
      UsageError: it is one of several, in which `noun` is not supported.
    """
    if process_info() is not None:
        raise UsageError(
            f"{noun} runs in one process",
            where="environment",
            expected="no MOECC_ variables of a multi-process run",
            hint="several processes run --backend xla",
        )


def _problems(variables: Mapping[str, str]) -> list[Problem]:
    problems = []
    match = _ADDRESS.match(variables[COORDINATOR])
    if match is None or not 0 < int(match[1] or match[2]) < 65536:
        problems.append(
            Problem(
                "not an address", COORDINATOR, "host:port, 10.0.0.1:8476", variables[COORDINATOR]
            )
        )
    count = variables[PROCESSES]
    if not count.isdecimal() or not 0 < int(count) <= MOST_PROCESSES:
        problems.append(Problem("not a number of processes", PROCESSES, "1 or more", count))
        return problems
    number = variables[PROCESS]
    if not number.isdecimal() or int(number) >= int(count):
        problems.append(
            Problem("not the number of a process", PROCESS, f"0 to {int(count) - 1}", number)
        )
    return problems


# A process of a multi-process run: reports its progress, and ends with the others.
#
# A process that hangs in a collective neither fails nor finishes, and no timeout of JAX covers it.
# So each process reports its steps: to the supervisor, over a pipe, if there is one; and to a
# watchdog thread, which ends the process with a stack trace if no step comes in time.

BEATS, LIFELINE, JOIN = "MOECC_BEATS_FD", "MOECC_LIFELINE_FD", "MOECC_JOIN_SECONDS"

Phase = Literal["start", "step", "evaluation", "save"]
"""A process loads and compiles, then makes steps, evaluates, and saves."""

LIMITS: Mapping[Phase, str] = {
    "start": "MOECC_START_SECONDS",
    "step": "MOECC_STEP_SECONDS",
    "evaluation": "MOECC_EVALUATION_SECONDS",
    "save": "MOECC_SAVE_SECONDS",
}
"""The variables with the seconds that a phase may take without a sign of progress."""

LIMIT = LIMITS["step"]

LONG_PHASE_SECONDS, LONG_PHASE_STEPS = 3600.0, 10.0
"""The limit of phases but steps where none is stated: an hour, or ten steps if that is longer."""

_PULSE_SECONDS = 1.0

EXIT_CODE = MachineError.exit_code


class Watchdog:
    """Ends this process if a phase shows no progress in time.

    The thread needs the interpreter lock now and then; a library that holds it forever is left to
    the supervisor, which the thread tells that the process is alive.

    Args:
      limits: the seconds that a phase may take between two signs of progress; none for no limit.
      end: ends the process; by default ``os._exit``.
    """

    def __init__(
        self, limits: Mapping[Phase, float], end: Callable[[int], object] = os._exit
    ) -> None:
        self._limits = dict(limits)
        self._end = end
        self._stopped = threading.Event()
        self._phase: Phase = "start"
        self._activity = "start"
        self._progress_seconds = time.monotonic()
        self._beats = _descriptor(BEATS)
        if limits:
            threading.Thread(target=self._watch, daemon=True, name="moecc-watchdog").start()

    def enter(self, phase: Phase) -> None:
        """Report that a phase begins, whose limit holds from now on."""
        self._phase = phase
        self.beat(self._activity)

    def beat(self, activity: str) -> None:
        """Report that this process reached the step `activity`."""
        self._activity = activity
        self._progress_seconds = time.monotonic()
        self._pulse()

    def stop(self) -> None:
        """Stop watching."""
        self._stopped.set()

    def __enter__(self) -> Watchdog:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _pulse(self) -> None:
        if self._beats is not None:
            try:
                os.write(self._beats, b".")
            except OSError:
                # The supervisor has exited; the lifeline ends this process.
                self._beats = None

    def _watch(self) -> None:
        pulse_seconds = min(_PULSE_SECONDS, *(limit / 4 for limit in self._limits.values()))
        while not self._stopped.wait(pulse_seconds):
            limit = self._limits.get(self._phase)
            if limit is not None and time.monotonic() - self._progress_seconds > limit:
                self._bite(limit)
                return
            self._pulse()

    def _bite(self, limit: float) -> None:
        phase = self._phase
        text = (
            f"no progress for {limit:g} s in the phase {phase} ({LIMITS[phase]}), "
            f"the last one was: {self._activity}"
        )
        _say(f"{text}; the stacks:")
        faulthandler.dump_traceback(file=2, all_threads=True)
        _say(text)  # again, because the stacks of all threads fill a screen
        self._end(EXIT_CODE)


def watchdog_of_environment() -> Watchdog:
    """Return a watchdog with the limits in the variables of `LIMITS`.

    With a limit of steps the other phases have one, too, stated or not.

    Raises:
      UsageError: a limit is not a number of seconds.
    """
    stated = {phase: seconds_of_environment(name) for phase, name in LIMITS.items()}
    step = stated["step"]
    default = None if step is None else max(LONG_PHASE_SECONDS, LONG_PHASE_STEPS * step)
    limits = {phase: default if seconds is None else seconds for phase, seconds in stated.items()}
    return Watchdog({phase: seconds for phase, seconds in limits.items() if seconds is not None})


def seconds_of_environment(name: str) -> float | None:
    """Return the seconds in a variable, or None if it is not set.

    Raises:
      UsageError: it is not a number of seconds.
    """
    text = os.environ.get(name, "")
    if not text:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < threading.TIMEOUT_MAX:
        raise UsageError("not a number of seconds", where=name, expected="300", found=text)
    return seconds


_joined = False


def note_joined() -> None:
    """Note that this process computes together with the others."""
    global _joined
    _joined = True


def has_joined() -> bool:
    """Whether this process computes together with the others."""
    return _joined


def hold_lifeline() -> None:
    """End this process when its supervisor exits for any reason; without one, do nothing."""
    descriptor = _descriptor(LIFELINE)
    if descriptor is not None:
        threading.Thread(target=_follow, args=(descriptor,), daemon=True).start()


def _follow(descriptor: int) -> NoReturn:
    # The supervisor never writes; the end of the pipe means that it has exited.
    while os.read(descriptor, 1):
        pass
    _say("the supervisor has gone")
    os._exit(EXIT_CODE)


def _say(text: str) -> None:
    # The reader may have exited.
    with suppress(OSError):
        os.write(2, f"error: {text}\n".encode())


def _descriptor(name: str) -> int | None:
    text = os.environ.get(name, "")
    if not text.isdecimal():
        return None
    try:
        os.fstat(int(text))
    except OSError:
        return None
    return int(text)


# A rendezvous of all processes before any of them starts JAX's client.
#
# JAX's client is C++ that ends its process with SIGABRT if another one never comes: no error to
# catch.  So all meet over plain TCP first, at the address that JAX will use; it is free again
# when they part.  A process that dies in between is left to JAX, or a supervisor, to detect.

RETRY_SECONDS = 0.2
PART_SECONDS = 5
"""How long the first process waits for the others to close their connections."""

VERDICT_SECONDS = 2
"""How much longer than the first process a connected one waits, to hear from it who is missing:
with equal limits, whichever clock started earlier decides whether it hears of it."""

_HELLO = re.compile(rb"moecc (\d{1,6}) of (\d{1,6})\n\Z")
_GO, _NO = b"go\n", b"no: "
_MOST_BYTES = 1024


def meet(process: ProcessInfo, seconds: float) -> None:
    """Wait until all processes are connected; a single process does not wait.

    Args:
      process: this process; its coordinator is an address.
      seconds: the longest wait.

    Raises:
      MachineError: they did not connect in time, or the address cannot be used.
    """
    if process.processes == 1:
        return
    if process.process == 0:
        _Host(process, seconds).wait()
    else:
        _visit(process, seconds)


@dataclass
class _Visitor:
    """A connection to the first process: the bytes received, and the sender's number once known."""

    connection: socket.socket
    received: bytes = b""
    number: int = -1


class _Host:
    """The first process, which waits for the others and notifies them when all are connected."""

    def __init__(self, process: ProcessInfo, seconds: float) -> None:
        self.process = process
        self.seconds = seconds
        self.come: dict[int, _Visitor] = {}
        self.turned_away = ""
        self.selector = selectors.DefaultSelector()

    def wait(self) -> None:
        """Wait for all, and release them.

        Raises:
          MachineError: some did not connect; those that did are notified.
        """
        deadline = time.monotonic() + self.seconds
        with self.selector, _listening(self.process) as server:
            self.selector.register(server, selectors.EVENT_READ)
            try:
                while len(self.come) < self.process.processes - 1:
                    left = deadline - time.monotonic()
                    if left <= 0:
                        self._give_up()
                    for key, _ in self.selector.select(left):
                        if key.data is None:
                            self._accept(server)
                        else:
                            self._hear(key.data)
                self._part(_GO)
            finally:
                for key in [k for k in self.selector.get_map().values() if k.data is not None]:
                    key.data.connection.close()

    def _accept(self, server: socket.socket) -> None:
        with suppress(BlockingIOError, ConnectionError):
            connection, _ = server.accept()
            connection.setblocking(False)
            self.selector.register(connection, selectors.EVENT_READ, _Visitor(connection))

    def _hear(self, visitor: _Visitor) -> None:
        try:
            data = visitor.connection.recv(_MOST_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        visitor.received += data
        if not data or visitor.number >= 0 or len(visitor.received) > _MOST_BYTES:
            self._drop(visitor)
        elif visitor.received.endswith(b"\n"):
            self._welcome(visitor)

    def _welcome(self, visitor: _Visitor) -> None:
        hello = _HELLO.match(visitor.received)
        if hello is None:
            self._drop(visitor)
            return
        number, count = int(hello[1]), int(hello[2])
        if count != self.process.processes:
            self._refuse(visitor, f"process {number} was told of {count} processes, "
                         f"process 0 of {self.process.processes}")  # fmt: skip
        elif number in self.come or not 0 < number < count:
            self._refuse(visitor, f"there are two processes with the number {number}")
        else:
            visitor.number = number
            self.come[number] = visitor

    def _refuse(self, visitor: _Visitor, reason: str) -> None:
        self.turned_away = reason
        _send(visitor, _NO + reason.encode() + b"\n")
        self._drop(visitor)

    def _drop(self, visitor: _Visitor) -> None:
        self.selector.unregister(visitor.connection)
        visitor.connection.close()
        self.come.pop(visitor.number, None)

    def _give_up(self) -> None:
        missing = [n for n in range(1, self.process.processes) if n not in self.come]
        named = ", ".join(map(str, missing[:5])) + (", …" if missing[5:] else "")
        which = f"process {named}" if len(missing) == 1 else f"processes {named}"
        reason = f"{which} of {self.process.processes} did not come within {self.seconds:g} s"
        self._part(_NO + reason.encode() + b"\n")
        raise _apart(self.process, reason, self.turned_away)

    def _part(self, word: bytes) -> None:
        """Send the final message to all, and let them close first, which leaves the port free."""
        for visitor in self.come.values():
            _send(visitor, word)
        limit = time.monotonic() + PART_SECONDS
        for visitor in self.come.values():
            visitor.connection.settimeout(max(0.01, limit - time.monotonic()))
            with suppress(OSError):
                visitor.connection.recv(1)


def _send(visitor: _Visitor, word: bytes) -> None:
    # A few bytes into an empty buffer never block; a closed connection is detected later.
    with suppress(OSError):
        visitor.connection.send(word)


@contextmanager
def _listening(process: ProcessInfo) -> Iterator[socket.socket]:
    _, port = _address(process)
    try:
        server = _server(port)
    except OSError as error:
        raise MachineError(
            f"the first process cannot listen: {error.strerror or error}",
            where=process.coordinator,
            hint=f"give another port in {COORDINATOR}, to all processes",
        ) from None
    with server:
        server.setblocking(False)
        yield server


def _server(port: int) -> socket.socket:
    # All interfaces, as JAX does: the name of the coordinator may be that of a gateway.
    if socket.has_dualstack_ipv6():
        try:
            return socket.create_server(
                ("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024
            )
        except OSError as error:
            if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                raise
    return socket.create_server(("", port), backlog=1024)


def _visit(process: ProcessInfo, seconds: float) -> None:
    """Connect to the first process, with retries, until it reports that all are connected."""
    deadline = time.monotonic() + seconds
    reason = "it does not answer"
    while (left := deadline - time.monotonic()) > 0:
        try:
            answer = _answer(process, left)
        except OSError as error:
            reason = str(error.strerror or error)
        else:
            if answer == _GO:
                return
            if answer.startswith(_NO):
                text = answer.removeprefix(_NO).decode(errors="replace").strip()
                raise _apart(process, printable(text))
            reason = (
                "a server that is not moecc answers there"
                if answer
                else "the connection was closed"
            )
        time.sleep(min(RETRY_SECONDS, max(0.0, deadline - time.monotonic())))
    raise _apart(process, f"process 0 was not met within {seconds:g} s", reason)


def _answer(process: ProcessInfo, seconds: float) -> bytes:
    deadline = time.monotonic() + seconds + VERDICT_SECONDS
    with socket.create_connection(_address(process), timeout=seconds) as connection:
        connection.sendall(b"moecc %d of %d\n" % (process.process, process.processes))
        answer = b""
        while not answer.endswith(b"\n") and len(answer) < _MOST_BYTES:
            connection.settimeout(max(0.01, deadline - time.monotonic()))
            data = connection.recv(_MOST_BYTES)
            if not data:
                break
            answer += data
        return answer


def _address(process: ProcessInfo) -> tuple[str, int]:
    host, _, port = process.coordinator.rpartition(":")
    return host.strip("[]"), int(port)


def _apart(process: ProcessInfo, reason: str, actual: str = "") -> MachineError:
    return MachineError(
        f"the processes did not meet: {reason}",
        where=process.coordinator,
        found=actual or None,
        hint=f"start all of them with the same {COORDINATOR}; {JOIN} waits longer",
    )
