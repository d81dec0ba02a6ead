"""``python -m tests.fuzz.prove``: a million executions and 5,000 commands, in parts, counted.

    python -m tests.fuzz.prove [--executions N] [--commands N] [--jobs N] [--work DIR] [--out FILE]

Each part is a process of its own, with a seed of its own; its counts are a file in the work folder,
so that a run that was stopped goes on with the parts that are missing.  Prints a JSON object: the
counts of each grammar, of the commands, and every failure.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.reports import about, deliver

from .grammars import GRAMMARS
from .rig import HANG_SECONDS

PARTS = 5
EXECUTIONS = 66_700
COMMANDS = 5_000


@dataclass(frozen=True)
class Part:
    """Some executions of a grammar, or some commands, with one seed."""

    grammar: str | None
    seed: int
    size: int

    @property
    def name(self) -> str:
        """The name of its file."""
        return f"{self.grammar or 'commands'}-{self.seed}-{self.size}.json"

    @property
    def words(self) -> list[str]:
        """The arguments of the run."""
        if self.grammar is None:
            return ["--command-line", str(self.size), "--seed", str(self.seed)]
        size = ["--executions", str(self.size), "--seed", str(self.seed)]
        return ["--grammar", self.grammar, *size]


def parts(executions: int, commands: int) -> list[Part]:
    """Return the parts: the grammars take turns, so that a run that is stopped has some of each."""
    found = []
    for seed in range(PARTS):
        found += [Part(name, seed, executions // PARTS) for name in GRAMMARS if executions]
        found += [Part(None, seed, commands // PARTS)] if commands else []
    return found


def run_part(part: Part, work: Path) -> dict[str, Any]:
    """Run a part, unless it was run before, and return its counts."""
    file = work / part.name
    if file.exists():
        return dict(json.loads(file.read_text("utf-8")))
    command = [sys.executable, "-m", "tests.fuzz", *part.words, "--json", f"{file}.running"]
    done = subprocess.run(command, stdout=subprocess.DEVNULL)
    running = Path(f"{file}.running")
    counts = dict(json.loads(running.read_text("utf-8"))) if running.exists() else {}
    # Python ends with 1, too, where the fuzzer itself fails.
    if done.returncode != int(bool(counts.get("failures"))) or not counts:
        raise SystemExit(f"{part.name}: the run ended with exit code {done.returncode}")
    os.replace(running, file)
    return counts


def summary(found: Iterable[tuple[Part, dict[str, Any]]]) -> dict[str, Any]:
    """Return the counts of all parts together, with the date and the machine."""
    grammars = {}
    commands = {}
    failures, seconds = [], 0.0
    for part, counts in found:
        seconds += counts["seconds"]
        if part.grammar is None:
            _add_commands(commands, part.seed, counts)
            failures += [f"{kind} ({n} times)" for kind, n in counts["faults"].items()]
            continue
        tally = counts["grammars"][part.grammar]
        _add(grammars.setdefault(part.grammar, {}), part.seed, counts, tally)
        failures += [f"{part.grammar}: {s} ({n} times)" for s, n in tally["failures"].items()]
    return {
        **about(),
        "hours": round(seconds / 3600, 2),
        "hang_seconds": HANG_SECONDS,
        "executions": sum(g["executions"] for g in grammars.values()),
        "slowest_seconds": max((g["slowest_seconds"] for g in grammars.values()), default=0),
        "peak_memory_bytes": max((g["peak_memory_bytes"] for g in grammars.values()), default=0),
        "grammars": grammars,
        "commands": commands,
        "failures": sorted(set(failures)),
    }


def _add(total: dict[str, Any], seed: int, counts: dict[str, Any], tally: dict[str, Any]):
    total.setdefault("seeds", []).append(seed)
    for name in ("executions", "accepted"):
        total[name] = total.get(name, 0) + tally[name]
    total["rejected"] = total.get("rejected", 0) + sum(tally["rejected"].values())
    _largest(total, "slowest_seconds", tally)
    _largest(total, "peak_memory_bytes", counts)


def _add_commands(total: dict[str, Any], seed: int, counts: dict[str, Any]):
    total.setdefault("seeds", []).append(seed)
    total["commands"] = total.get("commands", 0) + counts["commands"]
    codes = Counter(total.get("exit_codes", {}))
    for each in counts["exit_codes"].values():
        codes.update(each)
    total["exit_codes"] = dict(sorted(codes.items()))
    _largest(total, "slowest_seconds", counts)
    _largest(total, "peak_memory_bytes", counts)


def _largest(total: dict[str, Any], name: str, counts: dict[str, Any]):
    total[name] = max(total.get(name, 0), counts[name])


def main() -> int:
    """Run the parts, print the counts, and return 1 if anything failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.prove", description=__doc__)
    parser.add_argument("--executions", type=int, default=EXECUTIONS, help="of each grammar")
    parser.add_argument("--commands", type=int, default=COMMANDS)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="parts at a time")
    parser.add_argument("--work", type=Path, help="the folder for the counts of each part")
    parser.add_argument("--out", type=Path, help="the file for the JSON object")
    asked = parser.parse_args()
    work = asked.work or Path(tempfile.mkdtemp(prefix="moecc-fuzz-parts-"))
    work.mkdir(parents=True, exist_ok=True)
    planned = parts(asked.executions, asked.commands)
    with ThreadPoolExecutor(asked.jobs) as threads:
        each = list(threads.map(lambda part: run_part(part, work), planned))
    found = summary(zip(planned, each, strict=True))
    return deliver(found, asked.out)


if __name__ == "__main__":
    sys.exit(main())
