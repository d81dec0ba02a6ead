"""The paper's largest model in the paper's layout."""

from __future__ import annotations

from math import prod

from moecc.ir import verify
from moecc.ir.mesh import mesh_of
from moecc.ir.structure import local_type
from moecc.model.open import open_model

from .meshes import census, run


def test_st_moe_32b_on_64_rows_and_16_columns() -> None:
    """Every sparse layer slices, exchanges and gathers twice (ST-MoE, appendix H)."""
    graph = open_model("preset:st-moe-32b").graph
    whole = sum(prod(p.type.shape) for p in graph.params.values())
    run(graph, "specialize{mode=train groups=64},annotate-sharding{mesh=data:64,model:16 "
        "rules=st-moe,zero},expert-parallel{via=capacity slice=model}")  # fmt: skip
    exchanged = census(graph)
    assert exchanged.pop("reshard") > 0
    assert exchanged == {"all_gather": 24, "all_to_all": 24, "reduce_scatter": 12, "shard": 12}
    run(graph, "lower-collectives")
    assert "reshard" not in census(graph)
    mesh = mesh_of(graph)
    assert mesh is not None
    held = sum(prod(local_type(p.type, mesh).shape) for p in graph.params.values())
    assert whole == 269_104_613_376
    # What a device holds beyond its share are vectors, routers and what does not divide.
    assert whole / 1024 <= held <= 1.05 * whole / 1024
    run(graph, "roll-layers")
    verify(graph)
