"""Read the small weights on which promises of passes depend, such as the scales of norms."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moecc.checkpoint.source import Checkpoint
    from moecc.pipeline.passes import ReadWeight
    from moecc.types.arrays import Array
    from moecc.weights.expr import Expr

MAX_READ_ELEMENTS = 1 << 20
"""The largest parameter that is read while a conversion is planned: the vector of a norm."""


def reads_small(checkpoint: Checkpoint) -> ReadWeight:
    """Return what reads small parameters of `checkpoint`; for large ones it returns None."""
    from moecc.weights.evaluate import evaluate

    def read(weight: Expr) -> Array | None:
        small = prod(weight.type.shape) <= MAX_READ_ELEMENTS
        return evaluate(weight, checkpoint.read) if small else None

    return read
