"""Selective precision: routers compute in float32 (ST-MoE, §3.3), as their products ask for.

The one module that reads the attribute ``precision`` of products.
"""

from __future__ import annotations

from moecc.ir.graph import Node, Value


def is_precise(node: Node) -> bool:
    """Return whether `node` is a product that is computed in float32 at least."""
    return node.attrs.get("precision") == "f32"


def is_precise_param(value: Value) -> bool:
    """Return whether all products with the parameter `value` are precise; it stays float32."""
    return value.is_param and _only_precise(value)


def _only_precise(value: Value) -> bool:
    return all(_reads_precisely(user, value) for user in value.users)


def _reads_precisely(user: Node, value: Value) -> bool:
    if user.body is None:
        return is_precise(user)
    inner = zip(user.operands, user.body.inputs.values(), strict=True)
    return all(_only_precise(i) for v, i in inner if v is value)
