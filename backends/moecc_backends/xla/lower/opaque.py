"""Regions of functions of JAX: they run in the function, where blocks are replaced."""

from __future__ import annotations

from moecc.errors import InputError
from moecc.ir.graph import Node, where
from moecc_backends.xla.trace.context import TraceContext, lowering
from moecc_backends.xla.trace.values import Operand


@lowering("jax")
def _jax(ctx: TraceContext, node: Node, *operands: Operand) -> Operand:
    raise InputError(
        "a region of JAX is computed by its function alone",
        where=where(node),
        hint="moe(function) of `moecc.jax` runs the blocks in it",
    )
