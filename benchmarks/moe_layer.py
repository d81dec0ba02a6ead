"""Speed of a sparse layer on the CPU, against the same products without any routing.

    python benchmarks/moe_layer.py [--format json] [--pairs 9] [--case TOKENS,D,F,EXPERTS,K]
                                   [--dtype float32] [--slow-pairs 1] [--torch-python PATH]

The layer is a graph (router, top-k, sort, dispatch, gated experts, combine) lowered by the xla
backend: `dropless` and under a `capacity` that just drops nothing, as it chooses by itself (on a
CPU `blocks` and `gather`), and in every other dispatch lowering.  The yardstick, `balanced`, is
the same experts as batched einsums over equal numbers of rows that lie ready, without routing.
`products` leaves out its activation too: the bare matrix products.  Forward + backward gives the
result and all gradients, the router's included.

All take turns, and each figure is the median over the rounds of the ratio to the yardstick of the
same round: a busy machine disturbs both (and least the ratio of processor times, in the column
beside it).  Every one does the same useful work, so the ratio of the times is the share of the
yardstick's rate, counted on useful work.  Lowerings that multiply far more than that run few times,
and those that need over 8 GB beside arguments and results are left out.
With `--torch-python`, transformers' implementations and `torch.bmm` on balanced rows take their
turns in another interpreter, while the others wait; without the packages there, it says so.
`--only NAME,…` leaves out other lowerings.  With `--keep-memory` this process keeps the memory that
it has freed, as `moecc train` does; otherwise both take a step's memory from the system anew.

Exit code 1 if a bound does not hold, for the two sizes that are measured by default: dropless 95 %
forward and 85 % forward + backward, under a capacity 80 %.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from time import sleep
from typing import Any, NamedTuple

import jax
from moe_layer_programs import (
    LOWERINGS,
    Case,
    Program,
    check,
    draw,
    least_capacity_factor,
    loads,
    programs,
)
from moecc_backends.xla.program import keep_freed_memory

SCHEMA = 1
BOUNDS = {
    "forward": {"dropless": 95.0, "capacity": 80.0},
    "forward + backward": {"dropless": 85.0, "capacity": 80.0},
}
"""Percent of the yardstick, for the layers of moecc."""

CASES = [Case(2048, 576, 1536, 8, 2), Case(4096, 1024, 2816, 32, 2)]
PAUSE = 0.02
"""Seconds before each turn, for threads that wait for more work of the one before."""

DECODING = Case(4, 576, 1536, 8, 2)
"""One step of four sequences: measured, and bound to nothing."""

SLOW = ("ragged_dot", "gathered")
"""Lowerings that multiply or move more than the work asks for."""

MOST_TEMPORARY_BYTES = 8_000_000_000
"""A lowering is left out where it needs more beside its arguments and results."""


def measure(
    built: dict[str, Program | Beside], pairs: int, slow_pairs: int
) -> dict[str, dict[str, Any]]:
    """Run all in turns, and return seconds and percent of the yardstick by name."""
    seconds: dict[str, list[float]] = {name: [] for name in built}
    processor: dict[str, list[float]] = {name: [] for name in built}
    for turn in range(-1, pairs):
        for name, program in built.items():
            if program.temporary_bytes > MOST_TEMPORARY_BYTES:
                continue
            if name in SLOW and not 0 <= turn < slow_pairs:
                continue
            sleep(PAUSE)
            wall, cpu = program.seconds()
            if turn >= 0:  # the first round warms up
                seconds[name].append(wall)
                processor[name].append(cpu)
    return {
        name: {
            "seconds": median(times),
            "least_seconds": min(times),
            "percent": _percent(seconds["balanced"], times),
            "percent_by_processor_time": _percent(processor["balanced"], processor[name]),
            "pairs": len(times),
            "temporary_bytes": built[name].temporary_bytes,
            "output_bytes": built[name].output_bytes,
        }
        for name, times in seconds.items()
        if times
    }


def _percent(yardstick: list[float], times: list[float]) -> float:
    return 100 * median(y / t for y, t in zip(yardstick, times, strict=False))


def run_case(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """Measure one size forward, and forward and backward."""
    load = loads(case, *draw(case, options.dtype))
    factor = least_capacity_factor(case, load)
    torch = Torch.started(options.torch_python, case) if options.torch_python else None
    report: dict[str, Any] = case._asdict() | {
        "rows_of_an_expert": {"least": min(load), "most": max(load)},
        "capacity_factor": factor,
        "useful_gflop_forward": case.flops / 1e9,
        "torch": torch.ready if torch else None,
        "modes": {},
    }
    for mode in BOUNDS:
        built = programs(case, options.dtype, factor, mode, options.only)
        check(built, options.dtype, MOST_TEMPORARY_BYTES)
        beside = torch.programs(mode != "forward") if torch else {}
        report["modes"][mode] = measure({**built, **beside}, options.pairs, options.slow_pairs)
    if torch:
        torch.end()
    return report


class Torch:
    """Another interpreter that runs one program at a time."""

    def __init__(self, process: subprocess.Popen[str], ready: dict[str, Any]) -> None:
        self.ready = ready
        self._process = process

    @classmethod
    def started(cls, python: str, case: Case) -> Torch:
        """Start it; `ready` says why where that is not possible."""
        command = [python, str(Path(__file__).with_name("moe_layer_torch.py")), *map(str, case)]
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
        assert process.stdout is not None
        line = process.stdout.readline()
        if line:
            return cls(process, json.loads(line))
        why = process.communicate()[1].strip().splitlines() or ["no message"]
        return cls(process, {"skipped": why[-1], "programs": []})

    def programs(self, gradients: bool) -> dict[str, Beside]:
        """Return what it has."""
        return {name: Beside(self, name, gradients) for name in self.ready["programs"]}

    def seconds(self, name: str, gradients: bool) -> tuple[float, float]:
        """Run one; return seconds by the clock and of processors."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps([name, gradients]), file=self._process.stdin, flush=True)
        wall, cpu = json.loads(self._process.stdout.readline())
        return wall, cpu

    def end(self) -> None:
        """End it."""
        self._process.communicate()


