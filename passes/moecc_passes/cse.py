"""Common-subexpression elimination."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar

from moecc.ir.graph import Graph, Node
from moecc.ir.structure import replace_value
from moecc.pipeline.passes import EXACT, Context, Pass, PassResult
from moecc.rewrite.driver import may_rewrite


@dataclass(frozen=True)
class CsePass(Pass):
    """Keep the first of nodes that compute the same from the same operands.

    Attributes must be equal too, and types; operands of a commutative operation may be in
    either order.  Randomness is an operand, a key, so two draws are one only if their keys are.
    Parameters are never merged: equal values may diverge in training.

    Before::

        %a = silu %x : f32[batch=B, embed=4]
        %b = silu %x : f32[batch=B, embed=4]
        %c = mul %a, %b : f32[batch=B, embed=4]

    After::

        %a = silu %x : f32[batch=B, embed=4]
        %c = mul %a, %a : f32[batch=B, embed=4]
    """

    name: ClassVar[str] = "cse"
    summary: ClassVar[str] = "keep the first of nodes that compute the same"
    takes_rolled: ClassVar[bool] = True
    preserves = EXACT

    def apply(self, graph: Graph, ctx: Context) -> PassResult:
        """Walk the graph once, in order, so that operands are merged before their users."""
        first: dict[Hashable, Node] = {}
        merged = 0
        for node in graph:
            same = first.setdefault(_key(node), node)
            # The order of operands may determine the order of the result's axes, so types count.
            if same is node or any(
                a.type != b.type for a, b in zip(same.results, node.results, strict=True)
            ):
                continue
            if not may_rewrite(self.name, node):
                break
            for old, new in zip(node.results, same.results, strict=True):
                replace_value(old, new)
            node.erase()
            merged += 1
        return PassResult(merged > 0, merged, {"nodes-merged": merged})


def _key(node: Node) -> Hashable:
    operands = tuple(map(id, node.operands))
    if node.op.commutative:
        operands = tuple(sorted(operands))
    # repr distinguishes −0.0 from 0.0, and a float from an equal int; a NaN equals itself.
    return (node.op, operands, repr(node.attrs) if node.attrs else "")
