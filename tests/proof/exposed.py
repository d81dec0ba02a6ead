"""Exposed collectives: the plan's prediction beside the schedule of the compiled program.

    python -m tests.proof.exposed --predict    # rows that no plan has predicted yet
    python -m tests.proof.exposed              # compile what is predicted and committed

`docs/proofs/exposed.json` has a row for each program.  A prediction is written first and committed;
the row of a program that is compiled afterwards names that commit.  Rules were made from the
programs of `LEARNT`.  Compiling goes on where it was stopped.  A row has the digest of its lowered
program, and it stands while the same compiler is given that program.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from moecc.ahead.request import Request
from moecc.ahead.worker import prepare
from moecc.errors import MoeccError
from moecc.jobs.command import read_pipeline
from moecc.jobs.compile import ENVIRONMENT, compile_in_subprocess
from moecc.plan.step import ProgramConfig

RECORD = Path("docs/proofs/exposed.json")
BOUND = 0.2
"""How far exposed bytes may be from those of the compiled program."""

Row = dict[str, Any]

UPCYCLED, UPCYCLED_16 = "upcycle{experts=8 top-k=2}", "upcycle{experts=16 top-k=2}"
LLAMA, MIXTRAL, SMOLLM2 = "preset:llama-3.1-8b", "preset:mixtral-8x7b", "preset:smollm2-135m"
SPLIT = {"dense_weights": "split"}
NONE, FULL = {"remat": "none"}, {"remat": "full"}


def program(
    model: str, machine: str, mesh: str | None, pipeline: str = "", **settings: object
) -> Row:
    """Return a training step: what is compiled, and the settings of `ProgramConfig`."""
    return {
        "model": model, "machine": machine, "pipeline": pipeline,
        "settings": {"mesh": mesh, **settings},
    }  # fmt: skip


LEARNT = {
    "llama-h100-8": program(LLAMA, "gpu:h100:8", "fsdp=8", **NONE),
    "llama-h100-8-full": program(LLAMA, "gpu:h100:8", "fsdp=8", **FULL),
    "llama-h100-64": program(LLAMA, "gpu:h100:64", "fsdp=64", **NONE),
    "llama-a100-16": program(LLAMA, "gpu:a100:16", "fsdp=16", **NONE),
    "llama-h100-tensor": program(LLAMA, "gpu:h100:8", "fsdp=4,model=2", **FULL),
    "llama-h100-sequence": program(
        LLAMA, "gpu:h100:8", "fsdp=4,model=2", rules="fsdp,tensor-parallel,sequence-parallel",
        **FULL,
    ),
    "mixtral-h100-16": program(
        MIXTRAL, "gpu:h100:16", "fsdp=2,expert=8", via="capacity", **SPLIT, **FULL
    ),
    "mixtral-h100-chunks": program(
        MIXTRAL, "gpu:h100:16", "fsdp=2,expert=8", via="capacity", chunks=2, batch_tokens=131072,
        **SPLIT, **FULL,
    ),
    "llama-8x-h100-16": program(
        LLAMA, "gpu:h100:16", "fsdp=8,expert=2", UPCYCLED, via="ragged", **SPLIT, **NONE
    ),
    "smollm2-8x-h100-8": program(
        SMOLLM2, "gpu:h100:8", "fsdp=4,expert=2", UPCYCLED, via="ring", **SPLIT, **NONE
    ),
    "llama-v5p-16": program(
        LLAMA, "tpu:v5p:2x2x4", "fsdp=16", batch_tokens=65536, overlap=True, **FULL
    ),
    "llama-v5p-16-none": program(
        LLAMA, "tpu:v5p:2x2x4", "fsdp=16", batch_tokens=65536, overlap=True, **NONE
    ),
    "llama-8x-v5p-64": program(LLAMA, "tpu:v5p:4x4x4", "fsdp=64", UPCYCLED, **FULL),
}  # fmt: skip
"""Programs whose schedules made the rules."""

REJECTED = {
    "t5-xxl-h100-8-best": program("preset:t5-xxl", "gpu:h100:8", "fsdp=4,model=2", **NONE),
    "t5-xxl-h100-16-best": program("preset:t5-xxl", "gpu:h100:16", "fsdp=16", **NONE),
    "st-moe-base-h100-8-best": program(
        "preset:st-moe-base", "gpu:h100:8", "expert=8", via="capacity", **SPLIT, **NONE
    ),
    "llama-8x-v5p-64-none": program(LLAMA, "tpu:v5p:4x4x4", "fsdp=64", UPCYCLED, **NONE),
}
"""Programs that a compiler rejects or crashes on: products of 12 x 114 rows on H100, and gradients
of dropless experts that are computed where they are, with nothing computed again, on v5p."""

OVERLAPPED = {
    "mixtral-v5p-64": program(MIXTRAL, "tpu:v5p:4x4x4", "fsdp=8,expert=8", **SPLIT),
    "mixtral-v5p-64-dropless": program(
        MIXTRAL, "tpu:v5p:4x4x4", "fsdp=8,expert=8", via="ragged", **SPLIT
    ),
    "mixtral-v5p-64-dropless-16": program(
        MIXTRAL, "tpu:v5p:4x4x4", "fsdp=16,expert=4", via="ragged", **SPLIT
    ),
    "mixtral-v5p-64-ring": program(
        MIXTRAL, "tpu:v5p:4x4x4", "fsdp=8,expert=8", via="ring", **SPLIT
    ),
    "mixtral-v5p-64-ring-16": program(
        MIXTRAL, "tpu:v5p:4x4x4", "fsdp=16,expert=4", via="ring", **SPLIT
    ),
    "mixtral-v5p-64-ring-capacity": program(
        MIXTRAL, "tpu:v5p:4x4x4", "fsdp=8,expert=8", via="ring", capacity_factor=1.25, **SPLIT
    ),
    "mixtral-v5p-64-data": program(MIXTRAL, "tpu:v5p:4x4x4", "data=8,expert=8", **SPLIT),
    "llama-v5p-64": program(LLAMA, "tpu:v5p:4x4x4", "fsdp=64"),
    "llama-16x-v5p-32-ring": program(
        LLAMA, "tpu:v5p:2x4x4", "fsdp=4,expert=8", UPCYCLED_16, via="ring", **SPLIT
    ),
    "llama-16x-v5p-32-dropless": program(
        LLAMA, "tpu:v5p:2x4x4", "fsdp=4,expert=8", UPCYCLED_16, via="ragged", **SPLIT
    ),
}  # fmt: skip
"""Programs with full rematerialisation for v5p, of which six made the rules."""

for _row in OVERLAPPED.values():
    _row["settings"] |= {"overlap": True, **FULL}

HELD_OUT = {
    "llama-8x-h100-16-best": program(
        LLAMA, "gpu:h100:16", "expert=8,model=2", UPCYCLED, via="ragged", sliced=True,
        **SPLIT, **NONE,
    ),
    "mixtral-h100-64-best": program(
        MIXTRAL, "gpu:h100:64", "fsdp=32,expert=2", via="ring", **SPLIT, **NONE
    ),
    "llama-h100-16-best": program(LLAMA, "gpu:h100:16", "fsdp=16", **NONE),
    "smollm2-8x-h100-16-best": program(
        SMOLLM2, "gpu:h100:16", "fsdp=8,expert=2", UPCYCLED, via="ring", **SPLIT, **NONE
    ),
    "mixtral-h100-32": program(
        MIXTRAL, "gpu:h100:32", "fsdp=4,expert=8", via="capacity", **SPLIT, **FULL
    ),
    "llama-h100-32-parts": program(
        LLAMA, "gpu:h100:32", "fsdp=32", batch_tokens=262144, micro_batches=2, **FULL
    ),
    "llama-h100-32-data": program(LLAMA, "gpu:h100:32", "data=4,fsdp=8", **NONE),
    "mixtral-a100-16-best": program(
        MIXTRAL, "gpu:a100:16", "expert=8,model=2", via="ragged", sliced=True, **SPLIT, **NONE
    ),
    "llama-v5p-64-best": program(LLAMA, "tpu:v5p:4x4x4", "fsdp=64", overlap=True, **NONE),
    "mixtral-v5p-64-best": program(
        MIXTRAL, "tpu:v5p:4x4x4", "fsdp=32,expert=2", via="ring", overlap=True, **SPLIT, **NONE
    ),
    "mixtral-v5p-64-default": program(
        MIXTRAL, "tpu:v5p:4x4x4", "fsdp=8,expert=8", via="ragged", **SPLIT, **NONE
    ),
    "llama-8x-v5p-64-best": program(
        LLAMA, "tpu:v5p:4x4x4", "fsdp=8,expert=8", UPCYCLED, via="ragged", **SPLIT, **NONE
    ),
    "llama-v6e-16-best": program(LLAMA, "tpu:v6e:4x4", "data=2,fsdp=8", **SPLIT, **NONE),
    "smollm2-8x-v5e-16-best": program(
        SMOLLM2, "tpu:v5e:4x4", "fsdp=8,expert=2", UPCYCLED, via="ring", **SPLIT, **NONE
    ),
}  # fmt: skip
"""Programs that are predicted before they are compiled; `best` is what a plan recommends."""

PUBLISHED = {
    "llama-8x-h100-512": program(
        LLAMA, "gpu:h100:512", "data=4,fsdp=64,expert=2", UPCYCLED, via="ring", remat="save",
        batch_tokens=512 * 8192, sequence="8192", **SPLIT,
    ),
    "mixtral-v5p-128": program(
        MIXTRAL, "tpu:v5p:4x4x8", "fsdp=128", batch_tokens=128 * 36 * 4096, sequence="4096",
        overlap=True, **FULL,
    ),
}  # fmt: skip
"""Steps of figures that NVIDIA (arXiv 2412.09952) and MaxText published, as plans choose them."""

PROGRAMS = {**LEARNT, **REJECTED, **OVERLAPPED, **HELD_OUT, **PUBLISHED}


def request_of(row: Row) -> Request:
    """Return the compilation of a row."""
    pipeline = str(read_pipeline(row["pipeline"], ()))
    config = ProgramConfig(**row["settings"])
    return Request(row["model"], row["machine"], config, pipeline=pipeline)


def predicted(row: Row) -> Row:
    """Return what the plan predicts of a row."""
    estimate = prepare(request_of(row)).estimate
    return {
        "exposed_bytes": sum(r["exposed_bytes"] for r in estimate.overlap.values()),
        "collective_bytes": sum(sum(r.values()) for r in estimate.overlap.values()),
        "seconds": estimate.seconds,
        "mfu": estimate.mfu,
    }


def digest(request: Request) -> str:
    """Return the SHA-256 of the program in StableHLO that a request gives to the compiler."""
    os.environ.update(ENVIRONMENT)  # before jax looks for devices
    from moecc_backends.xla.ahead import lower_step

    prepared = prepare(request)
    lowered = lower_step(prepared.graph, prepared.job)
    return hashlib.sha256(lowered.as_text().encode()).hexdigest()


def compiled(row: Row) -> Row:
    """Return what the compiled program of a row exposes; the compiler's words if it has none."""
    try:
        data = compile_in_subprocess(request_of(row), 1500).data
    except (MoeccError, RuntimeError) as error:
        return {"refused": str(error)[:400]}
    return compiled_json(data)


