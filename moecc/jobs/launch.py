"""``moecc launch``: run several processes on this machine, or print scripts for clusters."""

from __future__ import annotations

import os
import re
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from inspect import signature
from itertools import pairwise
from typing import IO, Annotated, Literal

from moecc.errors import MachineError, MoeccError, Problem, UsageError, nearest, raise_problems
from moecc.formats.store import is_address
from moecc.jobs import COMMANDS
from moecc.jobs.command import OptionalMachine, Spelling
from moecc.launch.processes import (
    BEATS,
    LIFELINE,
    LIMIT,
    ProcessInfo,
    seconds_of_environment,
)
from moecc.launch.templates import make_job, option_value, remarks, template
from moecc.plan.step import read_plan
from moecc.support.console import PROGRESS, say
from moecc.support.process import signals_noted, signals_raised
from moecc.train.recipe_text import load_recipe

# Start processes on this machine, and end all of them when one fails, dies or hangs.
#
# The supervisor imports no jax: nothing that hangs the processes can hang it.

POLL_SECONDS = 0.05
GRACE_SECONDS = 1.5
"""The grace period between SIGTERM and SIGKILL."""


START_SECONDS = 120
"""The minimum time for a process's first step: it imports, and waits for the others."""

_CONNECTED = re.compile(rb"(\[Gloo\] Rank )+|\d+ is connected to \d+ peer ranks")
"""The library's log of its connections: two threads may write a line in turns."""


@dataclass
class Process:
    """A started process.

    Attributes:
      number: its number, from 0.
      popen: the process.
      beats: the read end of a pipe into which it writes a byte at each step, and while it is alive
        within the limits of its watchdog.
      last_beat: the time of its last step, or of its start, on the monotonic clock.
      steps: whether it has made a step.
    """

    number: int
    popen: subprocess.Popen[bytes]
    beats: int
    last_beat: float = field(default_factory=time.monotonic)
    steps: bool = False

    def is_late(self, limit_seconds: float) -> bool:
        """Whether its next step is overdue."""
        limit = limit_seconds if self.steps else max(limit_seconds, START_SECONDS)
        return time.monotonic() - self.last_beat > limit


@dataclass(frozen=True)
class Ended:
    """The outcome of a run.

    Attributes:
      exit_code: 0, that of the process that failed first, or `MachineError`'s for one that was
        killed or hung.
      reason: the reason, or empty.
    """

    exit_code: int
    reason: str = ""


