"""What holds of an operation, found by evaluating its meaning; compared with what its row says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import combinations_with_replacement

import numpy as np
from moecc_backends.reference.arrays import Array, Data

from moecc.errors import InputError
from moecc.ir.ops import OPS
from moecc.ir.traits import Collective, Domain, Residual, Role, RowMove

from .operations import Function, applied, sample

TOLERANCE = 1e-9
STEP = 1e-4


def _same(a: Data, b: Data, tolerance: float = TOLERANCE) -> bool:
    return a.shape == b.shape and np.allclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)


def _with(arrays: Sequence[Array], at: int, data: Data) -> list[Array]:
    return [replace(a, data=data) if i == at else a for i, a in enumerate(arrays)]


def _floats_of(f: Function) -> list[int]:
    return [i for i, t in enumerate(f.types) if t.dtype.is_float]


def _single_float(f: Function) -> bool:
    return len(f.node.results) == 1 and f.node.results[0].type.dtype.is_float


def _other(f: Function, at: int, array: Array, seed: int) -> Data:
    """Return other data for an operand, all of it different where that can be."""
    if array.dtype is not None and array.dtype.kind == "bool":
        return ~array.data
    if array.assignment is not None:
        return np.full_like(array.data, -1)
    if f.types[at].dtype.kind == "int":
        data = f.draw(seed)[at].data
        return data[::-1].copy() if data.ndim else data + 1
    return f.draw(seed)[at].data


# --- elements and axes


@cache
def is_elementwise(name: str) -> bool:
    """Whether a result is one function of one element of each operand, everywhere."""
    f = Function(sample(name))
    kinds = {t.dtype.kind for t in f.types}
    if not f.types or "key" in kinds or len(f.node.results) > 1 or _is_identity_on_mesh(name):
        return False
    wide = max(f.types, key=len)
    if f.node.result.type.names != wide.names or f.node.result.type.sizes != wide.sizes:
        return False
    if not all(set(t.names) <= set(wide.names) for t in f.types):
        return False
    depends = all(_reaches(f, i) for i in range(len(f.types)))
    return depends and not any(_crosses(f, n) for n in wide.names)


def _is_identity_on_mesh(name: str) -> bool:
    f = Function(sample(name))
    one = f.draw(0)
    type = f.node.results[0].type
    changes = len(f.types) == 1 and str(type) != str(f.types[0]) and type.bare == f.types[0].bare
    return changes and _same(f(one)[0].data, one[0].data)


def _reaches(f: Function, at: int) -> bool:
    """Whether the operand has any influence on the results."""
    for seed in range(6):
        arrays = f.draw(seed)
        changed = _with(arrays, at, _other(f, at, arrays[at], seed + 50))
        if any(not _same(a.data, b.data) for a, b in zip(f(arrays), f(changed), strict=True)):
            return True
    return False


def _crosses(f: Function, axis: str) -> bool:
    """Whether elements meet along `axis`, or their places on it count."""
    return any(
        not _moves_along(f, axis, s) or any(_spreads(f, axis, i, s) for i in range(len(f.types)))
        for s in range(8)
    )


def _taken(array: Array, axis: str, order: Sequence[int]) -> Array:
    if axis not in array.axes:
        return array
    return replace(array, data=array.data.take(order, array.axes.index(axis)))


def _moves_along(f: Function, axis: str, seed: int) -> bool:
    """Whether operands in another order along `axis` give the results in that order."""
    arrays = f.draw(seed)
    size, *others = dict.fromkeys(a.size(axis) for a in arrays if axis in a.axes)
    if others:
        return False
    order = [*range(1, size), 0]
    moved = f([_taken(a, axis, order) for a in arrays])
    return all(
        _same(a.data, _taken(b, axis, order).data) for a, b in zip(moved, f(arrays), strict=True)
    )


def _spreads(f: Function, axis: str, at: int, seed: int) -> bool:
    """Whether a change at the first position of `axis` is seen at others."""
    arrays = f.draw(seed)
    if axis not in arrays[at].axes or arrays[at].assignment is not None:
        return False
    data, where = arrays[at].data.copy(), arrays[at].axes.index(axis)
    index = tuple(0 if i == where else slice(None) for i in range(data.ndim))
    data[index] = _other(f, at, arrays[at], seed + 50)[index]
    for before, after in zip(f(arrays), f(_with(arrays, at, data)), strict=True):
        rest = range(1, before.size(axis)) if axis in before.axes else ()
        if not _same(_taken(before, axis, rest).data, _taken(after, axis, rest).data):
            return True
    return False


@cache
def mixed(name: str) -> frozenset[str]:
    """Return the axes along which an element of a result needs several elements, or its place."""
    f = Function(sample(name))
    found = set()
    if not f.types or OPS[name].collective is not None:
        return frozenset()
    given = {n for t in f.types for n in t.names}
    made = {n for v in f.node.results for n in v.type.names}
    own = set(f.types[0].names) if _reaches(f, 0) else set()
    for axis in own | (given & made):
        sizes = [t[axis].size for t in f.types if axis in t]
        there = [v.type[axis].size for v in f.node.results if axis in v.type]
        if not there:
            moved = is_alias(name) and _keeps_all(f)
            if not moved:
                found.add(axis)
        elif any(s != sizes[0] for s in there) or _crosses(f, axis):
            found.add(axis)
    return frozenset(found)


def _keeps_all(f: Function) -> bool:
    """Whether the result has as many elements as the operand: axes have other names alone."""
    arrays = f.draw(0)
    return bool(f(arrays)[0].data.size == arrays[0].data.size)


# --- derivatives


def jacobian(f: Function, arrays: Sequence[Array], at: int) -> Data:
    """Return the derivative of the floating-point results in operand `at`, by differences."""
    flat = arrays[at].data.ravel()
    columns = []
    for i in range(flat.size):
        ends = []
        for sign in (1, -1):
            moved = flat.copy()
            moved[i] += sign * STEP
            ends.append(f.floats(_with(arrays, at, moved.reshape(arrays[at].data.shape))))
        columns.append((ends[0] - ends[1]) / (2 * STEP))
    return np.stack(columns, axis=-1) if columns else np.zeros((0, 0))


def _close(a: Data, b: Data) -> bool:
    return _same(a, b, 1e-6)


def _read(f: Function, of: Sequence[int]) -> tuple[int, ...]:
    """Return the operands on which the derivative in the operands `of` depends."""
    found = []
    for at in range(len(f.types)):
        for seed in range(4):
            arrays = f.draw(seed)
            other = _with(arrays, at, _other(f, at, arrays[at], seed + 50))
            if any(not _close(jacobian(f, arrays, i), jacobian(f, other, i)) for i in of):
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
        if not (f(_with(arrays, 0, low))[0].data <= wanted).all():
            rows[:, 1] = arrays[0].data[:, 1] - 0.3
            low[:, 1] = high[:, 1] = rows[:, 1]
        start, there = low.copy(), f(_with(arrays, 0, low))[0].data == wanted
        for _ in range(60):
            middle = (low + high) / 2
            above = f(_with(arrays, 0, middle))[0].data > wanted
            high, low = (
                np.where(above[:, None], middle, high),
                np.where(above[:, None], low, middle),
            )
        # Where the others alone give the result, ties are kept away from.
        low = np.where(there[:, None], start, low)
        entries = [(i, low.shape[1] * i) for i in range(len(low))]
        a, b = jacobian(f, arrays, 0), jacobian(f, _with(arrays, 0, low), 0)
        if not all(abs(a[e] - b[e]) < 1e-5 for e in entries):
            return False
    return True


@cache
def residual(name: str, of: tuple[int, ...] = ()) -> Residual:
    """Return what the derivative reads, in the operands `of` or in all of them."""
    f = Function(sample(name))
    asked = of or tuple(_floats_of(f))
    entry = OPS[name]
    if f.node.body is not None or entry.collective is not None or not f.floats(f.draw(0)).size:
        # What a body reads is said by its own operations.
        return Residual()
    read = _read(f, asked)
    if not read:
        return Residual()
    shape = f.node.results[0].type
    if _single_float(f) and len(f.types) == 1:
        if shape.names == f.types[0].names and _is_polynomial_of_result(f):
            return Residual((), result=True)
        if len(shape) < len(f.types[0]) and _spares_a_reduction(f):
            return Residual(read, result=True)
    return Residual(read, of=of)


# --- linearity


def _linear_in(f: Function, positions: Sequence[int]) -> bool:
    if not positions or not _single_float(f):
        return False
    for seed in range(3):
        a, b = f.draw(seed), f.draw(seed + 20)
        mixed_ = [
            replace(x, data=2.0 * x.data + 0.5 * y.data) if i in positions else x
            for i, (x, y) in enumerate(zip(a, b, strict=True))
        ]
        other = [y if i in positions else x for i, (x, y) in enumerate(zip(a, b, strict=True))]
        if not _same(f.floats(mixed_), 2.0 * f.floats(a) + 0.5 * f.floats(other)):
            return False
    return True


@cache
def linear(name: str) -> tuple[tuple[int, ...], bool]:
    """Return the operands in which an operation is linear, and whether only in all together."""
    f = Function(sample(name))
    entry = OPS[name]
    found = tuple(i for i in _floats_of(f) if _linear_in(f, (i,)))
    if found or entry.variadic or is_logical(name):
        return (() if entry.variadic else found), False
    together = tuple(_floats_of(f))
    return (together, True) if len(together) > 1 and _linear_in(f, together) else ((), False)


@cache
def degrees(name: str) -> tuple[float | None, ...]:
    """Return by operand the power at which a factor on it alone comes out, or None."""
    f = Function(sample(name))
    return tuple(_degree(f, (i,)) if i in _floats_of(f) else None for i in range(len(f.types)))


def _degree(f: Function, positions: Sequence[int]) -> float | None:
    if not _single_float(f):
        return None
    found: set[float] = set()
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
def alike(name: str) -> tuple[float | None, ...] | None:
    """Return that a common factor on all numbers comes out, where none on one of them does."""
    f = Function(sample(name))
    numbers = _floats_of(f)
    if len(numbers) < 2 or any(degrees(name)) or not is_elementwise(name):
        return None
    if _degree(f, numbers) != 1.0:
        return None
    return tuple(1.0 if i in numbers else None for i in range(len(f.types)))


# --- the rest


@cache
def is_logical(name: str) -> bool:
    """Whether truth values go in or out of an elementwise operation."""
    f = Function(sample(name))
    kinds = [t.dtype.kind for t in (*f.types, *(v.type for v in f.node.results))]
    return is_elementwise(name) and "bool" in kinds


PIECES = ("index", "chunk")
"""Parts of a value whose other parts may be gone when they are used: they are kept themselves."""


@cache
def is_alias(name: str) -> bool:
    """Whether each element of the result is a number times one element of the first operand."""
    f = Function(sample(name))
    if not _single_float(f) or 0 not in _floats_of(f) or OPS[name].variadic or name in PIECES:
        return False
    if _is_identity_on_mesh(name) or blocks_gradient(name):
        return False
    changes = [jacobian(f, f.draw(seed), 0) for seed in (0, 1)]
    once = bool(((np.abs(changes[0]) > 1e-9).sum(axis=1) == 1).all())
    constant = _close(*changes) and _same(
        f.floats(f.draw(0)), changes[0] @ f.draw(0)[0].data.ravel(), 1e-6
    )
    return once and constant and not any(_reaches(f, i) for i in range(1, len(f.types)))


@cache
def blocks_gradient(name: str) -> bool:
    """Whether no gradient flows through the lowering of an operation that is the identity."""
    f = Function(sample(name))
    if not is_elementwise(name) or len(f.types) != 1 or not _single_float(f):
        return False
    arrays = f.draw(0)
    if not _same(f.floats(arrays), arrays[0].data.ravel()):
        return False
    import jax
    from moecc_backends.xla.backend import function

    node = applied(OPS[name])
    node.graph.set_output("y", node.result)
    run = function(node.graph)
    given = Function(node).inputs(0)

    def total(x: Data) -> Data:
        return run({}, {**given, "x": x})["y"].sum()

    return not np.asarray(jax.grad(total)(np.float32(given["x"]))).any()


@cache
def normalises(name: str) -> bool:
    """Whether a shift or a factor of the first operand leaves a result of its type as it is."""
    f = Function(sample(name))
    if not mixed(name) or 0 not in _floats_of(f) or not _single_float(f):
        return False
    if f.node.result.type != f.types[0]:
        return False
    arrays = f.draw(0)
    made = f.floats(arrays)
    data = arrays[0].data
    shifted, scaled = (f.floats(_with(arrays, 0, d)) for d in (data + 3, data * 3))
    return _same(made, shifted, 1e-4) or _same(made, scaled, 1e-4)


@cache
def domain(name: str) -> Domain:
    """Return where an elementwise operation is defined."""
    f = Function(sample(name))
    if not is_elementwise(name) or not _single_float(f):
        return Domain.REAL
    arrays = f.draw(0)

    def finite(*values: float) -> bool:
        return all(
            np.isfinite(f.floats([replace(a, data=np.full_like(a.data, v)) for a in arrays])).all()
            for v in values
        )

    floats = all(t.dtype.is_float for t in f.types)
    if not floats or finite(-1.0, 0.0, 1000.0, -1000.0):
        return Domain.REAL
    return Domain.MODERATE if finite(-1.0, 0.0) else Domain.POSITIVE


@cache
def commutes(name: str) -> bool:
    """Whether two operands may be exchanged."""
    f = Function(sample(name))
    arrays = f.draw(0)
    if len(arrays) != 2 or OPS[name].variadic or {t.dtype for t in f.types} != {f.types[0].dtype}:
        return False
    try:
        one, other = f(arrays)[0], f(arrays[::-1])[0]
    except (ValueError, KeyError):
        return False
    return one.axes == other.axes and _same(one.data, other.data)


@cache
def roles(name: str) -> tuple[Role, ...]:
    """Return what a parameter is in each operand; the last ones are said if they are something."""
    f = Function(sample(name))
    found = [_role(f, i) for i in range(len(f.types))]
    while found and found[-1] is Role.VALUE:
        found.pop()
    return tuple(found)


def _role(f: Function, at: int) -> Role:
    name = f.node.op.name
    if at not in _floats_of(f) or not _single_float(f):
        return Role.VALUE
    if len(f.types) == 2 and linear(name) == ((0, 1), False) and mixed(name):
        return Role.MATRIX
    if linear(name)[0] == (at,) and len(f.types) == 2 and f.types[1].dtype.kind == "int":
        return Role.TABLE if not f.node.results[0].type.extents and _picks(f) else Role.VALUE
    summed = len(f.types) == 2 and linear(name) == ((0, 1), True)
    among = commutes(name) or summed or (normalises(name) and at > 0)
    if not among or not (is_elementwise(name) or normalises(name)):
        return Role.VALUE
    arrays = f.draw(0)
    made = f.floats(arrays)
    more = f.floats(_with(arrays, at, arrays[at].data + 0.25))
    if _same(np.abs(more - made), np.full_like(made, 0.25)):
        return Role.BIAS
    zero = f.floats(_with(arrays, at, np.zeros_like(arrays[at].data)))
    twice = f.floats(_with(arrays, at, 2 * arrays[at].data))
    return Role.GAIN if _same(twice - zero, 2 * (made - zero)) and _reaches(f, at) else Role.VALUE


def _picks(f: Function) -> bool:
    """Whether the second operand picks elements of the first: more rows need no more of it."""
    changes = jacobian(f, f.draw(0), 0)
    return bool(((np.abs(changes) > 1e-9).sum(axis=1) == 1).all()) and _reaches(f, 1)


@cache
def moves(name: str) -> RowMove | None:
    """Return whether tokens go to slots, or rows come back, by the axes of operands and result."""
    f = Function(sample(name))
    if name == "ragged_all_to_all" or not f.node.results:
        return None
    slot = "slot" in f.node.results[0].type, any("slot" in t for t in f.types)
    return {(True, False): RowMove.TO_SLOTS, (False, True): RowMove.TO_TOKENS}.get(slot)


@cache
def collective(name: str) -> Collective | None:
    """Return what a collective does, by where its operand and its result lie."""
    f = Function(sample(name))
    if len(f.types) != 1 or (not _is_identity_on_mesh(name) and "mesh" not in OPS[name].attrs):
        return (
            Collective.ANY
            if "to" in OPS[name].attrs and len(f.types) == 1 and name == "reshard"
            else None
        )
    if "mesh" not in OPS[name].attrs:
        return Collective.ANY
    before, after = f.types[0], f.node.result.type
    lies = {a.name: a.mesh for a in before}, {a.name: a.mesh for a in after}
    gained = any(len(lies[1][n]) > len(lies[0][n]) for n in lies[0])
    lost = any(len(lies[1][n]) < len(lies[0][n]) for n in lies[0])
    if before.unreduced != after.unreduced or (lost and not gained):
        return Collective.BRINGS
    return Collective.EXCHANGES if lost else Collective.LOCAL


@cache
def chooses(name: str) -> bool:
    """Whether scores in the first operand decide whole numbers."""
    f = Function(sample(name))
    decided = bool(f.types) and f.types[0].dtype.is_float
    return decided and f.node.results[0].type.dtype.kind == "int" and _reaches(f, 0)


@cache
def assigns_slots(name: str) -> bool:
    """Whether the last result says where rows go."""
    f = Function(sample(name))
    return f(f.draw(0))[-1].assignment is not None


@cache
def index(name: str) -> tuple[int, int, bool] | None:
    """Return the operand whose integers pick something, what they stay below, and if they must."""
    f = Function(sample(name))
    arrays = f.draw(0)
    if OPS[name].elementwise or any(a.assignment is not None for a in arrays):
        return None
    for at, type in enumerate(f.types):
        if type.dtype.kind != "int" or not (_is_nothing(f, at, 10**6) and _is_nothing(f, at, -1)):
            continue
        below = next(n for n in range(10**3) if _is_nothing(f, at, n))
        return at, below, _fails(f, at, below)
    return None


def _fails(f: Function, at: int, number: int) -> bool:
    arrays = f.draw(0)
    try:
        f(_with(arrays, at, np.full_like(arrays[at].data, number)))
    except (InputError, IndexError):
        return True
    return False


def _is_nothing(f: Function, at: int, number: int) -> bool:
    """Whether an operand that is `number` everywhere is refused, or gives nothing but a default."""
    if _fails(f, at, number):
        return True
    arrays = f.draw(0)
    made = f(_with(arrays, at, np.full_like(arrays[at].data, number)))[0].data
    return bool((made == -1).all() or (made.dtype == np.float64 and not made.any()))


def adds_up(f: Function) -> bool:
    """Whether an element of the result is a sum over several of the first operand."""
    return bool(((np.abs(jacobian(f, f.draw(0), 0)) > 1e-9).sum(axis=1) > 1).any())
