"""Dropout outside experts: on the outputs of sublayers, and on hidden values of dense blocks."""

from __future__ import annotations

from collections.abc import Callable

from moecc.analysis.ffn import find_ffn_blocks
from moecc.ir.builder import Builder
from moecc.ir.graph import Graph, Node, Value
from moecc.ir.mixtures import emit_dropout
from moecc.rewrite import P, fits
from moecc_passes.routed import PRODUCT
from moecc_passes.specialize.undo import ORIGIN

SUM = P.add(P.any(), P.any())

Operand = tuple[Node, int]
"""A node, and the position of one of its operands."""


def drop(
    graph: Graph, rate: float, next_key: Callable[[], Value], covers: Callable[[str], bool]
) -> int:
    """Add dropout to every sublayer and every dense hidden value; return to how many.

    A sublayer is norm, layer, dropout, and the sum with the residual stream (ST-MoE, eq. 4).

    Args:
      graph: the graph.
      rate: the dropout rate.
      next_key: returns an unused key.
      covers: returns whether a location is affected.
    """
    found = [*sublayers(graph), *((b.down, 0) for b in find_ffn_blocks(graph).blocks)]
    places = [(node, index) for node, index in found if covers(node.loc)]
    for node, index in places:
        builder = Builder(graph, loc=node.loc, origin=f"{ORIGIN}dropout", before=node)
        dropped = emit_dropout(builder, node.operands[index], next_key(), rate)
        node.set_operand(index, dropped)
    return len(places)


def sublayers(graph: Graph) -> list[Operand]:
    """Return the operands of residual sums that are computed from the stream.

    A backward search ends at the previous sums, so all searches together are linear.
    """
    found: dict[Value, Operand] = {}
    for node in graph:
        if not fits(SUM, node) or not node.result.type.dtype.is_float:
            continue
        a, b = node.operands
        if a.type != b.type:
            continue
        for stream, branch, index in ((a, b, 1), (b, a, 0)):
            if _depends_on(stream, branch, found):
                found[node.result] = (node, index)
                break
    return list(found.values())


def _depends_on(stream: Value, branch: Value, sums: dict[Value, Operand]) -> bool:
    """Return whether `branch` is computed from `stream`, through at least one product."""
    seen, left = {branch}, [branch]
    reaches = multiplies = False
    while left:
        node = left.pop().node
        multiplies |= fits(PRODUCT, node) is not None
        for value in node.operands if node is not None else ():
            reaches |= value is stream
            if value is not stream and value not in seen and value not in sums:
                seen.add(value)
                left.append(value)
    return reaches and multiplies
