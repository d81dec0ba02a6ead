"""What the derivative of an operation reads, and in which operands it is linear or homogeneous."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import combinations_with_replacement

import numpy as np

from moecc.ir.arrays import Array, Data
from moecc.ir.traits import Residual

from .evaluated_axes import (
    STEP,
    floats_of,
    has_one_float,
    is_elementwise,
    is_logical,
    other_data,
    same,
    with_data,
)
from .operations import Function


def jacobian(f: Function, arrays: Sequence[Array], at: int) -> Data:
    """Return the derivative of the floating-point results in operand `at`, by differences."""
    data, columns = arrays[at].data, []
    for place in np.ndindex(data.shape):
        step = np.zeros_like(data)
        step[place] = STEP
        above, below = (f.floats(with_data(arrays, at, data + d)) for d in (step, -step))
        columns.append((above - below) / (2 * STEP))
    return np.stack(columns, axis=-1) if columns else np.zeros((0, 0))


def close(a: Data, b: Data) -> bool:
    return same(a, b, 1e-6)


def _read(f: Function, of: Sequence[int]) -> tuple[int, ...]:
    """Return the operands on which the derivative in the operands `of` depends."""
    found = []
    for at in range(len(f.types)):
        for seed in range(4):
            arrays = f.draw(seed)
            other = with_data(arrays, at, other_data(f, at, arrays[at], seed + 50))
            if any(not close(jacobian(f, arrays, i), jacobian(f, other, i)) for i in of):
                found.append(at)
                break
    return tuple(found)


def _is_polynomial_of_result(f: Function) -> bool:
    """Whether each element of the derivative is a polynomial of a row of the result."""
    lefts, rights = [], []
    for seed in range(16):
        arrays = f.draw(seed)
        made, changes = f(arrays)[0].data, jacobian(f, arrays, 0)
        width = made.shape[-1]
        blocks = changes.reshape(-1, width, made.size // width, width)
        for row in range(made.size // width):
            y = made.reshape(-1, width)[row]
            terms = [
                np.prod([y[i] for i in of]) if of else 1.0
                for degree in range(4)
                for of in combinations_with_replacement(range(width), degree)
            ]
            lefts.append(terms)
            rights.append(blocks[row, :, row].ravel())
    left, right = np.array(lefts), np.array(rights)
    found = np.linalg.lstsq(left, right, rcond=None)[0]
    return bool(np.allclose(left @ found, right, atol=1e-6))


def _spares_a_reduction(f: Function) -> bool:
    """Whether, given the result, the derivative in an element depends on that element alone."""
    for seed in range(4):
        arrays = f.draw(seed)
        rows = arrays[0].data.copy()
        rows[:, 1] = rows[:, 1] + 0.3
        low, high = rows.copy(), rows.copy()
        low[:, 2], high[:, 2] = -9.0, 9.0
        wanted = f(arrays)[0].data
        if not (f(with_data(arrays, 0, low))[0].data <= wanted).all():
            rows[:, 1] = arrays[0].data[:, 1] - 0.3
            low[:, 1] = high[:, 1] = rows[:, 1]
        start, there = low.copy(), f(with_data(arrays, 0, low))[0].data == wanted
        for _ in range(60):
            middle = (low + high) / 2
            above = f(with_data(arrays, 0, middle))[0].data > wanted
            high, low = (
                np.where(above[:, None], middle, high),
                np.where(above[:, None], low, middle),
            )
        # Where the others alone give the result, ties are kept away from.
        low = np.where(there[:, None], start, low)
        entries = [(i, low.shape[1] * i) for i in range(len(low))]
        a, b = jacobian(f, arrays, 0), jacobian(f, with_data(arrays, 0, low), 0)
        if not all(abs(a[e] - b[e]) < 1e-5 for e in entries):
            return False
    return True


@cache
def residual(f: Function, of: tuple[int, ...] = ()) -> Residual:
    """Return what the derivative reads, in the operands `of` or in all of them."""
    asked = of or tuple(floats_of(f))
    if f.node.body is not None or f.op.collective is not None or not f.floats(f.draw(0)).size:
        # What a body reads is said by its own operations.
        return Residual()
    read = _read(f, asked)
    if not read:
        return Residual()
    shape = f.node.results[0].type
    if has_one_float(f) and len(f.types) == 1:
        if shape.names == f.types[0].names and _is_polynomial_of_result(f):
            return Residual((), result=True)
        if len(shape) < len(f.types[0]) and _spares_a_reduction(f):
            return Residual(read, result=True)
    return Residual(read, of=of)


def _linear_in(f: Function, positions: Sequence[int]) -> bool:
    if not positions or not has_one_float(f):
        return False
    for seed in range(3):
        a, b = f.draw(seed), f.draw(seed + 20)
        mixed = [
            replace(x, data=2.0 * x.data + 0.5 * y.data) if i in positions else x
            for i, (x, y) in enumerate(zip(a, b, strict=True))
        ]
        other = [y if i in positions else x for i, (x, y) in enumerate(zip(a, b, strict=True))]
        if not same(f.floats(mixed), 2.0 * f.floats(a) + 0.5 * f.floats(other)):
            return False
    return True


@cache
def linear(f: Function) -> tuple[tuple[int, ...], bool]:
    """Return the operands in which an operation is linear, and whether only in all together."""
    found = tuple(i for i in floats_of(f) if _linear_in(f, (i,)))
    # Of operations on any number of like operands nothing is said of a single one.
    many = f.op.variadic and len(f.op.operands) == 1
    if found or f.op.variadic or is_logical(f):
        return (() if many else found), False
    together = tuple(floats_of(f))
    return (together, True) if len(together) > 1 and _linear_in(f, together) else ((), False)


@cache
def degrees(f: Function) -> tuple[float | None, ...]:
    """Return by operand the power at which a factor on it alone comes out, or None."""
    return tuple(_degree(f, (i,)) if i in floats_of(f) else None for i in range(len(f.types)))


def _degree(f: Function, positions: Sequence[int]) -> float | None:
    if not has_one_float(f):
        return None
    found = set()
    for seed, factor in ((0, 2.0), (1, 3.0), (2, 0.5)):
        arrays = f.draw(seed)
        scaled = [
            replace(a, data=a.data * factor) if i in positions else a for i, a in enumerate(arrays)
        ]
        before, after = f.floats(arrays), f.floats(scaled)
        known = np.isfinite(before)
        there = known & (before != 0)
        powers = np.log(np.abs(after[there] / before[there])) / np.log(factor)
        signs = np.sign(after[there]) == np.sign(before[there])
        if not signs.all() or np.ptp(powers) > 1e-6 or (after[known & ~there] != 0).any():
            return None
        found.add(round(float(powers.mean()), 6))
    # What has no influence has no degree.
    return found.pop() if len(found) == 1 and found != {0.0} else None


@cache
def alike(f: Function) -> tuple[float | None, ...] | None:
    """Return that a common factor on all numbers comes out, where none on one of them does."""
    numbers = floats_of(f)
    if len(numbers) < 2 or any(degrees(f)) or not is_elementwise(f):
        return None
    if _degree(f, numbers) != 1.0:
        return None
    return tuple(1.0 if i in numbers else None for i in range(len(f.types)))
