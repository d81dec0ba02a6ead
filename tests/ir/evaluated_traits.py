"""What else holds of an operation, found by evaluating its meaning."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np

from moecc.errors import InputError
from moecc.ir.arrays import Array, Data
from moecc.ir.traits import CollectiveKind, Domain, Role, RowMove

from .evaluated_axes import (
    crosses,
    floats_of,
    has_one_float,
    is_elementwise,
    is_identity_on_mesh,
    reaches,
    same,
    taken,
    with_data,
)
from .evaluated_derivatives import close, jacobian, linear
from .operations import Function, applied

PIECES = ("index", "chunk")
"""Parts of a value whose other parts may be gone when they are used: they are kept themselves."""


@cache
def is_alias(f: Function) -> bool:
    """Whether each element of the result is a number times one element of the first operand."""
    if not has_one_float(f) or 0 not in floats_of(f) or f.op.variadic or f.op.name in PIECES:
        return False
    if is_identity_on_mesh(f) or blocks_gradient(f):
        return False
    changes = [jacobian(f, f.draw(seed), 0) for seed in (0, 1)]
    once = bool((_dependencies(changes[0]) == 1).all())
    constant = close(*changes) and same(
        f.floats(f.draw(0)), changes[0] @ f.draw(0)[0].data.ravel(), 1e-6
    )
    return once and constant and not any(reaches(f, i) for i in range(1, len(f.types)))


def _dependencies(changes: Data) -> Data:
    """Return how many elements of the operand each element of the result depends on."""
    return (np.abs(changes) > 1e-9).sum(axis=1)


@cache
def blocks_gradient(f: Function) -> bool:
    """Whether no gradient flows through the lowering of an operation that is the identity."""
    if not is_elementwise(f) or len(f.types) != 1 or not has_one_float(f):
        return False
    arrays = f.draw(0)
    if not same(f.floats(arrays), arrays[0].data.ravel()):
        return False
    import jax
    from moecc_backends.xla.backend import function

    node = applied(f.op)
    node.graph.set_output("y", node.result)
    run = function(node.graph)
    given = Function(node).inputs(0)

    def total(x):
        return run({}, {**given, "x": x})["y"].sum()

    return not np.asarray(jax.grad(total)(np.float32(given["x"]))).any()


@cache
def mixed(f: Function) -> frozenset[str]:
    """Return the axes along which an element of a result needs several elements, or its place."""
    found = set()
    if not f.types or f.op.collective is not None:
        return frozenset()
    given = {n for t in f.types for n in t.names}
    made = {n for v in f.node.results for n in v.type.names}
    # The axes of values that are averaged or written into a state count as those of the first.
    first = (0, 2) if attends(f) or recurs(f) else (0,)
    own = {n for at in first if reaches(f, at) for n in f.types[at].names}
    for axis in own | (given & made):
        sizes = [t[axis].size for t in f.types if axis in t]
        there = [v.type[axis].size for v in f.node.results if axis in v.type]
        if not there:
            moved = is_alias(f) and _keeps_all(f)
            if not moved:
                found.add(axis)
        elif any(s != sizes[0] for s in there) or crosses(f, axis):
            found.add(axis)
    return frozenset(found)


def _keeps_all(f: Function) -> bool:
    """Whether the result has as many elements as the operand: axes have other names alone."""
    arrays = f.draw(0)
    return bool(f(arrays)[0].data.size == arrays[0].data.size)


@cache
def normalises(f: Function) -> bool:
    """Whether a shift or a factor of the first operand leaves a result of its type as it is."""
    if not mixed(f) or 0 not in floats_of(f) or not has_one_float(f):
        return False
    if f.node.result.type != f.types[0]:
        return False
    arrays = f.draw(0)
    made = f.floats(arrays)
    data = arrays[0].data
    shifted, scaled = (f.floats(with_data(arrays, 0, d)) for d in (data + 3, data * 3))
    return same(made, shifted, 1e-4) or same(made, scaled, 1e-4)


@cache
def domain(f: Function) -> Domain:
    """Return where an elementwise operation is defined."""
    if not is_elementwise(f) or not has_one_float(f):
        return Domain.REAL
    arrays = f.draw(0)

    def finite(*values):
        return all(
            np.isfinite(f.floats([replace(a, data=np.full_like(a.data, v)) for a in arrays])).all()
            for v in values
        )

    floats = all(t.dtype.is_float for t in f.types)
    if not floats or finite(-1.0, 0.0, 1000.0, -1000.0):
        return Domain.REAL
    return Domain.MODERATE if finite(-1.0, 0.0) else Domain.POSITIVE


@cache
def commutes(f: Function) -> bool:
    """Whether two operands may be exchanged."""
    arrays = f.draw(0)
    if len(arrays) != 2 or f.op.variadic or {t.dtype for t in f.types} != {f.types[0].dtype}:
        return False
    try:
        one, other = f(arrays)[0], f(arrays[::-1])[0]
    except (ValueError, KeyError):
        return False
    return one.axes == other.axes and same(one.data, other.data)


@cache
def roles(f: Function) -> tuple[Role, ...]:
    """Return what a parameter is in each operand; the last ones are said if they are something."""
    found = [_role(f, i) for i in range(len(f.types))]
    while found and found[-1] is Role.VALUE:
        found.pop()
    return tuple(found)


def _role(f: Function, at: int) -> Role:
    if at not in floats_of(f) or not has_one_float(f):
        return Role.VALUE
    if len(f.types) == 2 and linear(f) == ((0, 1), False) and mixed(f):
        return Role.MATRIX
    if linear(f)[0] == (at,) and len(f.types) == 2 and f.types[1].dtype.kind == "int":
        return Role.TABLE if not f.node.results[0].type.extents and _picks(f) else Role.VALUE
    summed = len(f.types) == 2 and linear(f) == ((0, 1), True)
    among = commutes(f) or summed or (normalises(f) and at > 0)
    if not among or not (is_elementwise(f) or normalises(f)):
        return Role.VALUE
    arrays = f.draw(0)
    made = f.floats(arrays)
    more = f.floats(with_data(arrays, at, arrays[at].data + 0.25))
    if same(np.abs(more - made), np.full_like(made, 0.25)):
        return Role.BIAS
    zero = f.floats(with_data(arrays, at, np.zeros_like(arrays[at].data)))
    twice = f.floats(with_data(arrays, at, 2 * arrays[at].data))
    return Role.GAIN if same(twice - zero, 2 * (made - zero)) and reaches(f, at) else Role.VALUE


def _picks(f: Function) -> bool:
    """Whether the second operand picks elements of the first: more rows need no more of it."""
    return bool((_dependencies(jacobian(f, f.draw(0), 0)) == 1).all()) and reaches(f, 1)


@cache
def moves(f: Function) -> RowMove | None:
    """Return whether tokens or gates go to slots, or rows come back, by the axes of all."""
    if f.op.name == "ragged_all_to_all" or not f.node.results:
        return None
    slot = "slot" in f.node.results[0].type, any("slot" in t for t in f.types)
    of_choices = len(f.types) == 3 and f.types[0].names == f.types[2].names
    to_slots = RowMove.GATES_TO_SLOTS if of_choices else RowMove.TO_SLOTS
    return {(True, False): to_slots, (False, True): RowMove.TO_TOKENS}.get(slot)


@cache
def collective(f: Function) -> CollectiveKind | None:
    """Return what a collective does, by where its operand and its result lie."""
    if len(f.types) != 1:
        return None
    if "mesh" not in f.op.attrs:
        is_any = f.op.name == "reshard" or is_identity_on_mesh(f)
        return CollectiveKind.ANY if is_any else None
    before, after = f.types[0], f.node.result.type
    gained = any(len(after[a.name].mesh) > len(a.mesh) for a in before)
    lost = any(len(after[a.name].mesh) < len(a.mesh) for a in before)
    if before.unreduced != after.unreduced or (lost and not gained):
        return CollectiveKind.BRINGS
    return CollectiveKind.EXCHANGES if lost else CollectiveKind.LOCAL


@cache
def attends(f: Function) -> bool:
    """Whether rows of the third operand are averaged, by weights that the first two decide."""
    if linear(f)[0] != (2,) or not (reaches(f, 0) and reaches(f, 1)):
        return False
    arrays = f.draw(0)
    made = f.floats(with_data(arrays, 2, np.ones_like(arrays[2].data)))
    return same(made, np.ones_like(made))


@cache
def recurs(f: Function) -> bool:
    """Whether the order counts along an axis that the third operand has and no result has."""
    if linear(f)[0] != (0, 2):
        return False
    arrays, results = f.draw(0), f.node.results
    gone = [n for n in f.types[2].names if all(n not in v.type for v in results)]
    for axis in gone:
        order = range(arrays[2].size(axis))[::-1]
        turned = f.floats([taken(a, axis, order) for a in arrays])
        if not same(turned, f.floats(arrays)):
            return True
    return False


@cache
def chooses(f: Function) -> bool:
    """Whether scores in the first operand decide whole numbers."""
    decided = bool(f.types) and f.types[0].dtype.is_float
    return decided and f.node.results[0].type.dtype.kind == "int" and reaches(f, 0)


@cache
def assigns_slots(f: Function) -> bool:
    """Whether the last result says where rows go."""
    return f(f.draw(0))[-1].assignment is not None


@cache
def index(f: Function) -> tuple[int, int, bool] | None:
    """Return the operand whose integers pick something, what they stay below, and if they must."""
    arrays = f.draw(0)
    if f.op.elementwise or any(a.assignment is not None for a in arrays):
        return None
    for at, type in enumerate(f.types):
        if type.dtype.kind != "int" or not (_is_nothing(f, at, 10**6) and _is_nothing(f, at, -1)):
            continue
        below = next(n for n in range(10**3) if _is_nothing(f, at, n))
        return at, below, _fails(f, at, below)
    return None


def _filled(f: Function, at: int, number: int) -> list[Array]:
    """Return the results where an operand is `number` everywhere."""
    arrays = f.draw(0)
    return f(with_data(arrays, at, np.full_like(arrays[at].data, number)))


def _fails(f: Function, at: int, number: int) -> bool:
    try:
        _filled(f, at, number)
    except (InputError, IndexError):
        return True
    return False


def _is_nothing(f: Function, at: int, number: int) -> bool:
    """Whether an operand that is `number` everywhere is refused, or gives nothing but a default."""
    if _fails(f, at, number):
        return True
    made = _filled(f, at, number)[0].data
    return bool((made == -1).all() or (made.dtype == np.float64 and not made.any()))


def adds_up(f: Function) -> bool:
    """Whether an element of the result is a sum over several of the first operand."""
    return bool((_dependencies(jacobian(f, f.draw(0), 0)) > 1).any())
