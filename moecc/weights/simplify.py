"""Rewrites an expression into a simpler one with the same bytes and the same type.

An ordered list of rules for each kind of node, applied until none matches.  They move an `Index` or
a `Slice` down to the tensors and random streams, so that only the requested part is read or drawn;
they compute before data are copied or axes change; and they drop no-ops.  Every rule is exact under
rounding: two scalings are merged only where that is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from moecc.weights.arithmetic import Add, Cast, Minimum, Moment, Mul, Scale, Select
from moecc.weights.expr import Expr
from moecc.weights.movement import (
    Concat,
    Index,
    Merge,
    Permute,
    Rename,
    Slice,
    Split,
    Stack,
    Tile,
)
from moecc.weights.rules import arithmetic, movement, views

Rule = Callable[[Any], Expr | None]


def _reorder(e: Index | Slice) -> Expr | None:
    return views.reorder(e, simplify)


RULES: dict[type[Expr], tuple[Rule, ...]] = {
    Index: (views.push_index, _reorder),
    Slice: (views.drop_slice, views.push_slice, _reorder),
    Tile: (movement.fold_full, movement.rename_over_tile),
    Stack: (movement.same_operands, movement.stack_of_indices),
    Concat: (movement.same_fulls, movement.flatten_concat, movement.concat_of_slices),
    Split: (
        movement.fold_full,
        movement.trivial_split,
        movement.split_of_split,
        movement.split_of_merge,
        movement.split_of_rename,
    ),
    Merge: (
        movement.fold_full,
        movement.trivial_merge,
        movement.merge_of_split,
        movement.merge_of_merge,
        movement.merge_of_rename,
    ),
    Rename: (movement.drop_rename, movement.absorb_rename, movement.chain_of_renames),
    Permute: (
        movement.fold_full,
        movement.drop_permute,
        movement.permute_of_permute,
        movement.permute_of_copies,
        movement.permute_of_rename,
    ),
    Scale: (
        arithmetic.fold_numbers,
        arithmetic.scale_by_one,
        arithmetic.drop_widening,
        arithmetic.scale_of_scale,
        arithmetic.under_movement,
    ),
    Cast: (
        arithmetic.drop_cast,
        arithmetic.fold_numbers,
        arithmetic.cast_of_cast,
        arithmetic.under_movement,
    ),
    Add: (arithmetic.fold_numbers, arithmetic.drop_widening),
    Mul: (arithmetic.fold_numbers, arithmetic.mul_by_full, arithmetic.drop_widening),
    Minimum: (arithmetic.fold_numbers, arithmetic.drop_widening),
    Select: (arithmetic.select_constant,),
    Moment: (arithmetic.moment_of_all, arithmetic.drop_widening),
}


def simplify(expr: Expr) -> Expr:
    """Return the simplified expression, which has the same bytes."""
    passed: list[Expr] = []
    while (known := getattr(expr, "_simple", None)) is None:
        passed.append(expr)
        made = _step(expr)
        if made is expr:
            break
        expr = made
    if isinstance(known, Expr):
        expr = known
    for e in passed:
        # A self-referencing expression would have to wait for the cyclic collector.
        e._set("_simple", True if e is expr else expr)
    return expr


def steps(expr: Expr) -> Iterator[tuple[str, Expr, Expr]]:
    """Yield what `simplify` does to an expression: the name of a rule, before and after it."""
    for operand in expr.operands:
        yield from steps(operand)
    below = expr.with_operands(*map(simplify, expr.operands))
    found = _by_rule(below)
    if found is not None:
        yield (found[0].__name__, below, found[1])
        yield from steps(found[1])


def _step(expr: Expr) -> Expr:
    below = expr.with_operands(*map(simplify, expr.operands))
    if below is not expr:
        return below
    found = _by_rule(expr)
    return expr if found is None else found[1]


def _by_rule(expr: Expr) -> tuple[Rule, Expr] | None:
    """Return the first rule that changes an expression, and what it makes of it."""
    for rule in RULES.get(expr.__class__, ()):
        made = rule(expr)
        if made is not None and made is not expr:
            assert made.type == expr.type, f"{rule.__name__}: {expr} : {expr.type} to {made.type}"
            return rule, made
    return None
