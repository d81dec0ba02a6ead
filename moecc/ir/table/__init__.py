"""The rows of the operation table; importing this package fills it."""

from moecc.ir.table import (
    attention,
    axes,
    buffers,
    caches,
    chunks,
    collectives,
    contraction,
    convolution,
    elementwise,
    opaque,
    random,
    reduction,
    repetition,
    routing,
    sharding,
    slots,
)

__all__ = [
    "attention",
    "axes",
    "buffers",
    "caches",
    "chunks",
    "collectives",
    "contraction",
    "convolution",
    "elementwise",
    "opaque",
    "random",
    "reduction",
    "repetition",
    "routing",
    "sharding",
    "slots",
]
