"""Micro-batches and meshes change neither a loss nor a gradient, those of routers included."""

from functools import cache, partial

import jax
import numpy as np
import pytest
from tiers import examples, few

from moecc.train.graphs import Bound, MeshPasses, StepPasses, step_graph
from moecc.train.recipe import OptimizerSection

from .small import SIZES, VOCAB, batch_of, make_step, params_of, sparse

ALL_LOSSES = {"importance-coef": 0.3, "load-coef": 0.2, "balance-coef": 0.5, "z-coef": 0.4}
MESHES = {
    "one device": None,
    "data": MeshPasses("data:2", ("data-parallel",)),
    "experts on rows of data": MeshPasses("data:2,model:2", ("st-moe",), "capacity"),
    "replicated tokens": MeshPasses("data:2,expert:2", ("expert-replicated",), "replicated"),
    "stored in parts": MeshPasses("fsdp:2", ("fsdp",)),
    "stream in shards": MeshPasses("data:2,model:2", ("data-parallel", "tensor-parallel")),
}
CHUNK_BYTES = 4 * VOCAB * 10
"""Logits of ten tokens: the last chunk of a micro-batch is not full."""


@cache
def gradients_of(case, parts=1, mesh="one device", chunk_bytes=1 << 62):
    """Return the gradients of a case: routing, padding, capacity factor, what a balance is over."""
    routing, padded, factor, over = case
    sharded = mesh == "stream in shards"
    passes = StepPasses(
        bound=None if factor is None else Bound(factor),
        groups=8 // parts,
        losses={"parts": parts, "over": over, **ALL_LOSSES},
        mesh=MESHES[mesh],
        rolled=sharded,
        split="model" if sharded else None,
    )
    step = make_step(
        step_graph(sparse(routing, padded=padded), passes), SIZES,
        OptimizerSection("sgd", clip=0.0, decay=0.0),
        devices=1 if passes.mesh is None else 4 if "," in passes.mesh.mesh else 2,
        config={"dtype": "f64", "micro_batches": parts, "weight_dtype": "f64"},
        chunk_bytes=chunk_bytes, output_z=0.1,
    )  # fmt: skip
    return jax.jit(partial(step.gradients, key=jax.random.key(0)))


def assert_same(case, parts, mesh, seed):
    graph = sparse(case[0], padded=case[1])
    params, batch = params_of(graph, seed), batch_of(graph, seed)
    (slopes, sums), (other_slopes, other_sums) = jax.tree.map(np.asarray, (
        gradients_of(case)(params, {}, batch),
        gradients_of(case, parts, mesh, CHUNK_BYTES)(params, {}, batch),
    ))  # fmt: skip
    assert slopes.keys() == other_slopes.keys()
    for name, slope in slopes.items():
        scale = np.abs(slope).max()
        assert np.abs(slope - other_slopes[name]).max() <= 1e-12 * scale, name
    assert sums.keys() == other_sums.keys()
    for name, value in sums.items():
        scale = max(np.abs(value).max(), 1.0)
        assert np.abs(value - other_sums[name]).max() <= 1e-12 * scale, name


CASES = [
    (("top-2", True, 0.75, "group"), 2, "one device"),
    (("top-2", True, 0.75, "group"), 1, "stream in shards"),
    *(((r, p, f, o), m, "one device") for r, p, f, o in [
        ("top-1", True, None, "sequence"), ("top-1", False, 1.0, "group"),
        ("top-2", False, None, "group"), ("top-2", True, None, "sequence"),
        ("expert-choice", True, None, "group"), ("expert-choice", False, None, "group"),
    ] for m in (2, 4)),
    *((("top-2", True, 0.75, "group"), m, mesh) for m in (1, 2, 4) for mesh in MESHES
      if (m, mesh) != (1, "stream in shards")),
    (("top-2", "segments", 0.75, "group"), 4, "data"),
    (("top-2", True, None, "group"), 2, "replicated tokens"),
    (("top-2", "segments", None, "sequence"), 2, "one device"),
    (("expert-choice", True, None, "group"), 2, "data"),
]  # fmt: skip


@pytest.mark.parametrize(("case", "parts", "mesh"), few(CASES, 2))
def test_parts_and_meshes_change_no_loss_and_no_gradient(case, parts, mesh):
    with jax.enable_x64(True):
        for seed in range(examples(3, 10)):
            assert_same(case, parts, mesh, seed)


def test_a_batch_without_any_token_has_no_loss_and_finite_gradients():
    case = ("top-2", True, 0.75, "group")
    graph = sparse("top-2", padded=True)
    batch = batch_of(graph, 0)
    batch |= {"mask": np.zeros_like(batch["mask"]), "targets": batch["targets"] * 0 - 1}
    with jax.enable_x64(True):
        run = gradients_of(case, 2, chunk_bytes=CHUNK_BYTES)
        slopes, sums = run(params_of(graph), {}, batch)
    assert all(np.abs(g).max() == 0 for g in slopes.values())
    assert float(sums["loss.auxiliary"]) == 0
