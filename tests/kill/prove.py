"""``python -m tests.kill.prove``: end conversions everywhere, and write down what was found.

    python -m tests.kill.prove [--sample N] [--how NAME …] [--out FILE]

Prints a JSON object: the number of points of each scenario, and every failure.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.reports import about, deliver

from .races import run_races
from .rig import ENDS, KILLS, Result, run_ends, run_kills

RACES = "races"
ROUNDS = 100
WAYS = [*KILLS, *ENDS, RACES]


def prove(ways: list[str], sample: int | None) -> dict[str, object]:
    """Run what is asked for, and return what was found, with the date and the machine."""
    start = time.monotonic()
    if len(ways) == 1:
        each = [_here(ways[0], sample)]
    else:
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            each = list(threads.map(lambda how: _alone(how, sample), ways))
    counts = dict.fromkeys(("killed", "ended", "raced"), 0)
    for how, result in zip(ways, each, strict=True):
        counts[_way(how)] += sum(result.points.values())
    return {
        **about(),
        "seconds": round(time.monotonic() - start),
        **counts,
        "points": {name: n for result in each for name, n in result.points.items()},
        "failures": [text for result in each for text in result.failures],
    }


def _here(how: str, sample: int | None) -> Result:
    result = Result()
    with tempfile.TemporaryDirectory(prefix="moecc-kills-", dir=_memory()) as base:
        _run(how, Path(base), sample, result)
    return result


def _alone(how: str, sample: int | None) -> Result:
    """Run one way in a process of its own."""
    options = [] if sample is None else ["--sample", str(sample)]
    command = [sys.executable, "-m", "tests.kill.prove", "--how", how, *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if not done.stdout:
        return Result(failures=[f"{how}: the run ended with exit code {done.returncode}"])
    found = json.loads(done.stdout)
    return Result(found["points"], found["failures"])


def _run(how: str, base: Path, sample: int | None, result: Result):
    if how == RACES:
        run_races(base, ROUNDS if sample is None else sample, result)
    elif how in KILLS:
        run_kills(base, how, sample, result)
    else:
        run_ends(base, how, sample, result)


def _way(how: str) -> str:
    return "raced" if how == RACES else "killed" if how in KILLS else "ended"


def _memory() -> str | None:
    """Return a folder in memory, if there is one."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def main() -> int:
    """Run, print, and return 1 if anything failed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--sample", type=int, help="that many calls of each scenario, not all")
    parser.add_argument("--how", nargs="*", choices=WAYS, default=WAYS)
    parser.add_argument("--out", type=Path, help="the file for the JSON object")
    asked = parser.parse_args()
    with contextlib.redirect_stdout(sys.stderr):
        found = prove(asked.how, asked.sample)
    return deliver(found, asked.out)


if __name__ == "__main__":
    sys.exit(main())
