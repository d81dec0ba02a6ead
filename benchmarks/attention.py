"""Attention as one operation beside its parts: processor time in pairs, and peak temporaries.

    python benchmarks/attention.py [--pairs N] [--seq N] [--memory N,N]

Nine query heads over three key heads of 64, causal, float32, one text.  Times are processor time
of one call, as medians of interleaved pairs, with the first and third quartile of the ratio of each
pair.  Memory is the temporaries of the compiled program.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from moecc_backends.xla.backend import function

from moecc.ir import F32, Builder, Graph, clone, tensor
from moecc.train.graphs import run_passes

HEADS, GROUPS, WIDTH = 3, 3, 64
Call = Callable[[dict[str, jax.Array]], object]


def parts() -> Graph:
    """Return causal attention with grouped heads, as the operations that it is made of."""
    g = Graph()
    b = Builder(g, loc="layers.0.attention")
    heads = {"kv_head": HEADS}
    q = g.input("q", tensor(F32, batch="B", seq="S", **heads, query_group=GROUPS, head_dim=WIDTH))
    k = g.input("k", tensor(F32, batch="B", kv_seq="S", **heads, head_dim=WIDTH))
    v = g.input("v", tensor(F32, batch="B", kv_seq="S", **heads, head_dim=WIDTH))
    scores = b.scale(b.contract(q, k, over="head_dim"), by=WIDTH**-0.5)
    positions = b.positions(q, axis="seq")
    keys = b.positions(k, axis="kv_seq")
    weights = b.softmax(b.mask(scores, b.causal(positions, keys)), axis="kv_seq")
    g.set_output("y", b.contract(weights, v, over="kv_seq"))
    return g


def programs(graph: Graph) -> dict[str, Call]:
    """Return the forward pass, and the gradient of a sum in all operands."""
    run = function(graph)

    def total(inputs: dict[str, jax.Array]) -> jax.Array:
        return jnp.sum(jnp.sin(run({}, inputs)["y"]))

    return {"forward": lambda i: run({}, i)["y"], "gradient": jax.value_and_grad(total)}


def shapes(seq: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the operands."""
    return {
        "q": (1, seq, HEADS, GROUPS, WIDTH),
        "k": (1, seq, HEADS, WIDTH),
        "v": (1, seq, HEADS, WIDTH),
    }


def milliseconds(call: Call, inputs: dict[str, jax.Array]) -> float:
    """Return the processor time of a call."""
    start = time.process_time()
    jax.block_until_ready(call(inputs))
    return 1e3 * (time.process_time() - start)


def compare(before: Call, after: Call, seq: int, pairs: int) -> str:
    """Return the times of two programs, and how much quicker the second is."""
    rng = np.random.default_rng(0)
    inputs = {n: jnp.asarray(rng.normal(size=s), jnp.float32) for n, s in shapes(seq).items()}
    both = [jax.jit(before), jax.jit(after)]
    for call in both:
        milliseconds(call, inputs)
    found = [[milliseconds(call, inputs) for call in both] for _ in range(pairs)]
    first, second = (statistics.median(times) for times in zip(*found, strict=True))
    ratios = statistics.quantiles([a / b for a, b in found], n=4)
    return f"{first:8.1f} {second:8.1f}   {ratios[1]:.2f} ({ratios[0]:.2f} to {ratios[2]:.2f})"


def megabytes(call: Call, seq: int) -> float:
    """Return the temporaries of a compiled program."""
    given = {n: jax.ShapeDtypeStruct(s, jnp.float32) for n, s in shapes(seq).items()}
    analysis = jax.jit(call).lower(given).compile().memory_analysis()
    return float(analysis.temp_size_in_bytes) / 1e6


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--seq", type=int, default=1024)
    parser.add_argument("--memory", default="4096,32768")
    asked = parser.parse_args()
    graph = parts()
    fused = clone(graph)
    run_passes(fused, "fuse-attention")
    before, after = programs(graph), programs(fused)
    print(f"{asked.seq} tokens, processor ms: parts, one operation, times as quick")
    for name in before:
        print(f"  {name:9}{compare(before[name], after[name], asked.seq, asked.pairs)}")
    print("temporaries in MB: parts, one operation")
    for seq in (int(s) for s in asked.memory.split(",") if s):
        for name in before:
            sizes = (megabytes(p[name], seq) for p in (before, after))
            print(f"  {seq:6} {name:9}" + " ".join(f"{size:10.1f}" for size in sizes))


if __name__ == "__main__":
    main()
