"""The reference interpreter: NumPy, float64; it defines the meaning of every operation.

Importing this package registers the operations; its files mirror `moecc.ir.table`.
"""

from moecc_backends.reference import (
    attention,
    axes,
    buffers,
    caches,
    chunks,
    collectives,
    contraction,
    convolution,
    elementwise,
    fused_attention,
    opaque,
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
    "caches",
    "chunks",
    "collectives",
    "contraction",
    "convolution",
    "elementwise",
    "fused_attention",
    "opaque",
    "slots",
    "random",
    "reduction",
    "repetition",
    "routing",
]
