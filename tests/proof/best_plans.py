"""The ten best plans of six models on four machines, compiled at full effort.

    python -m tests.proof.best_plans [--ranks N] [--seconds S] [--machine NAME] [--out FILE]

Searches each of the 24 cells once, then compiles the best plan of each, then the second of each,
and so on up to the tenth.  A program that the compiler refuses has its words, and the nearest plan
that compiles, as ``moecc compile`` names it.  Every compilation is written at once: the same
command goes on after a stop.  A row has the digest of its lowered program, and it stands while the
same compiler is given that program.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

from moecc.ahead.request import CompilerFailed, Request
from moecc.ahead.worker import prepare
from moecc.errors import MoeccError
from moecc.jobs.compile import compile_in_subprocess, nearest_that_compiles
from moecc.plan.search import search

from .exposed import LLAMA, MIXTRAL, SMOLLM2, UPCYCLED, Row, digest, machine, program, request_of

RECORD = Path("docs/proofs/best-plans.json")
RANKS = 10
SETTINGS = ("mesh", "via", "remat", "dense_weights", "sliced")
"""What a row has of a plan's settings."""

LIMIT_SECONDS = 3600.0

MACHINES = ("gpu:h100:64", "gpu:b200:16", "tpu:v6e:8x8", "tpu:v5p:4x4x4")
MODELS = {
    "smollm2": (SMOLLM2, ""),
    "smollm2-8x": (SMOLLM2, UPCYCLED),
    "st-moe-base": ("preset:st-moe-base", ""),
    "llama": (LLAMA, ""),
    "llama-8x": (LLAMA, UPCYCLED),
    "mixtral": (MIXTRAL, ""),
}


def searched(model: str, machine_name: str) -> list[Row]:
    """Return the ten best plans of a cell, as ``moecc plan`` ranks them."""
    name, pipeline = MODELS[model]
    request = request_of(program(name, machine_name, None, pipeline))
    asked = prepare(request).asked
    ranking = search(asked.work, asked.machine, request.config, asked.work_on, RANKS - 1)
    return [
        {
            **{name: estimate.strategy.settings[name] for name in SETTINGS},
            "planned_seconds": round(estimate.seconds, 6),
            "planned_bytes": round(estimate.memory.total),
        }
        for estimate in (ranking.best, *ranking.others)
    ]


def request_for(model: str, machine_name: str, plan: Row) -> Request:
    """Return the compilation of a plan of a cell."""
    name, pipeline = MODELS[model]
    settings = {n: plan[n] for n in SETTINGS if n in plan and n != "mesh"}
    return request_of(program(name, machine_name, plan["mesh"], pipeline, **settings))


def with_records(plans: list[Row], rows: list[Row]) -> list[Row]:
    """Return the plans of a cell, each with what a record has of the same settings."""
    recorded = {tuple(row[name] for name in SETTINGS): row for row in rows if "compiled" in row}
    return [
        plan | {n: row[n] for n in ("program", "compiled") if n in row}
        for plan in plans
        for row in [recorded.get(tuple(plan[name] for name in SETTINGS), {})]
    ]


def compiled(request: Request) -> Row:
    """Return how a plan compiles; the compiler's words, and what compiles instead, if it fails."""
    begun = time.monotonic()
    try:
        data = compile_in_subprocess(request, LIMIT_SECONDS).data
    except CompilerFailed as error:
        words = str(error)[:300]
        return {"refused": words, "nearest": nearest_that_compiles(request, LIMIT_SECONDS)}
    except (MoeccError, RuntimeError) as error:
        return {"refused": str(error)[:300]}
    return {
        "fits": data["fits"],
        "needed_bytes": data["needed_bytes"],
        "corrected_seconds": data["corrected"]["seconds"],
        "seconds": round(time.monotonic() - begun),
    }


def write(cells: dict[str, list[Row]], path: Path):
    """Write the record with its totals: of the best plans, and of all that were compiled."""
    judged = [(rank, plan["compiled"]) for plans in cells.values()
              for rank, plan in enumerate(plans) if "compiled" in plan]  # fmt: skip
    totals = {
        title: {
            "compiled": len(rows),
            "fit": sum(row.get("fits", False) for row in rows),
            "refused": sum("refused" in row for row in rows),
        }
        for title, rows in (
            ("best", [row for rank, row in judged if rank == 0]),
            ("all", [row for _, row in judged]),
        )
    }
    date = datetime.now(UTC).date().isoformat()
    data = {"date": date, "packages": machine(), "totals": totals, "cells": cells}
    path.write_text(json.dumps(data, indent=1) + "\n")


def main() -> int:
    """Search and compile what the record lacks; return 1 if a best plan neither compiles nor
    has a plan near it that does."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=RANKS, help="plans of each cell")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin none after")
    parser.add_argument("--machine", choices=MACHINES, help="of this machine alone")
    parser.add_argument("--out", type=Path, default=RECORD)
    options = parser.parse_args()
    end = time.monotonic() + options.seconds
    cells: dict[str, list[Row]] = {}
    if options.out.exists():
        record = json.loads(options.out.read_text())
        cells = record["cells"] if record["packages"] == machine() else {}
    pairs = [(model, name) for name in MACHINES if options.machine in (None, name)
             for model in MODELS]  # fmt: skip
    for model, name in pairs:
        cell = f"{model} on {name}"
        cells[cell] = with_records(searched(model, name), cells.get(cell, []))
    for rank in range(options.ranks):
        for model, name in pairs:
            cell = f"{model} on {name}"
            if time.monotonic() > end or rank >= len(cells[cell]):
                continue
            plan = cells[cell][rank]
            request = request_for(model, name, plan)
            program = digest(request)
            if plan.get("program") != program:
                plan |= {"program": program, "compiled": compiled(request)}
                print(cell, rank + 1, plan, file=sys.stderr, flush=True)
                write(cells, options.out)
    write(cells, options.out)
    best = [plans[0]["compiled"] for plans in cells.values() if "compiled" in plans[0]]
    return int(not all(row.get("fits") or " compiles;" in row.get("nearest", "") for row in best))


if __name__ == "__main__":
    sys.exit(main())
