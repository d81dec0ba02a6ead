"""Speed of a sparse layer on the CPU, against the same products without any routing.

    python benchmarks/moe_layer.py [--format json] [--pairs 9] [--case TOKENS,D,F,EXPERTS,K]
                                   [--dtype float32] [--slow-pairs 1] [--torch-python PATH]

The layer is a graph (router, top-k, sort, dispatch, gated experts, combine) lowered by the xla
backend: `dropless` and under a `capacity` that just drops nothing, as it chooses by itself (on a
CPU `blocks` and `gather`), and in every other dispatch lowering.  The yardstick, `balanced`, is
the same experts as batched einsums over equal numbers of rows that lie ready, without routing.
`products` leaves out its activation too: the bare matrix products.  Forward + backward gives the
result and all gradients, the router's included.

All take turns in one process, and each figure is the median over the rounds of the ratio to the
yardstick of the same round: a busy machine disturbs both (and least the ratio of processor times,
in the column beside it).  Every one does the same useful work, so the ratio of the times is the
share of the yardstick's rate, counted on useful work.  Lowerings that multiply far more than that
run few times, and those that need over 8 GB beside arguments and results are left out.
With `--torch-python`, another interpreter runs transformers' implementations beside a yardstick of
its own, `torch.bmm` on balanced rows; without the packages there, it says so.

Exit code 1 if a bound does not hold, for the two sizes that are measured by default: dropless 95 %
forward and 85 % forward + backward, under a capacity 80 %; or if einsum, which is never chosen, is
faster than gather.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any

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

SCHEMA = 1
BOUNDS = {
    "forward": {"dropless": 95.0, "capacity": 80.0},
    "forward + backward": {"dropless": 85.0, "capacity": 80.0},
}
"""Percent of the yardstick, for the layers of moecc."""

CASES = [Case(2048, 576, 1536, 8, 2), Case(4096, 1024, 2816, 32, 2)]
DECODING = Case(4, 576, 1536, 8, 2)
"""One step of four sequences: measured, and bound to nothing."""

SLOW = ("einsum", "scan", "ragged_dot", "gathered")
"""Lowerings that multiply or move more than the work asks for."""

MOST_TEMPORARY_BYTES = 8_000_000_000
"""A lowering is left out where it needs more beside its arguments and results."""


def measure(built: dict[str, Program], pairs: int, slow_pairs: int) -> dict[str, dict[str, Any]]:
    """Run all in turns, and return seconds and percent of the yardstick by name."""
    seconds: dict[str, list[float]] = {name: [] for name in built}
    processor: dict[str, list[float]] = {name: [] for name in built}
    for turn in range(-1, pairs):
        for name, program in built.items():
            if program.temporary_bytes > MOST_TEMPORARY_BYTES:
                continue
            if name in SLOW and not 0 <= turn < slow_pairs:
                continue
            wall, cpu = perf_counter(), process_time()
            jax.block_until_ready(program.call())
            if turn >= 0:  # the first round warms up
                seconds[name].append(perf_counter() - wall)
                processor[name].append(process_time() - cpu)
    return {
        name: {
            "seconds": median(times),
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
    report: dict[str, Any] = case._asdict() | {
        "rows_of_an_expert": {"least": min(load), "most": max(load)},
        "capacity_factor": factor,
        "useful_gflop_forward": case.flops / 1e9,
        "modes": {},
    }
    for mode in BOUNDS:
        built = programs(case, options.dtype, factor, mode)
        check(built, options.dtype, MOST_TEMPORARY_BYTES)
        report["modes"][mode] = measure(built, options.pairs, options.slow_pairs)
    if options.torch_python:
        report["torch"] = run_torch(options, case)
    return report


def run_torch(options: argparse.Namespace, case: Case) -> dict[str, Any]:
    """Measure transformers' layers in another interpreter; say why where that is not possible."""
    script = Path(__file__).with_name("moe_layer_torch.py")
    command = [options.torch_python, str(script), *map(str, case), str(options.pairs)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"skipped": (done.stderr.strip().splitlines() or ["no message"])[-1]}
    return dict(json.loads(done.stdout))


def broken_bounds(report: dict[str, Any]) -> list[str]:
    """Return the bounds that do not hold; they are for the sizes of `CASES` in float32."""
    judged = report["cases"] if report["dtype"] == "float32" else []
    return _slower_than_einsum(report) + [
        f"{size} {name} {mode}: {found:.1f} %, bound {bound} %"
        for case in judged
        if (size := tuple(case[f] for f in Case._fields)) in CASES
        for mode, bounds in BOUNDS.items()
        for name, bound in bounds.items()
        if (found := case["modes"][mode][name]["percent"]) < bound
    ]


def _slower_than_einsum(report: dict[str, Any]) -> list[str]:
    """Return where one-hot products beat gathers, which are always chosen."""
    return [
        f"{tuple(case[f] for f in Case._fields)} {mode}: einsum is faster than gather"
        for case in report["cases"]
        for mode, rows in case["modes"].items()
        if "einsum" in rows and rows["einsum"]["seconds"] < rows["capacity"]["seconds"]
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
            if "modes" in case.get("torch", {}):
                _show_mode(
                    f"{mode}, torch {case['torch']['torch']}", case["torch"]["modes"][mode], work
                )
        if "skipped" in case.get("torch", {}):
            print(f"  torch: {case['torch']['skipped']}")
    load = report["load_average"]
    print(f"\nload average {load['before']:.1f} before, {load['after']:.1f} after")
    for line in report["bounds_broken"]:
        print(f"BOUND BROKEN: {line}")


def _show_mode(mode: str, rows: dict[str, Any], gflop: float) -> None:
    print(f"  {mode:<32}{'ms':>9}{'GFLOP/s':>9}{'%':>7}{'% cpu':>7}{'temp MB':>9}{'pairs':>7}")
    for name, row in rows.items():
        temporary = row.get("temporary_bytes")
        print(
            f"    {name:<30}{row['seconds'] * 1e3:9.1f}{gflop / row['seconds']:9.0f}"
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
    parser.add_argument("--format", choices=("human", "json"), default="human")
    options = parser.parse_args()
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
