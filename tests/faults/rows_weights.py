"""Faults of the weights themselves."""

from __future__ import annotations

from .place import DOWN, tensors_converted
from .rows import row
from .spoil import by_template, in_odd_places

ROWS = [
    row(
        40,
        "weights that are zero, equal or tiny",
        0,
        "",
        tensors_converted(lambda t: t[DOWN].fill(0.0)),
        tensors_converted(lambda t: t[DOWN].fill(1e-40)),
    ),
    row(42, "several types in one model", 0, "", in_odd_places),
    row(
        44,
        "8-bit weights without scales",
        0,
        "8-bit weights without scales",
        by_template("F8_E4M3"),
    ),
]
