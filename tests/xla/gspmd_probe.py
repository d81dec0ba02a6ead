"""Train a small model a step, on one device and on a mesh of eight; run as a script.

Prints how far loss and parameters differ, and the collectives of the program on the mesh.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from typing import Any

from moecc_backends.xla.aot.compiler import devices, prepare

from moecc.plan.machines import parse_machine

CONFIG = {
    "d_model": 32, "d_ff": 64, "d_kv": 8, "num_heads": 4, "num_layers": 4, "num_decoder_layers": 4,
    "sparse_encoder_layers": [1, 3], "sparse_decoder_layers": [1, 3], "num_experts": 8,
    "vocab_size": 64, "train_capacity_factor": 1.25,
}  # fmt: skip
SIZES = {"B": 16, "S": 8, "T": 4}


def small_model(remat: str, on_mesh: str = "") -> Any:
    """Return a graph like ST-MoE's, for training, with as many groups as devices.

    Args:
      remat: of the rolled layers; ``unrolled`` for none.
      on_mesh: passes that lay the graph on a mesh.
    """
    from moecc.families import build
    from moecc.families.registry import parse_config
    from moecc.presets import preset_config
    from moecc.rewrite.passes import Context
    from moecc.rewrite.pipeline import Pipeline, installed
    from moecc.rewrite.runner import run_pipeline

    graph = build(parse_config({**preset_config("st-moe-base"), **CONFIG}))
    passes = f"specialize{{mode=train capacity-factor=1.25 groups=8}},add-losses,cse{on_mesh}"
    if remat != "unrolled":
        passes += f",roll-layers{{remat={remat}}}"
    run_pipeline(graph, Pipeline.parse(passes, installed()), context=Context())
    return graph


def explicit(layout: Any, via: str) -> str:
    """Return the passes that lay a graph on the mesh of `layout`."""
    rules = ",".join(layout.names)
    laid = f",annotate-sharding{{mesh={layout.mesh} rules={rules}}}"
    return f"{laid},expert-parallel{{via={via}}},lower-collectives,cse"


def main(mesh: str, dense_weights: str, remat: str, way: str) -> None:
    prepare(parse_machine("cpu:8"))
    import jax
    import numpy as np
    from moecc_backends.xla.aot.census import census
    from moecc_backends.xla.train.step import make_train_step

    from moecc.plan.step import StepConfig, plan_mesh
    from moecc.sharding.layout import Layout
    from moecc.train.recipe import OptimizerSection
    from moecc.train.settings import StepSpec

    # Parameters are float32; what computes with them is not, so that nothing but a fault differs.
    jax.config.update("jax_enable_x64", True)
    whole = small_model(remat)
    layout = Layout(plan_mesh(mesh), CONFIG["num_experts"], dense_weights)
    update = OptimizerSection("sgd", clip=0.0, decay=0.0)
    is_gspmd = way == "gspmd"
    graph = whole if is_gspmd else small_model(remat, explicit(layout, way))
    spec = StepSpec(SIZES, StepConfig(dtype="f64"), update, guard=None)
    own = replace(spec, layout=layout) if is_gspmd else spec
    step = make_train_step(graph, own, devices(parse_machine("cpu:8")))
    single = make_train_step(whole, spec, devices(parse_machine("cpu:8"))[:1])
    rng = np.random.default_rng(0)

    def drawn(leaf: Any) -> Any:
        if np.issubdtype(leaf.dtype, np.integer):
            return rng.integers(0, CONFIG["vocab_size"], leaf.shape).astype(np.int32)
        scale = 0.2 if len(leaf.shape) > 1 else 1.0
        return (scale * rng.normal(size=leaf.shape)).astype(np.float32)

    params = jax.tree.map(drawn, step.abstract_state["params"])
    batch = jax.tree.map(drawn, step.abstract_batch)
    key, rate = jax.random.key(0), jax.numpy.float32(1.0)
    state, told = single.step(single.init(params), batch, key, rate)
    alone = {n: np.asarray(a) for n, a in state["params"].items()}
    placed = jax.tree.map(lambda a, s: jax.device_put(a, s.sharding), batch, step.abstract_batch)
    given = (step.init(params), placed, key, rate)
    compiled = step.function.lower(*given).compile()
    after, told_together = compiled(*given)
    together = after["params"]
    apart = {n: float(np.abs(np.asarray(alone[n]) - np.asarray(together[n])).max()) for n in alone}
    moved = {n: float(np.abs(np.asarray(alone[n]) - params[n]).max()) for n in alone}
    found = census(compiled.as_text())
    gathered = (c.size_bytes for c in found.collectives if c.kind == "all-gather")
    report = {
        "loss": [float(told["loss"]), float(told_together["loss"])],
        "auxiliary": float(told["loss.auxiliary"]),
        "worst": max(apart[n] / max(moved[n], 1e-3) for n in alone),
        "unmoved": sorted(n for n in alone if moved[n] == 0),
        "collectives": found.by_kind(),
        "largest_gather_bytes": max(gathered, default=0),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
