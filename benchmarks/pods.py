"""Mixtral-8x7B's training step on pods: what it moves and needs, beside MaxText's.

    python benchmarks/pods.py [NAME…] [--out FILE.md]

Each program is compiled ahead of time by ``moecc compile``, for TPUs (extra ``tpu``) or GPUs (extra
``gpu-aot``), with optax (extra ``train``).  Bytes are those of full tensors, as often as loops run,
of one device.  Behind a program stand the figures of MaxText's that it must stay below, in bytes
moved and in peak memory; an exclamation mark stands behind what does not.  The exit code is 1 where
a bound is missed, or a program that has one could not be compiled.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Figures:
    """What is known of a program.

    Attributes:
      collectives: by kind, runs in a step and bytes of full tensors; runs are 0 where unknown.
      temporaries_bytes: 0 where unknown.
      peak_bytes: of a device.
      compile_seconds: 0 where unknown.
      host_bytes: the most memory of the process that compiled; 0 where unknown.
    """

    collectives: dict[str, tuple[int, float]]
    temporaries_bytes: float
    peak_bytes: float
    compile_seconds: float
    host_bytes: float = 0.0

    @property
    def moved_bytes(self) -> float:
        """The bytes of all collectives."""
        return sum(size for _, size in self.collectives.values())


MAXTEXT = {
    "capacity": Figures(
        {"all-gather": (384, 203e9), "reduce-scatter": (192, 102e9), "all-reduce": (0, 12e9)},
        10.2e9, 18.8e9, 43,
    ),
    "capacity, all-to-all": Figures({"all kinds": (0, 379e9)}, 0, 25.7e9, 0),
    "dropless": Figures(
        {"gathers and sums": (0, 45e9), "ragged-all-to-all": (0, 52e9)}, 0, 19.3e9, 62
    ),
}  # fmt: skip
"""MaxText 0.2.5, Mixtral-8x7B for v5p 4x4x4: FSDP 8 × expert 8, sequences of 4,096, one a device,
bf16, float32 weights and AdamW, full rematerialisation, scanned layers.  Capacity 1.25 by default,
and with its all-to-all flag; dropless by megablox with the worst-case buffer.  Compiled ahead of
time on 2 cores, x86-64, and counted in the same way."""


@dataclass(frozen=True)
class Program:
    """A training step of Mixtral-8x7B.

    Attributes:
      machine: where it is compiled for.
      mesh: the mesh.
      batch_tokens: of a step.
      options: more of ``moecc compile``.
      rivals: of `MAXTEXT`, what it must stay below.
    """

    machine: str
    mesh: str
    batch_tokens: int
    options: tuple[str, ...]
    rivals: tuple[str, ...] = ()

    @property
    def command(self) -> list[str]:
        """The command line that compiles it."""
        return [
            sys.executable, "-m", "moecc", "compile", "preset:mixtral-8x7b",
            "--machine", self.machine, "--mesh", self.mesh,
            "--batch-tokens", str(self.batch_tokens), "--sequence", "4096",
            "--dense-weights", "split", "--remat", "full", *self.options, "--format", "json",
        ]  # fmt: skip


V5P = ("tpu:v5p:4x4x4", "fsdp=8,expert=8", 262144)
H100 = ("gpu:h100:8", "data=8", 32768)
FACTORED = ("--optimizer", "adafactor")
CAPACITY = ("--capacity-factor", "1.25")

PROGRAMS = {
    "capacity": Program(
        *V5P, ("--via", "capacity", *CAPACITY), ("capacity", "capacity, all-to-all")
    ),
    "dropless": Program(*V5P, ("--via", "ragged"), ("dropless",)),
    "dropless, ring": Program(*V5P, ("--via", "ring")),
    "capacity, GSPMD": Program(*V5P, ("--partition", "gspmd", *CAPACITY)),
    "capacity, 8 × H100": Program(*H100, ("--via", "capacity", *FACTORED, *CAPACITY)),
}  # fmt: skip


def figures(report: dict[str, Any]) -> Figures:
    """Return what a report of ``moecc compile`` says."""
    memory = report["memory"]
    return Figures(
        {kind: (row["runs"], row["bytes"]) for kind, row in report["collectives"].items()},
        memory["temporaries_bytes"],
        memory["peak_bytes"],
        report["seconds"]["compile"],
        report["host_peak_bytes"],
    )


def row_of(name: str, found: Figures, beside: Figures | None = None) -> tuple[str, bool]:
    """Return a row of the table, and whether all is below the figures `beside`."""
    parts = (
        f"{kind} {_gigabytes(size)}{f' in {runs} runs' if runs else ''}"
        for kind, (runs, size) in found.collectives.items()
        if size >= 0.005e9
    )
    moved, peak = found.moved_bytes, found.peak_bytes
    bounds = (None, None) if beside is None else (beside.moved_bytes, beside.peak_bytes)
    pairs = list(zip((moved, peak), bounds, strict=True))
    cells = [
        name, ", ".join(parts), _against(*pairs[0]), _gigabytes(found.temporaries_bytes),
        _against(*pairs[1]), f"{found.compile_seconds:.0f} s" if found.compile_seconds else "",
        _gigabytes(found.host_bytes),
    ]  # fmt: skip
    below = all(bound is None or value < bound for value, bound in pairs)
    return f"| {' | '.join(cells)} |", below


def _against(value: float, bound: float | None) -> str:
    if bound is None:
        return _gigabytes(value)
    mark = "" if value < bound else " !"
    return f"{_gigabytes(value)} ({value / bound:.2f}{mark})"


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.2f}" if size else ""


HEAD = [
    "program", "collectives, GB", "moved, GB", "temporaries, GB", "peak, GB",
    "compiled in", "host memory, GB",
]  # fmt: skip


def rows_of(name: str, program: Program) -> tuple[list[str], bool]:
    """Compile `program`; return its row and those beside it, and whether it is below these."""
    done = subprocess.run(program.command, capture_output=True, text=True)
    report = json.loads(done.stdout) if done.stdout.startswith("{") else {}
    if not report.get("memory"):
        last = done.stderr.strip().splitlines()[-1:]
        print(f"{name} is left out: {''.join(last)}", file=sys.stderr, flush=True)
        return [], not program.rivals
    found = figures(report)
    if not program.rivals:
        return [row_of(name, found)[0]], True
    made = [row_of(name, found, MAXTEXT[rival]) for rival in program.rivals]
    rows = [made[0][0], *(row_of(f"MaxText, {r}", MAXTEXT[r])[0] for r in program.rivals)]
    return rows, all(below for _, below in made)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    known = "; ".join(PROGRAMS)
    parser.add_argument("names", nargs="*", help=f"programs, of {known}; all without one")
    parser.add_argument("--out", type=Path, help="where the table goes, too")
    given = parser.parse_args()
    unknown = [name for name in given.names if name not in PROGRAMS]
    if unknown:
        parser.error(f"unknown program {unknown[0]!r}; programs: {known}")
    table = [f"| {' | '.join(HEAD)} |", f"|{'---|' * len(HEAD)}"]
    print("\n".join(table), flush=True)
    good = True
    for name in given.names or PROGRAMS:
        rows, below = rows_of(name, PROGRAMS[name])
        table += rows
        good &= below
        print("\n".join(rows), flush=True)
    if given.out:
        given.out.write_text("\n".join(table) + "\n")
    sys.exit(not good)


if __name__ == "__main__":
    main()
