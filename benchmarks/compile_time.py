"""What it costs to compile a model of 4, 16 and 64 layers, rolled and written out.

    python benchmarks/compile_time.py [--format json] [--layers 4 16 64] [--step forward|train]
                                      [--repeat 3]

The model is a small llama with a mixture of experts in every second layer, made by the passes
``upcycle`` and ``roll-layers``.  Compiling does not depend on the sizes of the axes, so these are
small.  A step is the forward pass, or with ``train`` the gradient of a loss, under full
rematerialisation where the layers are rolled.  All programs are compiled in one process, in turn;
each figure is the median of the repetitions.  Processor time of all threads is measured, which a
busy machine disturbs less than the clock.

Exit code 1 if the bound does not hold: the most over the least of the rolled figures, 1.3.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
from collections.abc import Callable, Sequence
from time import process_time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from moecc_backends.xla.backend import function

from moecc.families import build
from moecc.families.registry import parse_config
from moecc.ir import Graph
from moecc.presets import preset_config
from moecc.rewrite.pipeline import Pipeline
from moecc.rewrite.runner import run_pipeline

SCHEMA = 1

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
}

FORMS = {"written out": "", "rolled": ",roll-layers", "rolled, train": ",roll-layers{remat=full}"}

BOUND = 1.3
"""The most over the least of the seconds of rolled layers, over the numbers of layers."""


def make_graph(layers: int, form: str) -> Graph:
    """Return the model with `layers` layers, as `form` says."""
    graph = build(
        parse_config({**preset_config("smollm2-135m"), **SMALL, "num_hidden_layers": layers})
    )
    run_pipeline(graph, Pipeline.parse(f"upcycle{{experts=8 layers=every:2}}{FORMS[form]}"))
    return graph


def step_of(graph: Graph, step: str) -> Callable[..., Any]:
    """Return the function that is compiled: outputs, or the gradient of a loss."""
    forward = function(graph)

    def loss(params: Any, inputs: Any) -> Any:
        return jnp.mean(jnp.square(forward(params, inputs)["logits"]))

    return jax.grad(loss) if step == "train" else forward


def measure(graph: Graph, step: str) -> dict[str, float]:
    """Return the processor seconds of tracing and lowering, and of compiling."""
    shape = jax.ShapeDtypeStruct
    params = {n: shape(v.type.shape, np.float32) for n, v in graph.params.items()}
    inputs = {"tokens": shape((2, 32), np.int32)}
    start = process_time()
    lowered = jax.jit(step_of(graph, step)).lower(params, inputs)
    middle = process_time()
    lowered.compile()
    end = process_time()
    return {"lower": middle - start, "compile": end - middle}


def run(layers: Sequence[int], step: str, repeat: int) -> dict[str, Any]:
    """Return seconds by form and number of layers: medians of interleaved repetitions."""
    rolled = "rolled, train" if step == "train" else "rolled"
    cases = [(form, n) for n in layers for form in ("written out", rolled)]
    graphs = {case: make_graph(case[1], case[0]) for case in cases}
    measure(graphs[cases[0]], step)  # the first use of anything pays for caches
    samples: dict[tuple[str, int], list[dict[str, float]]] = {case: [] for case in cases}
    for _ in range(repeat):
        for case in cases:
            jax.clear_caches()
            samples[case].append(measure(graphs[case], step))
    found: dict[str, dict[str, dict[str, float]]] = {"written out": {}, "rolled": {}}
    for (form, count), some in samples.items():
        medians = {key: statistics.median(s[key] for s in some) for key in some[0]}
        row = {**medians, "total": sum(medians.values())}
        found[form.split(",")[0]][str(count)] = row
    return {
        "schema": SCHEMA,
        "python": platform.python_version(),
        "jax": jax.__version__,
        "platform": jax.default_backend(),
        "step": step,
        "repeat": repeat,
        "seconds": found,
    }


def judge(report: dict[str, Any]) -> list[str]:
    """Add how figures grow with the number of layers, and return the bounds that do not hold."""
    totals = {f: [r["total"] for r in rows.values()] for f, rows in report["seconds"].items()}
    report["growth"] = {form: max(t) / min(t) for form, t in totals.items()}
    growth = report["growth"]["rolled"]
    broken = [f"rolled: grows {growth:.2f} times, allowed {BOUND}"] if growth > BOUND else []
    report["bounds_broken"] = broken
    return broken


def show(report: dict[str, Any]) -> None:
    """Print the report as a table."""
    print(
        f"processor seconds, {report['step']}; median of {report['repeat']}; "
        f"jax {report['jax']}, {report['platform']}"
    )
    print(f"{'layers':>8}{'form':>14}{'lower':>10}{'compile':>10}{'total':>10}")
    for form, rows in report["seconds"].items():
        for count, row in rows.items():
            figures = "".join(f"{row[key]:10.2f}" for key in ("lower", "compile", "total"))
            print(f"{count:>8}{form:>14}{figures}")
    for form, growth in report["growth"].items():
        print(f"{form} grows {growth:.2f} times")
    for line in report["bounds_broken"]:
        print(f"BOUND BROKEN: {line}")


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--step", choices=("forward", "train"), default="forward")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--format", choices=("human", "json"), default="human")
    options = parser.parse_args()
    report = run(options.layers, options.step, options.repeat)
    broken = judge(report)
    if options.format == "json":
        print(json.dumps(report, indent=2))
    else:
        show(report)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