def free_port() -> int:
    """Return a port of the loopback that nothing listens on."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


class Supervisor:
    """Runs one command in several processes on this machine.

    Args:
      command: the program and its arguments.
      processes: how many.
      stuck_seconds: how long a process may report no step; None for no limit.
      environment: variables besides those of this process.
      say: prints a human-readable line.
    """

    def __init__(
        self,
        command: Sequence[str],
        processes: int,
        *,
        stuck_seconds: float | None = None,
        environment: Mapping[str, str] | None = None,
        say: Callable[[str], None] | None = None,
    ) -> None:
        self.command = list(command)
        self.count = processes
        self.stuck_seconds = stuck_seconds
        self.environment = dict(environment or {})
        self.say = say or (lambda line: print(line, file=sys.stderr, flush=True))
        self.processes: list[Process] = []
        self._pumps: list[threading.Thread] = []
        self._lifeline = os.pipe()

    def run(self) -> Ended:
        """Start the processes, wait for them, and end all when one fails.

        Output of the first goes to standard output; errors of all to standard error, each line
        with the number of its process.

        Raises:
          MachineError: a process cannot be started.
          KeyboardInterrupt: the user interrupted; the processes have been ended.
        """
        try:
            # A process that is started and not listed yet would outlive an interrupt.
            with signals_noted() as noted:
                self._start()
            if noted.signal is not None:
                signal.raise_signal(noted.signal)
            ended = self._wait()
            if ended.reason:
                self.say(f"error: {ended.reason}")
            return ended
        finally:
            self._end_all()
            for pump in self._pumps:
                pump.join(timeout=GRACE_SECONDS)
            for descriptor in (*self._lifeline, *(p.beats for p in self.processes)):
                with suppress(OSError):
                    os.close(descriptor)

    def _start(self) -> None:
        coordinator = f"127.0.0.1:{free_port()}"
        for number in range(self.count):
            try:
                self.processes.append(self._start_one(ProcessInfo(coordinator, self.count, number)))
            except OSError as error:
                problem = f"process {number} cannot be started: {error.strerror or error}"
                raise MachineError(problem, where=self.command[0]) from None

    def _start_one(self, process: ProcessInfo) -> Process:
        reading, writing = os.pipe()
        os.set_blocking(reading, False)
        held = (self._lifeline[0], writing)
        names = {LIFELINE: str(held[0]), BEATS: str(held[1])}
        popen = subprocess.Popen(
            self.command,
            env={**os.environ, **self.environment, **process.environment(), **names},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if process.process == 0 else subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            pass_fds=held,
            # A separate process group: an interrupt reaches only the supervisor at first.
            start_new_session=True,
        )
        os.close(writing)
        for pump, stream in ((self._pump_errors, popen.stderr), (self._pump_output, popen.stdout)):
            if stream is not None:
                thread = threading.Thread(target=pump, args=(process.process, stream), daemon=True)
                thread.start()
                self._pumps.append(thread)
        return Process(process.process, popen, reading)

    def _pump_errors(self, number: int, stream: IO[bytes]) -> None:
        with stream:
            for line in stream:
                self.say(f"[{number}] {line.decode(errors='replace').rstrip()}")

    def _pump_output(self, number: int, stream: IO[bytes]) -> None:
        with stream:
            for line in stream:
                if not _CONNECTED.match(line):
                    _copy(line)

    def _wait(self) -> Ended:
        with selectors.DefaultSelector() as selector:
            for process in self.processes:
                selector.register(process.beats, selectors.EVENT_READ, process)
            while True:
                self._read_beats(selector)
                running = [p for p in self.processes if p.popen.poll() is None]
                ended = self._failed() or self._stuck(running)
                if ended is not None:
                    return ended
                if not running:
                    return Ended(0)

    def _read_beats(self, selector: selectors.BaseSelector) -> None:
        # Without anything to read this is the pause between two checks.
        if not selector.get_map():
            time.sleep(POLL_SECONDS)
            return
        for key, _ in selector.select(POLL_SECONDS):
            if os.read(key.fd, 4096):
                key.data.last_beat, key.data.steps = time.monotonic(), True
            else:
                selector.unregister(key.fd)

    def _failed(self) -> Ended | None:
        for process in self.processes:
            code = process.popen.poll()
            if code is None or code == 0:
                continue
            who = f"process {process.number} of {self.count}"
            others = "; the others were ended" if self.count > 1 else ""
            if code < 0:
                reason = f"{who} was ended by {_signal_name(-code)}{others}"
                return Ended(MachineError.exit_code, reason)
            return Ended(code, f"{who} failed with exit code {code}{others}")
        return None

    def _stuck(self, running: list[Process]) -> Ended | None:
        if self.stuck_seconds is None:
            return None
        stuck = [p for p in running if p.is_late(self.stuck_seconds)]
        if not stuck:
            return None
        # The one that fell silent first holds up the others, which wait for it.
        first = min(stuck, key=lambda p: p.last_beat)
        return Ended(
            MachineError.exit_code,
            f"process {first.number} of {self.count} made no step for "
            f"{time.monotonic() - first.last_beat:.0f} s; all were ended",
        )

    def _end_all(self) -> None:
        """End running processes: terminate, and after a short wait kill."""
        running = [p.popen for p in self.processes if p.popen.poll() is None]
        for popen in running:
            _signal(popen, signal.SIGTERM)
        limit = time.monotonic() + GRACE_SECONDS
        while time.monotonic() < limit and any(p.poll() is None for p in running):
            time.sleep(POLL_SECONDS)
        for popen in running:
            if popen.poll() is None:
                _signal(popen, signal.SIGKILL)
                popen.wait()


def _signal_name(number: int) -> str:
    """Return the name of a signal; Python has none for real-time signals."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _signal(popen: subprocess.Popen[bytes], number: int) -> None:
    """Send a signal to a process and its descendants."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(popen.pid, number)


def _copy(line: bytes) -> None:
    """Write a line of a program to our output; once its reader has exited, to nobody."""
    try:
        sys.stdout.buffer.write(line)
        sys.stdout.buffer.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# The command.

MOST_LOCAL = 64

STEP_SECONDS = 300
"""The longest time between two steps, by default."""


def launch(
    how: Annotated[Literal["local", "template"], Spelling("local|template")],
    command: Annotated[Sequence[str], Spelling("[slurm|jobset|skypilot|xpk] -- COMMAND…")],
    *,
    processes: Annotated[int, Spelling("N", "n", low=1, high=MOST_LOCAL)] = 2,
    nodes: Annotated[int | None, Spelling("N", low=1, high=99_999)] = None,
    machine: OptionalMachine = None,
    image: str | None = None,
    queue: str | None = None,
    volume: str | None = None,
    cluster: str | None = None,
    name: str = "moecc",
    step_seconds: Annotated[int | None, Spelling("SECONDS", low=1)] = None,
) -> int:
    """Run a command in several processes.

    They run on this machine and compute together; the first process that fails, dies or hangs ends
    all, with a message. With template, a script is printed that would run them on a cluster.

    Args:
      how: Start processes on this machine, or print the script of a cluster.
      command: Command of moecc, or: python FILE. For a template, the cluster stands first.
      processes: Number of processes on this machine.
      nodes: Number of hosts in a template, or of parts of a conversion (default: the hosts of the
        machine).
      image: Container image that has moecc, in a template.
      queue: Queue of Kueue or partition of Slurm, in a template.
      volume: Volume with the files of the command, in a template: a claim of Kubernetes, or a
        volume of SkyPilot.
      cluster: Cluster of xpk, in a template.
      name: Name of the job in a template.
      step_seconds: Time without a step after which a process counts as stuck (default:
        MOECC_STEP_SECONDS, else 300); loading, compiling, evaluating and saving have limits of
        their own.

    Example:
      moecc launch local -n 2 -- run smollm2-8x --outputs logits.npy
    """
    if how == "template":
        kind, *words = command
        _check_parts(_checked(words))
        _check_recipe(words)
        job = make_job(
            name, words, nodes, machine, step_seconds or STEP_SECONDS, image=image, queue=queue,
            volume=volume, cluster=cluster,
        )  # fmt: skip
        script = template(kind, job)
        if job.is_conversion and machine is not None:
            say("remark: a conversion runs on processors and does not use --machine")
        for remark in remarks(kind, job):
            say(f"remark: {remark}")
        sys.stdout.write(script)
        return 0
    unused = {"nodes": nodes, "machine": machine, "image": image, "queue": queue,
              "volume": volume, "cluster": cluster}  # fmt: skip
    raise_problems(
        (
            Problem(f"launch local has no --{option}", hint="moecc launch template SCHEDULER")
            for option, value in unused.items()
            if value is not None
        ),
        UsageError,
    )
    limit = step_seconds or seconds_of_environment(LIMIT) or STEP_SECONDS
    if command[0] == "python" and len(command) > 1:
        program = [sys.executable, "-m", "moecc.launch.script", *command[1:]]
    else:
        program = [sys.executable, "-m", "moecc", *_checked(command)]
    PROGRESS.set()
    # Processes of one machine cannot share its accelerators, but can share its cores.
    environment = {
        "JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", "cpu"),
        LIMIT: f"{limit:g}",
    }
    supervisor = Supervisor(program, processes, stuck_seconds=limit, environment=environment)
    with signals_raised():  # the processes must not outlive this one
        return supervisor.run().exit_code


def _check_recipe(words: Sequence[str]) -> None:
    """Raise InputError for a training whose recipe is wrong, or has other passes than its plan.

    A recipe that is not on this machine is checked where it runs.
    """
    from moecc.jobs.train import pass_problems, train

    path, recipes = option_value(words, "--plan"), _positional(words, train)
    if words[0] != "train" or not recipes:
        return
    pairs = zip(words, [*words[1:], ""], strict=True)
    sets = [
        word.removeprefix("--set=") if "=" in word else following
        for word, following in pairs
        if word == "--set" or word.startswith("--set=")
    ]
    try:
        recipe = load_recipe(recipes[0], sets)
    except MoeccError:
        if recipes[0].startswith("recipe:") or os.path.isfile(recipes[0]):
            raise
        return
    if path:
        raise_problems(pass_problems(read_plan(path), recipe, path))


def _positional(words: Sequence[str], command: Callable[..., object]) -> list[str]:
    """Return the arguments of a command that are neither options nor their values."""
    parameters = signature(command).parameters.values()
    switches = {f"--{p.name.replace('_', '-')}" for p in parameters if p.default is False}
    return [
        word
        for before, word in pairwise(words)
        if not word.startswith("-") and ("=" in before or before[:1] != "-" or before in switches)
    ]


def _check_parts(words: Sequence[str]) -> None:
    """Raise UsageError for a conversion that has no parts: to a store, or to a GGUF file."""
    from moecc.jobs.convert import convert

    positional = _positional(words, convert)
    if words[0] != "convert" or not positional[1:]:
        return
    if is_address(out := positional[1]):
        hint = "convert the parts into a folder that all of them see, and moecc push it"
        raise UsageError("parts are not written to a store", where=out, hint=hint)
    if out.endswith(".gguf") or option_value(words, "--to").startswith("gguf:"):
        hint = "moecc convert writes it, without a template; --threads uses the cores of a host"
        raise UsageError("a GGUF file is written by one process", where=out, hint=hint)


def _checked(command: Sequence[str]) -> Sequence[str]:
    """Return the arguments if they are a command of moecc. Raises UsageError."""
    names = [name for name in COMMANDS if name != "launch"]
    if not command or command[0] not in names:
        word = command[0] if command else ""
        raise UsageError(
            "the command to run is not a command of moecc",
            expected="for example run, after --",
            found=word or "nothing",
            hint="leave the word moecc out" if word == "moecc" else nearest(word, names),
        )
    return command