def compiled_json(data: Row) -> Row:
    """Return the figures of a report of ``moecc compile``."""
    return {
        "exposed_bytes": sum(r["exposed_bytes"] for r in data["overlap"].values()),
        "collective_bytes": sum(sum(r.values()) for r in data["overlap"].values()),
        "seconds": data.get("corrected", {}).get("seconds"),
        "mfu": data.get("corrected", {}).get("mfu"),
        "fits": data["fits"],
        "compile_seconds": round(data["seconds"]["compile"]),
    }


def off(row: Row) -> float | None:
    """Return how far the prediction is from the program, relative to the program."""
    exposed = row.get("compiled", {}).get("exposed_bytes")
    return None if not exposed else float(row["predicted"]["exposed_bytes"] / exposed - 1)


def machine() -> Row:
    """Return what compiled the programs."""
    packages = {}
    for name in ("jax", "libtpu", "jax-cuda12-plugin"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = None
    return {"python": platform.python_version(), **packages}


def write(rows: dict[str, Row], path: Path):
    """Write the record, with how many programs are within the bound, published steps aside."""
    errors = {n: d for n, row in rows.items() if (d := off(row)) is not None}
    for name, distance in errors.items():
        rows[name]["error"] = round(distance, 4)
    judged = {n: d for n, d in errors.items() if n not in PUBLISHED}
    held_out = [name for name in judged if rows[name]["predicted_at"]]
    within = [name for name, distance in judged.items() if abs(distance) <= BOUND]
    summary = {
        "bound": BOUND,
        "compiled": len(judged),
        "within": len(within),
        "predicted_before": len(held_out),
        "predicted_before_within": len(set(held_out) & set(within)),
        "refused": sum("refused" in row.get("compiled", {}) for row in rows.values()),
    }
    data = {"date": datetime.now(UTC).date().isoformat(), "packages": machine(), **summary}
    path.write_text(json.dumps({**data, "programs": rows}, indent=1) + "\n")


def main() -> int:
    """Predict or compile; return 0 if four of five programs are within the bound."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="programs (default: all)")
    parser.add_argument("--predict", action="store_true", help="predict, and compile nothing")
    parser.add_argument("--out", type=Path, default=RECORD)
    options = parser.parse_args()
    rows: dict[str, Row] = {}
    if options.out.exists():
        record = json.loads(options.out.read_text())
        rows = record["programs"]
        if record["packages"] != machine():
            for row in rows.values():
                row.pop("program", None)
    for name in options.names or PROGRAMS:
        if options.predict:
            row = rows.setdefault(name, {**PROGRAMS[name], "predicted_at": None})
            # A prediction that a compiled program has answered is not made again.
            if name not in HELD_OUT or row["predicted_at"] is None:
                row["predicted"] = predicted(row)
        elif name in rows:
            row, program = rows[name], digest(request_of(rows[name]))
            if row.get("program") == program:
                continue
            if name in HELD_OUT and row["predicted_at"] is None:
                command = ["git", "log", "-1", "--format=%h", "--", str(options.out)]
                row["predicted_at"] = subprocess.check_output(command, text=True).strip()
            row |= {"program": program, "compiled": compiled(row)}
            print(name, row["compiled"], off(row), file=sys.stderr, flush=True)
        write(rows, options.out)
    distances = [off(row) for name, row in rows.items() if name not in PUBLISHED]
    judged = [abs(d) <= BOUND for d in distances if d is not None]
    print(f"{sum(judged)} of {len(judged)} within {BOUND:.0%}")
    return int(sum(judged) < 0.8 * len(judged))


if __name__ == "__main__":
    sys.exit(main())
