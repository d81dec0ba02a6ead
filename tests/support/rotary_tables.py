"""The frequencies of a config's rotary tables."""

from moecc.families.graphs.decoder import rope_tables
from moecc.families.rope import RopeConfig
from moecc.ir import Builder, Graph
from moecc.ir.ops.attention import RopeOp
from moecc.types import I32, tensor


def rotary_frequencies(
    rope: RopeConfig, head_dim: int, *, max_position_embeddings: int, length: int
) -> tuple[float, ...]:
    """Return what the operation of a family's graph rotates by, ``[head_dim / 2]``."""
    graph = Graph("rotary")
    positions = graph.input("positions", tensor(I32, seq=length))
    cos, _ = rope_tables(Builder(graph), positions, rope, head_dim, max_position_embeddings)
    assert cos.node is not None
    return tuple(RopeOp.of_node(cos.node).frequencies(length))
