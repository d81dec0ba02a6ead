"""The rows of the operation table; importing this package fills it."""

from moecc.ir.table import (
    attention,
    axes,
    buffers,
    chunks,
    collectives,
    contraction,
    convolution,
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
    "convolution",
    "elementwise",
    "flows",
    "slots",
    "random",
    "reduction",
    "repetition",
    "routing",
]
