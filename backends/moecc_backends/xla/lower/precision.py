"""Selective precision: routers compute in float32 (ST-MoE, §3.3).

The one place that says which products and parameters are a router's.
"""

from __future__ import annotations

from moecc.ir.graph import Node, Value
from moecc.ir.remat_names import feeds_route, only_routes


def is_router(node: Node) -> bool:
    """Return whether `node` makes the logits of a router, in float32 at least."""
    return feeds_route(node)


def is_router_param(value: Value) -> bool:
    """Return whether `value` is a parameter of routers alone, which stays float32 and whole."""
    return value.is_param and only_routes(value)
