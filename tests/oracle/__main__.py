"""``python -m tests.oracle``: compare the prover with the reference on pairs of graphs.

    python -m tests.oracle [--pairs N] [--seed N] [--jobs N] [--seconds S] [--source NAME]
                           [--out FILE]

Pairs come in parts of 200 seeds, each with a file of counts in the work folder, so that a run that
was stopped, or given a number of seconds, goes on with those that are missing.  Prints the counts;
exit code 1 if prover and reference disagree anywhere, with the graphs in ``disagreements/``
beside this file.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from moecc.version import __version__

from .fuzz import run_until
from .sources import SOURCES

PART = 200


def main() -> int:
    """Run the parts that are missing, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.oracle", description=__doc__)
    parser.add_argument("--pairs", type=int, default=1000, help="number of seeds")
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="when to stop")
    parser.add_argument("--source", default="", choices=["", *SOURCES], help="only this source")
    parser.add_argument("--work", type=Path, default=Path("build/oracle"), help="folder of parts")
    parser.add_argument("--out", type=Path, help="where the counts go, too")
    asked = parser.parse_args()
    asked.work.mkdir(parents=True, exist_ok=True)
    until = time.time() + asked.seconds
    starts = range(asked.seed, asked.seed + asked.pairs, PART)
    parts: dict[int, dict[str, Any]] = {}
    with ProcessPoolExecutor(asked.jobs) as pool:
        futures = {}
        for start in starts:
            file = asked.work / f"{asked.source or 'all'}-{start}.json"
            if file.exists():
                parts[start] = json.loads(file.read_text("utf-8"))
                continue
            stop = min(start + PART, asked.seed + asked.pairs)
            futures[pool.submit(run_until, until, range(start, stop), asked.source)] = start, file
        for future in as_completed(futures):
            start, file = futures[future]
            counts = future.result()
            if counts is None:
                continue
            parts[start] = counts
            file.write_text(json.dumps(parts[start], indent=1), "utf-8")
            failures = parts[start]["failures"]
            print(
                f"from {start}: {parts[start]['counts'].get('pairs', 0)} pairs,",
                file=sys.stderr,
                end=" ",
            )
            print(
                f"{len(failures)} failures", *failures[:5], sep="\n  ", file=sys.stderr, flush=True
            )
    record = summary(parts)
    if asked.out is not None:
        asked.out.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    print(json.dumps(record, indent=1))
    return 1 if record["failures"] else 0


def summary(parts: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """Return the counts of all parts together."""
    counts: Counter[str] = Counter()
    edits: dict[str, Counter[str]] = {}
    for part in parts.values():
        counts.update(part["counts"])
        for name, verdicts in part["edits"].items():
            edits.setdefault(name, Counter()).update(verdicts)
    processor = sum(p["processor_seconds"] for p in parts.values())
    named = counts["refuted at the node"], counts["refuted elsewhere"]
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "moecc": __version__,
        "pairs": counts["pairs"],
        "disagreements": counts["unsound"] + counts["unfounded"],
        "pairs_a_processor_second": round(counts["pairs"] / processor, 1) if processor else None,
        "prover_seconds": round(sum(p["prover_seconds"] for p in parts.values()), 1),
        "refuted_at_the_node": round(named[0] / sum(named), 3) if sum(named) else None,
        "refuted_in_the_layer": (
            round(counts["refuted in the layer"] / sum(named), 3) if sum(named) else None
        ),
        "counts": dict(sorted(counts.items())),
        "edits": {n: dict(c) for n, c in sorted(edits.items())},
        "failures": [f for p in parts.values() for f in p["failures"]],
    }


if __name__ == "__main__":
    raise SystemExit(main())
