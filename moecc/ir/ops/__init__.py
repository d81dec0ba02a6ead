"""The operations, each with its row and its meaning; importing this package fills the table."""

from moecc.ir.ops import (
    attention,
    axes,
    collectives,
    contraction,
    elementwise,
    random,
    recurrence,
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
    "random",
    "recurrence",
    "repetition",
    "routing",
    "slots",
]
