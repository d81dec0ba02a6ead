"""Routers in the type of the run, for comparison with what ST-MoE §3.3 found unstable."""

from __future__ import annotations

from moecc.errors import UsageError
from moecc.ir.graph import Graph
from moecc.types.dtypes import DType

SELECTIVE = "f32"
"""The type of routers under selective precision."""


def set_router_dtype(
    graph: Graph, router_dtype: str, dtype: DType, where: str = "--router-dtype"
) -> None:
    """Let the routers of `graph` compute in the type of the run instead of in float32.

    Products that ask for float32 and the choices of experts change, in place; losses of the
    logits stay in float32.

    Args:
      graph: the graph.
      router_dtype: ``f32``, or the name of `dtype`.
      dtype: the type of the run.
      where: what asks for it, for messages.

    Raises:
      UsageError: another type is asked for.
    """
    if router_dtype == SELECTIVE:
        return
    if router_dtype != dtype.name:
        raise UsageError(
            "routers compute in float32 or in the type of the run",
            where=where,
            expected=f"{SELECTIVE} or {dtype.name}",
            found=router_dtype,
        )
    for node in graph.every_node():
        if "precision" in node.op.attrs:
            node.attrs = {**node.attrs, "precision": "default"}
