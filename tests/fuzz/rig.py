"""The loop: mutate, execute within bounds, keep what is new, record what is no error of moecc."""

from __future__ import annotations

import contextlib
import faulthandler
import hashlib
import platform
import random
import re
import resource
import signal
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from moecc.errors import MoeccError
from tests.reports import machine

from .grammars import Grammar
from .mutate import MOST_BYTES, bombs

HANG_SECONDS = 5.0
MOST_GROWTH_BYTES = 256 << 20
"""How much the process may grow in one execution."""

MEMORY_BYTES = 4 << 30
POOL = 1000
BOMB_SHARE = 0.002


class Hang(BaseException):
    """An execution took over `HANG_SECONDS` of processor time."""


class Grew(BaseException):
    """An execution made the process larger than it may."""


@dataclass(frozen=True)
class Failure:
    """What no input may cause: the class and the place of an error that is none of moecc's."""

    grammar: str
    signature: str
    data: bytes
    trace: str


@dataclass
class Tally:
    """What happened in the executions of one grammar.

    `slowest_seconds` are the most that one took, of processor time, and `grown_bytes` the most that
    the largest size of the process grew in one.
    """

    executions: int = 0
    accepted: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)
    messages: int = 0
    seconds: float = 0.0
    slowest_seconds: float = 0.0
    grown_bytes: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return the counts as JSON values."""
        return {
            "executions": self.executions,
            "accepted": self.accepted,
            "rejected": dict(sorted(self.rejected.items())),
            "different_messages": self.messages,
            "failures": dict(sorted(self.failures.items())),
            "seconds": round(self.seconds, 1),
            "slowest_seconds": round(self.slowest_seconds, 3),
            "grown_bytes": self.grown_bytes,
        }


def outcome(grammar: Grammar, data: bytes) -> tuple[str, str]:
    """Execute one input; return the class of the error (empty: accepted) and its first words.

    Raises:
      BaseException: whatever is none of moecc's errors.
    """
    try:
        grammar.run(data)
    except MoeccError as error:
        return type(error).__name__, error.problems[0].message if error.problems else ""
    return "", ""


def signature_of(error: BaseException) -> str:
    """Return the class of an error and the last line of moecc that it came through."""
    frames = traceback.extract_tb(error.__traceback__)
    inside = [f for f in frames if "/moecc" in f.filename and "/tests/" not in f.filename]
    last = (inside or list(frames) or [None])[-1]
    name = f"{type(error).__module__}.{type(error).__name__}".removeprefix("builtins.")
    return f"{name} at {Path(last.filename).name}:{last.lineno}" if last else name


class _Watch:
    """Interrupts an execution that takes too long, by processor time: the machine may be busy."""

    def __init__(self):
        self.began = 0.0

    def __enter__(self) -> _Watch:
        signal.signal(signal.SIGALRM, self._alarm)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ):
        self.rest()

    def start(self):
        self.began = time.process_time()
        signal.setitimer(signal.ITIMER_REAL, HANG_SECONDS)

    def rest(self):
        signal.setitimer(signal.ITIMER_REAL, 0)

    def _alarm(self, number: int, frame: FrameType | None):
        left = HANG_SECONDS - (time.process_time() - self.began)
        if left <= 0.05:
            raise Hang
        signal.setitimer(signal.ITIMER_REAL, left)


class Fuzzer:
    """Fuzzes one grammar.

    Args:
      grammar: what is fuzzed.
      seed: of the mutations.
    """

    def __init__(self, grammar: Grammar, seed: int):
        self.grammar = grammar
        self.rng = random.Random(f"{grammar.name} {seed}")
        self.seeds = list(grammar.seeds())
        self.valid: list[bytes] = []
        self.novel: list[bytes] = []
        self.bombs = bombs()
        self.tally = Tally()
        self.failures: dict[str, Failure] = {}
        self.seen: dict[str, bytes] = {}

    @property
    def line(self) -> str:
        """The counts so far, in a line."""
        tally = self.tally
        return (
            f"{self.grammar.name:12} {tally.executions:>9,} executions, {tally.accepted:>8,} "
            f"accepted, {tally.messages:>4} messages, {tally.slowest_seconds:.2f} s at most, "
            f"peak {_peak_bytes() >> 20} MiB, {tally.failures.total()} failures"
        )

    def mutant(self) -> bytes:
        """Return the next input."""
        if self.rng.random() < BOMB_SHARE:
            return self.rng.choice(self.bombs)
        chance = self.rng.random()
        pool = self.seeds
        if chance < 0.3 and self.valid:
            pool = self.valid
        elif chance < 0.45 and self.novel:
            pool = self.novel
        return self.grammar.mutate(self.rng, self.rng.choice(pool), self.seeds)

    def run(self, executions: int, until: float = float("inf")):
        """Execute so many mutants, or until a time of the monotonic clock."""
        began = time.monotonic()
        with bounded(), _Watch() as watch:
            for _ in range(executions):
                if time.monotonic() > until:
                    break
                self._execute(self.mutant(), watch)
        self.tally.seconds += time.monotonic() - began

    def _execute(self, data: bytes, watch: _Watch):
        largest = _peak_bytes()
        watch.start()
        try:
            kind, words = outcome(self.grammar, data)
            watch.rest()
            grown = _peak_bytes() - largest
            self.tally.grown_bytes = max(self.tally.grown_bytes, grown)
            if grown > MOST_GROWTH_BYTES:
                raise Grew(f"{grown >> 20} MiB")
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            watch.rest()
            self._failed(error, data)
        else:
            self._count(kind, words, data)
        self.tally.executions += 1
        taken = time.process_time() - watch.began
        self.tally.slowest_seconds = max(self.tally.slowest_seconds, taken)

    def _count(self, kind: str, words: str, data: bytes):
        if kind:
            self.tally.rejected[kind] += 1
        else:
            self.tally.accepted += 1
            self._keep(self.valid, data)
        # What was never said before is worth another mutation.
        message = f"{kind}: {' '.join(re.sub(_VARIABLE, ' ', words.split(chr(10))[0]).split()[:8])}"
        if message not in self.seen and len(data) <= MOST_BYTES:
            self.seen[message] = data
            self.tally.messages += 1
            self._keep(self.novel, data)

    def _keep(self, pool: list[bytes], data: bytes):
        """Add an input to a pool, in the place of another one if it is full."""
        if len(data) > MOST_BYTES:
            return
        if len(pool) < POOL:
            pool.append(data)
        else:
            pool[self.rng.randrange(POOL)] = data

    def _failed(self, error: BaseException, data: bytes):
        signature = signature_of(error)
        self.tally.failures[signature] += 1
        if signature not in self.failures:
            trace = "".join(traceback.format_exception(error))[-4000:]
            self.failures[signature] = Failure(self.grammar.name, signature, data, trace)


_VARIABLE = r"'[^']*'|\"[^\"]*\"|\[[^\]]*\]|[^A-Za-z ]+"


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Bound the memory of this process, and end it with a stack if nothing else can."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, before[1]))
    if not faulthandler.is_enabled():
        with contextlib.suppress(OSError, ValueError, AttributeError):
            faulthandler.enable()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def same_failure(grammar: Grammar, signature: str, data: bytes) -> bool:
    """Whether an input fails with this signature."""
    with bounded(), _Watch() as watch:
        watch.start()
        try:
            outcome(grammar, data)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            return signature_of(error) == signature
    return False


def minimised(data: bytes, holds, budget: int = 400) -> bytes:
    """Cut parts out of an input for as long as `holds` of it: halves first, then less."""
    size = max(1, len(data) // 2)
    while size and budget > 0:
        at = 0
        while at < len(data) and budget > 0:
            shorter = data[:at] + data[at + size :]
            budget -= 1
            if holds(shorter):
                data = shorter
            else:
                at += size
        size //= 2
    return data


def save(failure: Failure, folder: Path) -> Path:
    """Write the input of a failure, and beside it its trace; return the file."""
    folder.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(failure.signature.encode()).hexdigest()[:8]
    file = folder / f"{failure.grammar}-{digest}"
    file.write_bytes(failure.data)
    file.with_suffix(".txt").write_text(f"{failure.signature}\n\n{failure.trace}", "utf-8")
    return file


def report(
    fuzzers: Sequence[Fuzzer], seconds: float, seed: int, extra: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Return the counts of all grammars, with the machine and the time."""
    tallies = {f.grammar.name: f.tally.to_json() for f in fuzzers}
    return {
        "schema": "moecc.fuzz/1",
        "seed": seed,
        "python": platform.python_version(),
        "machine": machine(),
        "seconds": round(seconds, 1),
        "processor_seconds": round(time.process_time(), 1),
        "peak_memory_bytes": _peak_bytes(),
        "executions": sum(f.tally.executions for f in fuzzers),
        "failures": sum(len(f.failures) for f in fuzzers),
        "grammars": tallies,
        **(extra or {}),
    }
