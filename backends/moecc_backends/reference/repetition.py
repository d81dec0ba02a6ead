"""The meaning of repeating a body, stacking, and picking from a stack."""

from __future__ import annotations

import numpy as np

from moecc.ir.graph import Graph
from moecc_backends.reference.arrays import Array, meaning


def stacked_along(axis: str, *xs: Array) -> Array:
    """Return arrays stacked along a new first axis."""
    axes = xs[0].axes
    return Array(np.stack([x.to(axes) for x in xs]), (axis, *axes), xs[0].dtype)


def picked(x: Array, axis: str, at: int) -> Array:
    """Return the data at one position of an axis."""
    rest = tuple(a for a in x.axes if a != axis)
    # Made contiguous, as if it had never been part of a stack, so that it rounds the same.
    return Array(np.array(x.to((axis, *rest))[at], order="C"), rest, x.dtype)


@meaning("stack")
def stack(*xs: Array, axis: str) -> Array:
    """Return arrays stacked along a new first axis."""
    return stacked_along(axis, *xs)


@meaning("index")
def index(x: Array, *, axis: str, at: int) -> Array:
    """Return the data at one position of an axis."""
    return picked(x, axis, at)


@meaning("scan")
def scan(
    *operands: Array,
    over: tuple[tuple[str, int], ...],
    carries: int,
    stacked: int,
    remat: str,
    save: tuple[str, ...],
    body: Graph,
) -> tuple[Array, ...]:
    """Run the body once for each position; rematerialisation has no effect here."""
    from moecc_backends.reference.interpreter import run_body

    ((axis, runs),) = over
    carried = operands[:carries]
    slices, captured = operands[carries : carries + stacked], operands[carries + stacked :]
    collected: list[tuple[Array, ...]] = []
    for at in range(runs):
        now = (picked(x, axis, at) for x in slices)
        results = run_body(body, (*carried, *now, *captured))
        carried, made = results[:carries], results[carries:]
        collected.append(made)
    return (*carried, *(stacked_along(axis, *xs) for xs in zip(*collected, strict=True)))
