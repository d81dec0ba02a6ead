"""Compile a small sparse model, its collectives in the graph, and print what is in the programs.

Run as a script, with the name of a machine of eight devices and the programs, ``ring train full``.
Every layer is sparse, and layers are rolled.  Sizes differ, so that a shape tells what it is of.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from typing import Any

from moecc_backends.xla.aot.topology import devices, prepare

from moecc.plan.machines import parse_machine

LAYERS, EXPERTS, EMBED, MLP, BATCH, SEQ = 3, 8, 128, 400, 16, 32
CONFIG = {
    "hidden_size": EMBED, "intermediate_size": MLP, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 640,
}  # fmt: skip


def laid(via: str, remat: str) -> Any:
    """Return the graph on its mesh, experts on the rows of data."""
    from moecc.families import build
    from moecc.families.configs import parse_config
    from moecc.pipeline.registry import installed
    from moecc.pipeline.runner import run_pipeline
    from moecc.pipeline.text import Pipeline
    from moecc.presets import preset_config

    graph = build(parse_config({**preset_config("mixtral-8x7b"), **CONFIG}))
    passes = (
        "specialize{mode=train capacity-factor=1.25 groups=8},add-losses{metrics=false},cse,"
        f"annotate-sharding{{mesh=data:8 rules=st-moe}},expert-parallel{{via={via}}},"
        f"lower-collectives,cse,roll-layers{{remat={remat}}}"
    )
    run_pipeline(graph, Pipeline.parse(passes, installed()))
    return graph


def program(graph: Any, step: str, machine: Any) -> str:
    """Return the HLO of the forward pass of `graph`, or of the gradients of its losses."""
    import jax
    import numpy as np
    from jax.sharding import NamedSharding, PartitionSpec
    from moecc_backends.xla.aot.program import compile_ahead
    from moecc_backends.xla.sharded import sharded_function, spec
    from moecc_backends.xla.training import AUXILIARY, cross_entropy

    from moecc.ir.dtypes import BF16

    mesh = jax.sharding.Mesh(np.array(devices(machine)), ("data",))
    run = sharded_function(graph, mesh, dtype=BF16)
    params = {
        n: jax.ShapeDtypeStruct(
            v.type.shape, np.float32, sharding=NamedSharding(mesh, spec(v.type))
        )
        for n, v in graph.params.items()
    }
    lies = NamedSharding(mesh, PartitionSpec("data"))
    tokens = jax.ShapeDtypeStruct((BATCH, SEQ), np.int32, sharding=lies)

    def loss(params: Any, tokens: Any) -> Any:
        outputs = run(params, {"tokens": tokens})
        return cross_entropy(outputs["logits"], tokens) + outputs[AUXILIARY]

    def forward(params: Any, tokens: Any) -> Any:
        return run(params, {"tokens": tokens})

    function = forward if step == "forward" else jax.grad(loss)
    return compile_ahead(jax.jit(function), (params, tokens), machine).hlo


def told(hlo: str) -> dict[str, Any]:
    """Return the runs of collectives by kind and elements, and the shapes that are gathered."""
    from moecc_backends.xla.aot.census import census
    from moecc_backends.xla.aot.hlo import ITEMSIZE_BYTES, parse_hlo

    found = census(hlo)
    runs: Counter[tuple[str, int]] = Counter()
    for moved in found.collectives:
        runs[moved.kind, moved.size_bytes // ITEMSIZE_BYTES[moved.dtype]] += moved.times
    made = [i for where in parse_hlo(hlo).computations.values() for i in where]
    gathers = [i for i in made if i.opcode in ("all-gather", "all-gather-start")]
    return {
        "runs": [[kind, elements, times] for (kind, elements), times in runs.items()],
        "gathered": sorted({s.sizes for i in gathers for s in i.shapes}),
        "unknown_loops": found.unknown_loops,
    }


def main(name: str, *cases: str) -> None:
    machine = parse_machine(name)
    prepare(machine)
    report = {}
    for case in cases:
        via, step, remat = case.split()
        report[case] = told(program(laid(via, remat), step, machine))
    print(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
