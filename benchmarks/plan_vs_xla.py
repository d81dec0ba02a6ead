"""The plan against the compiler: FLOPs, bytes of collectives and memory of whole training steps.

    python benchmarks/plan_vs_xla.py [NAME…] [--out FILE.md]

Each pair of a model and a machine is compiled ahead of time by ``moecc compile``, for TPUs (extra
``tpu``) or GPUs (extra ``gpu-aot``), with optax (extra ``train``).  A row has what the compiler
says, and how far the plan is from it; an exclamation mark stands behind what lies beyond the bound.
What cannot be compiled here is left out, and said.  The exit code is 1 where fewer than eight pairs
(or than those that are named) are within all bounds.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BOUNDS = {
    "FLOPs": 0.02, "collectives": 0.05, "arguments": 0.01, "outputs": 0.01, "temporaries": 0.25,
    "peak": 0.15,
}  # fmt: skip
"""How far the plan may be from the compiler."""

LEAST = 8
"""How many pairs must be within all bounds."""

UNITS = {"FLOPs": 1e12}
"""What figures are divided by; those that are not here are bytes, in GB."""


@dataclass(frozen=True)
class Pair:
    """A training step.

    Attributes:
      model: a preset.
      machine: where it is compiled for.
      mesh: the mesh.
      batch_tokens: of a step.
      options: more of ``moecc compile``.
      lengths: of its sequences; None as the model has them.
    """

    model: str
    machine: str
    mesh: str
    batch_tokens: int
    options: tuple[str, ...] = ()
    lengths: tuple[int, ...] | None = None

    @property
    def command(self) -> list[str]:
        """The command line that compiles it."""
        lengths = () if self.lengths is None else ("--sequence", ",".join(map(str, self.lengths)))
        return [
            sys.executable, "-m", "moecc", "compile", f"preset:{self.model}",
            "--machine", self.machine, "--mesh", self.mesh,
            "--batch-tokens", str(self.batch_tokens), *self.options, *lengths, "--format", "json",
        ]  # fmt: skip


def report_of(command: list[str]) -> dict[str, Any]:
    """Return the report of a command line of ``moecc compile``.

    Raises:
      RuntimeError: nothing was compiled; with what the command said last.
    """
    done = subprocess.run(command, capture_output=True, text=True)
    report: dict[str, Any] = json.loads(done.stdout) if done.stdout.startswith("{") else {}
    if not report.get("memory"):
        raise RuntimeError("".join(done.stderr.strip().splitlines()[-1:]))
    return report


PARTS, CHUNKS = ("--micro-batches", "2"), ("--chunks", "2")
SEQUENCE = ("--rules", "fsdp,tensor-parallel,sequence-parallel")
FACTORED = ("--optimizer", "adafactor")
SPLIT = ("--dense-weights", "split")
NONE, SAVE = ("--remat", "none"), ("--remat", "save")

PAIRS = {
    "smollm2": Pair("smollm2-135m", "tpu:v5e:2x4", "data=8", 65536),
    "smollm2-none": Pair("smollm2-135m", "tpu:v5e:2x4", "data=8", 32768, NONE, (2048,)),
    "smollm2-save": Pair("smollm2-135m", "tpu:v5e:2x4", "data=8", 65536, SAVE),
    "llama": Pair("llama-3.1-8b", "tpu:v5p:2x2x4", "fsdp=16", 65536),
    "llama-none": Pair("llama-3.1-8b", "tpu:v5p:2x2x4", "fsdp=16", 65536, NONE),
    "llama-model": Pair("llama-3.1-8b", "tpu:v6e:4x4", "fsdp=4,model=4", 65536),
    "llama-gpu": Pair("llama-3.1-8b", "gpu:h100:8", "fsdp=8", 32768),
    "mixtral": Pair("mixtral-8x7b", "tpu:v5p:4x4x4", "fsdp=8,expert=8", 262144, SPLIT),
    "mixtral-dropless": Pair(
        "mixtral-8x7b", "tpu:v5p:4x4x4", "fsdp=8,expert=8", 262144, (*SPLIT, "--via", "ragged")
    ),
    "mixtral-dropless-16": Pair(
        "mixtral-8x7b", "tpu:v5p:4x4x4", "fsdp=16,expert=4", 262144, (*SPLIT, "--via", "ragged")
    ),
    "mixtral-ring": Pair(
        "mixtral-8x7b", "tpu:v5p:4x4x4", "fsdp=8,expert=8", 262144, (*SPLIT, "--via", "ring")
    ),
    "mixtral-ring-16": Pair(
        "mixtral-8x7b", "tpu:v5p:4x4x4", "fsdp=16,expert=4", 262144, (*SPLIT, "--via", "ring")
    ),
    "mixtral-ring-capacity": Pair(
        "mixtral-8x7b", "tpu:v5p:4x4x4", "fsdp=8,expert=8", 262144,
        (*SPLIT, "--via", "ring", "--capacity-factor", "1.25"),
    ),
    "llama-ring": Pair(
        "llama-3.1-8b", "tpu:v5p:2x4x4", "fsdp=4,expert=8", 131072,
        ("-p", "upcycle{experts=16 top-k=2}", *SPLIT, "--via", "ring"),
    ),
    "llama-dropless": Pair(
        "llama-3.1-8b", "tpu:v5p:2x4x4", "fsdp=4,expert=8", 131072,
        ("-p", "upcycle{experts=16 top-k=2}", *SPLIT, "--via", "ragged"),
    ),
    "mixtral-data": Pair("mixtral-8x7b", "tpu:v5p:4x4x4", "data=8,expert=8", 262144, SPLIT),
    "llama-64": Pair("llama-3.1-8b", "tpu:v5p:4x4x4", "fsdp=64", 262144),
    "mixtral-gpu": Pair("mixtral-8x7b", "gpu:h100:16", "fsdp=2,expert=8", 65536, SPLIT),
    "st-moe-base": Pair("st-moe-base", "tpu:v5p:2x2x2", "data=4,model=2", 40064),
    "st-moe-l": Pair("st-moe-l", "tpu:v4:2x2x2", "data=8,model=2", 40064, (*FACTORED, *SPLIT)),
    "st-moe-32b": Pair(
        "st-moe-32b", "tpu:v4:8x8x8", "data=64,model=16", 1282048, (*FACTORED, *SPLIT)
    ),
    "t5-xxl": Pair("t5-xxl", "tpu:v5p:2x2x4", "fsdp=16", 80128, FACTORED),
    "dense-l": Pair("dense-l", "tpu:v6e:2x4", "data=8", 40064, (*FACTORED, *NONE)),
    "smollm2-gpu-parts": Pair("smollm2-135m", "gpu:h100:8", "data=8", 65536, PARTS, (2048,)),
    "smollm2-gpu-sequence": Pair(
        "smollm2-135m", "gpu:h100:6", "data=2,model=3", 24576,
        ("--rules", "data-parallel,tensor-parallel,sequence-parallel"), (3072,),
    ),
    "smollm2-gpu-chunks": Pair(
        "smollm2-135m", "gpu:h100:8", "expert=8", 65536,
        ("-p", "upcycle{experts=8 top-k=2}", "--via", "capacity", *CHUNKS), (2048,),
    ),
    "llama-parts": Pair("llama-3.1-8b", "tpu:v5p:2x2x4", "fsdp=16", 131072, PARTS),
    "llama-gpu-parts": Pair("llama-3.1-8b", "gpu:h100:8", "fsdp=8", 65536, PARTS),
    "llama-sequence": Pair("llama-3.1-8b", "tpu:v5p:2x2x2", "fsdp=4,model=2", 32768, SEQUENCE),
    "llama-gpu-sequence": Pair("llama-3.1-8b", "gpu:h100:8", "fsdp=4,model=2", 32768, SEQUENCE),
    "mixtral-chunks": Pair(
        "mixtral-8x7b", "tpu:v5p:4x4x4", "fsdp=8,expert=8", 524288, (*SPLIT, *CHUNKS)
    ),
    "mixtral-gpu-chunks": Pair(
        "mixtral-8x7b", "gpu:h100:16", "fsdp=2,expert=8", 131072, (*SPLIT, *CHUNKS)
    ),
}  # fmt: skip


def figures(found: dict[str, Any]) -> tuple[dict[str, float], dict[str, float]]:
    """Return what the compiler says of a report of ``moecc compile``, and what the plan says."""
    memory, plan = found["memory"], found["predicted"]
    compiled = {
        "FLOPs": found["flops"],
        "collectives": sum(row["bytes"] for row in found["collectives"].values()),
        "arguments": memory["arguments_bytes"],
        "outputs": memory["outputs_bytes"],
        "temporaries": memory["temporaries_bytes"],
        "peak": memory["peak_bytes"],
    }
    planned = {
        "FLOPs": plan["flops"],
        "collectives": sum(row["bytes"] for row in plan["collectives"].values()),
        "arguments": plan["arguments_bytes"],
        "outputs": plan["outputs_bytes"],
        "temporaries": plan["temporaries_bytes"],
        "peak": plan["needed_bytes"],
    }
    return compiled, planned


def row_of(pair: Pair, found: dict[str, Any]) -> tuple[str, bool]:
    """Return a row of the table, and whether the plan is within all bounds."""
    cells = [pair.model, pair.machine, pair.mesh, found["optimizer"], found["remat"]]
    compiled, planned = figures(found)
    within = True
    for kind, bound in BOUNDS.items():
        off = planned[kind] / compiled[kind] - 1 if compiled[kind] else 0.0
        within &= abs(off) <= bound
        mark = "" if abs(off) <= bound else " !"
        cells.append(f"{compiled[kind] / UNITS.get(kind, 1e9):.2f} ({off:+.1%}{mark})")
    cells.append(f"{found['seconds']['compile']:.0f} s")
    return f"| {' | '.join(cells)} |", within


def head_of() -> list[str]:
    """Return the names of the columns."""
    figures = ("TFLOPs" if kind in UNITS else f"{kind}, GB" for kind in BOUNDS)
    return ["model", "machine", "mesh", "optimizer", "remat", *figures, "compiled in"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help=f"pairs, of {', '.join(PAIRS)}; all without one")
    parser.add_argument("--out", type=Path, help="where the table goes, too")
    given = parser.parse_args()
    unknown = [name for name in given.names if name not in PAIRS]
    if unknown:
        parser.error(f"unknown pair {unknown[0]!r}; pairs: {', '.join(PAIRS)}")
    head = head_of()
    rows = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    print("\n".join(rows), flush=True)
    good = 0
    for name in given.names or PAIRS:
        try:
            report = report_of(PAIRS[name].command)
        except RuntimeError as error:
            print(f"{name} is left out: {error}", file=sys.stderr, flush=True)
            continue
        row, within = row_of(PAIRS[name], report)
        rows.append(row)
        good += within
        print(row, flush=True)
    if given.out:
        given.out.write_text("\n".join(rows) + "\n")
    wanted = min(LEAST, len(given.names or PAIRS))
    print(f"{good} within all bounds, {wanted} wanted", file=sys.stderr)
    sys.exit(good < wanted)


if __name__ == "__main__":
    main()
