"""Placement of the factor that the gates require, and whether it scales the block (lemma L3)."""

from __future__ import annotations

from collections.abc import Mapping

from moecc.analysis.ffn import FFNBlock
from moecc.ir.graph import Node, Value

Factors = Mapping[Value, float]
"""The factor of each parameter; missing ones are not scaled."""

PLACEMENTS = ("down", "up-down", "cube-root")


def scale_factors(block: FFNBlock, placement: str, scale: float) -> Factors | str:
    """Return the factor of each parameter of `block`, or why `placement` is not possible.

    ``down`` puts the whole scale on the last matrix.  ``up-down`` puts √scale there and √scale on
    a matrix in which the hidden value is linear, which for SwiGLU is ``up`` and never ``gate``.
    ``cube-root`` puts equal shares on all matrices, as published (He et al. 2024): the cube root
    for a gated block and for squared ReLU, the square root for others with two matrices.  A bias
    before the activation is scaled like the matrix before it.  Not included is a bias after the
    last matrix, which the scale does not touch.
    """
    if scale == 1:
        return {}
    chosen = _of_matrices(block, placement, scale)
    if isinstance(chosen, str):
        return chosen
    for up in block.ups:
        if up.operands[1] in chosen:
            chosen |= dict.fromkeys(block.biases_of(up), chosen[up.operands[1]])
    if placement == "cube-root" or is_scaled(block, chosen, scale):
        return chosen
    return "a parameter is used in two positions that would need different factors"


def _of_matrices(block: FFNBlock, placement: str, scale: float) -> dict[Value, float] | str:
    down = block.down.operands[1]
    if placement == "down":
        return {down: scale}
    if placement == "cube-root":
        return dict.fromkeys((*block.degrees(), down), scale ** (1 / shares(block)))
    linear = [w for w, degree in block.degrees().items() if degree == 1]
    if not linear:
        return "no matrix before the activation can be scaled, because the block is linear in none"
    return {linear[-1]: scale**0.5, down: scale**0.5}


def shares(block: FFNBlock) -> int:
    """Return n where ``cube-root`` scales each matrix by the n-th root of the scale."""
    return 1 + sum(degree or 1 for degree in block.degrees().values())


def is_scaled(block: FFNBlock, factors: Factors, scale: float) -> bool:
    """Whether multiplying parameters by `factors` multiplies the block by `scale`.

    The output bias is excluded.  The result is false if the dataflow does not show it.
    """
    known: dict[Value, float | None] = {block.x: 1.0}
    for node in block.nodes:
        given = [known.get(v, factors.get(v, 1.0)) for v in node.operands]
        known[node.result] = _scaled_by(node, given)
        if node is block.down:
            break
    found = known[block.down.result]
    return found is not None and abs(found / scale - 1) < 1e-9


def _scaled_by(node: Node, given: list[float | None]) -> float | None:
    """Return the factor on the result if the operands have positive factors."""
    factors = [f for f in given if f is not None]
    if len(factors) < len(given):
        return None
    return node.op.homogeneity.factor(factors)
