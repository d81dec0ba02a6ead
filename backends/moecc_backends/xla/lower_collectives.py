"""Collectives where a program sees global values: the identity.

What runs device by device sends; these are its lowerings on one device, and under GSPMD.
"""

from __future__ import annotations

from moecc.ir.graph import Node
from moecc.ir.table.collectives import COLLECTIVES
from moecc_backends.xla.context import Context, lowering
from moecc_backends.xla.named import Operand


@lowering(*COLLECTIVES)
def _identity(ctx: Context, node: Node, x: Operand) -> Operand:
    return x
