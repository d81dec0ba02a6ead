"""How large the values are that a router reads, by the norm before it."""

from __future__ import annotations

from math import sqrt

from moecc.analysis.ffn import FFNBlock
from moecc.ir.traits import Role
from moecc.pipeline.passes import ReadWeight


def input_rms(block: FFNBlock, read: ReadWeight) -> float:
    """Return the root mean square of the input of `block`.

    A normalised value has a unit mean square; the norm multiplies it by a vector and may add
    another, so that the mean square is that of the first plus that of the second.  Without a
    norm, or without weights to read, the answer is 1.
    """
    node = block.x.node
    if node is None or not node.op.is_norm:
        return 1.0
    square = 0.0
    for operand, role in zip(node.operands, node.op.roles, strict=True):
        if role is Role.VALUE:
            continue
        values = read(operand.weight) if operand.weight is not None else None
        if values is None:
            return 1.0
        square += float((values.astype("float64") ** 2).mean())
    return sqrt(square)
