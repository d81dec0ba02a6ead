"""The rows of the operation table; importing this package fills it."""

from moecc.ir.table import (
    attention,
    axes,
    buffers,
    chunks,
    collectives,
    contraction,
    elementwise,
    flows,
    random,
    reduction,
    repetition,
    routing,
    slots,
)

__all__ = [
    "attention",
    "axes",
    "buffers",
    "chunks",
    "collectives",
    "contraction",
    "elementwise",
    "flows",
    "slots",
    "random",
    "reduction",
    "repetition",
    "routing",
]
