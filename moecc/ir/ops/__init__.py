"""The rows of the operation table; importing this package fills it."""

from __future__ import annotations

from moecc.ir.ops import (
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
