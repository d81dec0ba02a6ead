"""Time per node of parsing, verifying, matching, rewriting and printing, and how it grows.

    python benchmarks/passes.py [--format json] [--nodes 1000 10000 50000] [--repeat 5]

The graph is a chain of feed-forward blocks in which one node in eight can be rewritten.  All sizes
run in one process, in turn; each figure is the median of the repetitions.  The cyclic garbage
collector is on, as a caller has it, and a full collection runs before each measurement, so that
none pays for what another left; `parse` and `rewrite` pause it while they work.  Everything runs in
one thread, so processor time is measured, which a busy machine disturbs less; a small graph is
measured several times over for one figure.

Exit code 1 if a bound does not hold: match and rewrite 20 µs a node, everything 100 µs, and the
time per node within a factor of 1.5 between the sizes.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import sys
from collections.abc import Callable
from time import process_time
from typing import Any, TypeVar

from moecc_passes.cleanup import RULES

from moecc.ir import F32, Builder, Graph, Value, clone, parse, print_graph, tensor, verify
from moecc.rewrite import Misses, find, rewrite

SCHEMA = 1
STAGES = ("parse", "verify", "match", "rewrite", "print")
BLOCK = 16
"""Nodes of one block of the graph."""

COLLECTOR = "on; a full collection before each measurement; parse and rewrite pause it"

BOUNDS = {"match + rewrite": 20.0, "everything": 100.0}
"""Microseconds a node, at every size."""

GROWTH = 1.5
"""The largest time per node over the smallest, for every stage."""

LEAST_NODES = 10_000
"""The nodes that one figure is measured over, at least."""

T = TypeVar("T")


def make_graph(nodes: int) -> Graph:
    """Return a graph of `nodes` nodes in blocks of 16, with two rewrites to make in each."""
    graph = Graph("chain")
    x = graph.input("x", tensor(F32, batch="B", seq="S", embed=64))
    builder = Builder(graph)
    for layer in range(nodes // BLOCK):
        with builder.at(f"layers.{layer}.ffn"):
            x = _block(graph, builder, layer, x)
    while len(graph) < nodes:
        x = builder.silu(x)
    graph.set_output("y", x)
    return graph


def _block(graph: Graph, b: Builder, layer: int, x: Value) -> Value:
    gate, up = (
        graph.param(f"layers.{layer}.{name}", tensor(F32, mlp=96, embed=64))
        for name in ("gate", "up")
    )
    down = graph.param(f"layers.{layer}.down", tensor(F32, embed=64, mlp=96))
    norm = graph.param(f"layers.{layer}.norm", tensor(F32, embed=64))
    n = b.rms_norm(x, norm, axis="embed", eps=1e-5)
    a = b.contract(n, gate, over="embed")
    u = b.contract(n, up, over="embed")
    h = b.mul(b.silu(a), u)
    h = b.neg(b.neg(h))
    y = b.contract(h, down, over="mlp")
    y = b.scale(b.scale(y, by=2.0), by=0.25)
    cut = b.split(y, axis="embed", into=(("head", 8), ("head_dim", 8)))
    cut = b.tanh(b.square(cut))
    y = b.merge(cut, axes=("head", "head_dim"), into="embed")
    y = b.stop_gradient(y)
    value: Value = b.add(x, y)
    return value


def _match(graph: Graph) -> int:
    return sum(1 for _ in find(graph, *RULES, misses=Misses()))


def _measure(graph: Graph) -> dict[str, float]:
    """Return the seconds of each stage on a fresh copy of `graph`."""
    text = print_graph(graph)
    parsed, parse_seconds = _timed(lambda: parse(text))
    _, verify_seconds = _timed(lambda: verify(parsed))
    _, match_seconds = _timed(lambda: _match(parsed))
    copy = clone(parsed)
    done, rewrite_seconds = _timed(lambda: rewrite(copy, RULES, origin="benchmark"))
    assert done.rewrites == 2 * (len(graph) // BLOCK)
    _, print_seconds = _timed(lambda: print_graph(parsed))
    seconds = (parse_seconds, verify_seconds, match_seconds, rewrite_seconds, print_seconds)
    return dict(zip(STAGES, seconds, strict=True))


def _timed(action: Callable[[], T]) -> tuple[T, float]:
    gc.collect()
    start = process_time()
    result = action()
    return result, process_time() - start


def run(sizes: list[int], repeat: int) -> dict[str, Any]:
    """Return microseconds a node by size and stage: medians of interleaved repetitions."""
    graphs = {n: make_graph(n) for n in sizes}
    _measure(graphs[min(sizes)])  # the first use of anything pays for caches
    samples: dict[int, list[dict[str, float]]] = {n: [] for n in sizes}
    for _ in range(repeat):
        for nodes, graph in graphs.items():
            samples[nodes].append(_averaged(graph, max(1, LEAST_NODES // nodes)))
    return {
        "schema": SCHEMA,
        "python": platform.python_version(),
        "collector": COLLECTOR,
        "repeat": repeat,
        "microseconds_per_node": {str(n): _medians(s, n) for n, s in samples.items()},
    }


def _averaged(graph: Graph, times: int) -> dict[str, float]:
    several = [_measure(graph) for _ in range(times)]
    return {stage: sum(one[stage] for one in several) / times for stage in STAGES}


def _medians(samples: list[dict[str, float]], nodes: int) -> dict[str, float]:
    sums = [
        {
            **sample,
            "match + rewrite": sample["match"] + sample["rewrite"],
            "everything": sum(sample.values()),
        }
        for sample in samples
    ]
    return {key: statistics.median(s[key] for s in sums) / nodes * 1e6 for key in sums[0]}


def judge(report: dict[str, Any]) -> list[str]:
    """Add the growth of each figure to `report`, and return the bounds that do not hold."""
    rows = report["microseconds_per_node"].values()
    keys = (*STAGES, "match + rewrite", "everything")
    report["growth"] = {k: max(r[k] for r in rows) / min(r[k] for r in rows) for k in keys}
    broken = [
        f"{key}: {max(r[key] for r in rows):.1f} µs a node, allowed {bound}"
        for key, bound in BOUNDS.items()
        if max(r[key] for r in rows) > bound
    ]
    broken += [
        f"{key}: grows {factor:.2f} times, allowed {GROWTH}"
        for key, factor in report["growth"].items()
        if factor > GROWTH
    ]
    report["bounds_broken"] = broken
    return broken


def show(report: dict[str, Any]) -> None:
    """Print the report as a table."""
    keys = (*STAGES, "match + rewrite", "everything")
    print(f"µs a node; median of {report['repeat']}; collector {report['collector']}")
    print("".join(["   nodes", *(f"{k:>17}" for k in keys)]))
    for nodes, row in report["microseconds_per_node"].items():
        print("".join([f"{nodes:>8}", *(f"{row[k]:17.2f}" for k in keys)]))
    print("".join(["  growth", *(f"{report['growth'][k]:17.2f}" for k in keys)]))
    for line in report["bounds_broken"]:
        print(f"BOUND BROKEN: {line}")


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nodes", type=int, nargs="+", default=[1000, 10000, 50000])
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--format", choices=("human", "json"), default="human")
    options = parser.parse_args()
    report = run(options.nodes, options.repeat)
    broken = judge(report)
    if options.format == "json":
        print(json.dumps(report, indent=2))
    else:
        show(report)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
