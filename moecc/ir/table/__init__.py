"""The rows of the operation table; importing this package fills it."""

from moecc.ir.table import (
    attention,
    axes,
    collectives,
    contraction,
    elementwise,
    repetition,
    routing,
    slots,
)

__all__ = [
    "attention",
    "axes",
    "collectives",
    "contraction",
    "elementwise",
    "repetition",
    "routing",
    "slots",
]
