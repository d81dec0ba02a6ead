"""Several writers of one output at once: one of them writes it, the others are told."""

from __future__ import annotations

import contextlib
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

from moecc.formats.files import injected

from .disks import CountingDisk
from .rig import FOLDER, GGUF, Kind, Result, Rig, exit_code

WRITERS = 4
_FLAGS = ((), ("--force",), ("--resume",), ("--force", "--resume"))


class SlowDisk(CountingDisk):
    """Waits before and after some of the calls."""

    def __init__(self, seed: int):
        super().__init__()
        self._draw = random.Random(seed)

    @contextlib.contextmanager
    def call(self) -> Iterator[bool]:
        """Do the call, not one at a time: other processes do not wait either."""
        self._wait()
        yield False
        self._wait()

    def _wait(self):
        if self._draw.random() < 0.08:
            time.sleep(self._draw.random() * 0.02)


def start(rig: Rig, flags: tuple[str, ...], seed: int) -> int:
    """Start a writer, and return the id of its process."""
    pid = os.fork()
    if pid:
        return pid
    code = 99
    with contextlib.suppress(BaseException), injected(SlowDisk(seed)):
        code = exit_code(lambda: rig.convert(*flags))
    os._exit(code)


def race(rig: Rig, seed: int):
    """Let writers loose on an output, perhaps an old one, perhaps with leftovers beside it."""
    draw = random.Random(seed)
    old = draw.random() < 0.5
    rig.fresh(old)
    if draw.random() < 0.4:
        rig.run(*(("--force",) if old else ()), at=draw.randrange(20, 90))
    pids = [start(rig, draw.choice(_FLAGS), seed * WRITERS + n) for n in range(WRITERS)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    label, found = f"race {seed} {codes}", rig.visible()
    if set(codes) - {0, 1}:
        rig.fail(label, "an exit code that is neither 0 nor 1")
    if 0 in codes and (found != rig.expected or rig.hidden()):
        rig.fail(label, f"{sorted(found)} {sorted(rig.hidden())} after a success")
    if 0 not in codes and found not in ({}, rig.old(), rig.expected):
        rig.fail(label, f"{sorted(found)} without a success")


def run_races(base: Path, rounds: int, result: Result):
    """Run `rounds` races for each kind of output."""
    for kind in (FOLDER, GGUF):
        _races_of(base, kind, rounds, result)


def _races_of(base: Path, kind: Kind, rounds: int, result: Result):
    rig = Rig(base, kind, "kill", result)
    for seed in range(rounds):
        race(rig, seed)
    result.points[f"races: {kind.out}, {WRITERS} writers"] = rounds
