"""``python -m tests.kill.prove``: end conversions everywhere, and write down what was found.

    python -m tests.kill.prove [--sample N] [--how NAME …] [--out FILE]

Prints a JSON object: the number of points of each scenario, and every failure.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import platform
import sys
import tempfile
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from moecc.version import __version__

from .rig import ENDS, KILLS, Result, run_ends, run_kills


def prove(ways: list[str], sample: int | None) -> dict[str, object]:
    """Run what is asked for, and return what was found, with the date and the machine."""
    result, start = Result(), time.monotonic()
    gc.freeze()  # forked children copy less
    for how in ways:
        with tempfile.TemporaryDirectory(prefix="moecc-kills-", dir=_memory()) as base:
            (run_kills if how in KILLS else run_ends)(Path(base), how, sample, result)
    kills = sum(n for name, n in result.points.items() if name.split(":")[0] in KILLS)
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "moecc": __version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "seconds": round(time.monotonic() - start),
        "killed": kills,
        "ended": sum(result.points.values()) - kills,
        **asdict(result),
    }


def _memory() -> str | None:
    """Return a folder in memory, if there is one."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def main() -> int:
    """Run, print, and return 1 if anything failed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--sample", type=int, help="that many calls of each scenario, not all")
    parser.add_argument("--how", nargs="*", choices=[*KILLS, *ENDS], default=[*KILLS, *ENDS])
    parser.add_argument("--out", type=Path, help="the file for the JSON object")
    asked = parser.parse_args()
    with contextlib.redirect_stdout(sys.stderr):
        found = prove(asked.how, asked.sample)
    text = json.dumps(found, indent=1)
    if asked.out is not None:
        asked.out.write_text(f"{text}\n")
    print(text)
    return 1 if found["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
