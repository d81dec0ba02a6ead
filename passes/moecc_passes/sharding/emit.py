"""Collectives as nodes of a graph."""

from __future__ import annotations

from collections.abc import Iterable

from moecc.ir.builder import Builder
from moecc.ir.graph import Value
from moecc.sharding.collectives import Step


def emit(builder: Builder, value: Value, steps: Iterable[Step]) -> Value:
    """Return what `steps`, one after the other, make of `value`; each has its name."""
    name = value.name
    for op, attrs in steps:
        value = builder.node(op, value, names=(name,), **attrs).result
    return value
