"""Run by several processes: logits and gradients of a model, or one of the things that go wrong.

python program.py train CONFIG PIPELINE OUT.npz
python program.py hang
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np


def model(config: str, pipeline: str) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """Return the graph of a golden config after a pipeline, parameters and inputs."""
    from moecc.families import build
    from moecc.rewrite.pipeline import Pipeline
    from moecc.rewrite.runner import run_pipeline
    from moecc.testing import inputs_for, params_for, sizes_for
    from tests.support.family_configs import read_config

    graph = build(read_config(Path(config)))
    run_pipeline(graph, Pipeline.parse(pipeline))
    sizes = dict.fromkeys(sizes_for(graph, 0), 6) | {"B": 8}
    params = params_for(graph, 1, sizes)
    return graph, {n: a.astype(np.float32) for n, a in params.items()}, inputs_for(graph, 1, sizes)


def loss_of(graph):
    """Return a scalar that mixes the whole batch."""
    import jax.numpy as jnp
    from moecc_backends.xla.backend import function

    run = function(graph)

    def loss(params, inputs):
        logits = run(params, inputs)["logits"]
        return jnp.mean(jnp.tanh(logits / 4) ** 2) + jnp.std(logits)

    return loss


def train(config: str, pipeline: str, out: str):
    from moecc.backend import get_backend

    graph, params, inputs = model(config, pipeline)
    program = get_backend("xla").compile(graph)
    outputs = program.run(params, inputs)
    import jax
    from moecc_backends.xla.program import replicated, split_batch, whole

    shared = {name: replicated(np.asarray(a)) for name, a in params.items()}
    batch = {name: split_batch(a, 0) for name, a in inputs.items()}
    results = jax.jit(jax.value_and_grad(loss_of(graph)))(shared, batch)
    value, gradients = jax.tree.map(whole, results)
    counts = np.array([jax.process_count(), jax.device_count()])
    if program.writes:
        grads = {f"grad {n}": g for n, g in gradients.items()}
        np.savez(out, counts=counts, loss=value, logits=outputs["logits"], **grads)


def hang():
    """Add numbers up with the others, without end."""
    import jax.numpy as jnp
    from jax.experimental import multihost_utils
    from moecc_backends.xla.program import join

    from moecc.launch.processes import hold_lifeline, process_info, watchdog_of_environment

    process = process_info()
    assert process is not None
    hold_lifeline()
    watchdog = watchdog_of_environment()
    join(process)
    for step in range(10_000):
        multihost_utils.process_allgather(jnp.full(4, step))
        watchdog.beat(f"step {step}")
        if step == 2:
            print(f"going {os.getpid()}", file=sys.stderr, flush=True)
        time.sleep(0.01)


if __name__ == "__main__":
    {"train": train, "hang": hang}[sys.argv[1]](*sys.argv[2:])