class Beside(NamedTuple):
    """A program of another interpreter."""

    torch: Torch
    name: str
    gradients: bool
    temporary_bytes: int = 0
    output_bytes: int = 0

    def seconds(self) -> tuple[float, float]:
        """Run it; return seconds by the clock and of processors."""
        return self.torch.seconds(self.name, self.gradients)


def broken_bounds(report: dict[str, Any]) -> list[str]:
    """Return the bounds that do not hold; they are for the sizes of `CASES` in float32."""
    judged = report["cases"] if report["dtype"] == "float32" else []
    return [
        f"{size} {name} {mode}: {found:.1f} %, bound {bound} %"
        for case in judged
        if (size := tuple(case[f] for f in Case._fields)) in CASES
        for mode, bounds in BOUNDS.items()
        for name, bound in bounds.items()
        if name in case["modes"][mode] and (found := case["modes"][mode][name]["percent"]) < bound
    ]


def show(report: dict[str, Any]) -> None:
    """Print the report as tables."""
    print(f"jax {report['jax']}, {report['processors']} processors, {report['dtype']}")
    for case in report["cases"]:
        rows = case["rows_of_an_expert"]
        print(
            f"\n{case['tokens']} tokens, {case['embed']} → {case['mlp']}, top {case['top_k']} of"
            f" {case['experts']} experts: {rows['least']}–{rows['most']} rows an expert,"
            f" capacity factor {case['capacity_factor']}"
        )
        for mode in BOUNDS:
            work = case["useful_gflop_forward"] * (1 if mode == "forward" else 3)
            _show_mode(mode, case["modes"][mode], work)
        if case["torch"]:
            print("  " + ", ".join(f"{k} {v}" for k, v in case["torch"].items() if k != "programs"))
    load = report["load_average"]
    print(f"\nload average {load['before']:.1f} before, {load['after']:.1f} after")
    for line in report["bounds_broken"]:
        print(f"BOUND BROKEN: {line}")


def _show_mode(mode: str, rows: dict[str, Any], gflop: float) -> None:
    columns = f"{'ms':>9}{'least':>9}{'GFLOP/s':>9}{'%':>7}{'% cpu':>7}{'temp MB':>9}{'pairs':>7}"
    print(f"  {mode:<32}{columns}")
    for name, row in rows.items():
        temporary = row["temporary_bytes"] or None
        print(
            f"    {name:<30}{row['seconds'] * 1e3:9.1f}{row['least_seconds'] * 1e3:9.1f}"
            f"{gflop / row['seconds']:9.0f}"
            f"{row['percent']:7.1f}{row['percent_by_processor_time']:7.1f}"
            f"{'' if temporary is None else f'{temporary / 1e6:.0f}':>9}{row['pairs']:7}"
        )
    if "dropless" in rows:
        left_out = [name for name in LOWERINGS if name not in rows]
        if left_out:
            print(f"    left out: {', '.join(left_out)}")


def parse_case(text: str) -> Case:
    """Read ``tokens,d,f,experts,k``."""
    case = Case(*map(int, text.split(",")))
    if case.rows % case.experts:
        raise argparse.ArgumentTypeError("experts must divide tokens · k, for the yardstick")
    return case


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", type=parse_case, action="append", metavar="TOKENS,D,F,EXPERTS,K")
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--slow-pairs", type=int, default=1)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--torch-python", metavar="PATH")
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(LOWERINGS))
    parser.add_argument("--keep-memory", action="store_true")
    parser.add_argument("--format", choices=("human", "json"), default="human")
    options = parser.parse_args()
    if options.keep_memory:
        keep_freed_memory()
    before = os.getloadavg()[0]
    report: dict[str, Any] = {
        "schema": SCHEMA,
        "jax": jax.__version__,
        "processors": os.cpu_count(),
        "dtype": options.dtype,
        "cases": [run_case(case, options) for case in options.case or [*CASES, DECODING]],
    }
    report["load_average"] = {"before": before, "after": os.getloadavg()[0]}
    report["bounds_broken"] = broken = broken_bounds(report)
    if options.format == "json":
        print(json.dumps(report, indent=2))
    else:
        show(report)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
