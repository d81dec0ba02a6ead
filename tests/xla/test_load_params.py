"""Parameters on a mesh are made from slices alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from moecc_passes.upcycle.upcycle import UpcyclePass

from moecc.errors import InputError
from moecc.families import build
from moecc.ir import Graph
from moecc.pipeline.passes import Context
from moecc.testing.configs import read_config
from moecc.weights.evaluate import evaluate, sources

from .models import GOLDEN, Array
from .test_shard_map import DENSE, laid

jax = pytest.importorskip("jax")

from moecc_backends.xla.mesh.specs import (  # noqa: E402
    device_mesh,
    load_params,
)


class Recorder:
    """Reads random tensors and remembers which rows were asked for."""

    def __init__(self, graph: Graph) -> None:
        rng = np.random.default_rng(0)
        found = {
            s for v in graph.params.values() if v.weight is not None for s in sources(v.weight)
        }
        ordered = sorted(found, key=lambda s: s.name)
        self.tensors = {
            s.name: rng.normal(size=s.type.shape).astype(s.type.dtype.numpy) for s in ordered
        }
        self.rows: dict[str, list[int]] = {}

    def __call__(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        rows = self.tensors[name][start:stop]
        self.rows.setdefault(name, []).append(len(rows))
        return rows


def sparse() -> Graph:
    graph = build(read_config(GOLDEN / DENSE))
    UpcyclePass(experts=8, slots="capacity", groups=8, init="noise").apply(graph, Context())
    return graph


@pytest.mark.parametrize(
    "layout", ["st-moe mesh=data:4,model:2", "fsdp mesh=fsdp:8", "data-parallel mesh=data:8"]
)
def test_parts_are_those_of_the_whole(layout: str) -> None:
    graph = laid(sparse(), layout)
    reader = Recorder(graph)
    placed = load_params(graph, reader, device_mesh(graph))
    for name, array in placed.items():
        weight: Any = graph.params[name].weight
        np.testing.assert_array_equal(np.asarray(array), evaluate(weight, reader))


def test_no_device_reads_more_than_its_part() -> None:
    graph = laid(build(read_config(GOLDEN / DENSE)), "tensor-parallel mesh=data:1,model:4")
    reader = Recorder(graph)
    load_params(graph, reader, device_mesh(graph))
    for name in ("mlp.up_proj", "mlp.gate_proj"):
        tensor = f"model.layers.0.{name}.weight"
        # Neurons are the rows of these: each of four devices reads a quarter of them, once.
        assert reader.rows[tensor] == [len(reader.tensors[tensor]) // 4] * 4


def test_experts_are_read_where_they_lie() -> None:
    graph = laid(sparse(), "st-moe mesh=data:8")
    mesh = device_mesh(graph)
    name = "model.layers.0.mlp.down_proj.weight"
    array = load_params(graph, Recorder(graph), mesh)[name]
    assert {s.data.shape[0] for s in array.addressable_shards} == {1}


def test_a_parameter_without_a_weight_is_refused() -> None:
    graph = laid(sparse(), "st-moe mesh=data:8")
    reader = Recorder(graph)
    graph.params["model.norm.weight"].weight = None
    with pytest.raises(InputError, match="has no weight expression"):
        load_params(graph, reader, device_mesh(graph))
