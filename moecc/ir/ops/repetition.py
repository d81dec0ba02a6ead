"""Repetition: ``scan`` and its body, stacking values, and picking from a stack.

``scan`` is the only operation with a region.  The body is a closed graph: what it uses of the
enclosing graph is an operand of the scan, so use lists, rewrites and dead-code elimination see
every use without looking inside.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from moecc.errors import InputError, Problem
from moecc.ir.arrays import Array, meaning
from moecc.ir.graph import Graph
from moecc.ir.mesh import ATTRIBUTE as MESH
from moecc.ir.operand import Operand
from moecc.ir.operation import Attr, Attrs, OpDef, register
from moecc.ir.ops.rules import axis_of, by_name, mixes_axis, no_ragged
from moecc.types import Axis, TensorType

if TYPE_CHECKING:
    from moecc.ir.graph import Node, Value


REMATERIALISATION = ("none", "block", "full", "save")
"""What a repetition keeps for the gradient: everything, its operands (of each of its layers under
``full``), or named values."""


def _infer_stack(operands: Sequence[Operand], attrs: Attrs) -> tuple[TensorType, ...]:
    first = operands[0].type
    for value in operands:
        if value.type != first:
            raise InputError(
                "stacked values must have one type", expected=str(first), found=str(value.type)
            )
    if first.extents:
        raise InputError("values with extents cannot be stacked", found=str(first))
    return (stacked(first, Axis(attrs["axis"], len(operands))),)


def stacked(type: TensorType, axis: Axis) -> TensorType:
    """Return `type` with `axis` in front. Raises: InputError where that name is taken."""
    if axis.name in type:
        raise InputError(f"there is an axis {axis.name!r} already", found=str(type))
    return type.with_axes((axis, *type.axes))


register(
    OpDef(
        "stack",
        "The operands, one after the other along a new axis, which is the first.",
        ("x",),
        _infer_stack,
        attrs={"axis": Attr("axis", doc="the new axis")},
        results=("stacked",),
        sharding=by_name,
        variadic=True,
    )
)


def _infer_index(operands: Sequence[Operand], attrs: Attrs) -> tuple[TensorType, ...]:
    type = operands[0].type
    axis = axis_of(type, attrs["axis"])
    no_ragged(type, (axis.name,), "cannot pick")
    if not isinstance(axis.size, int) or not 0 <= attrs["at"] < axis.size:
        raise InputError(
            f"there is no position {attrs['at']} on the axis {axis.name!r}",
            found=str(type),
            expected="0 <= at < size, and a known size",
        )
    return (type.without(axis.name),)


register(
    OpDef(
        "index",
        "x at one position of an axis, which is gone then.",
        ("x",),
        _infer_index,
        attrs={"axis": Attr("axis", doc="the axis"), "at": Attr("int", doc="the position")},
        mixes=mixes_axis,
        linear=(0,),
        sharding=by_name,
    )
)


def stacked_parts(value: Value, axis: str) -> list[Value] | None:
    """Return the values that `value` stacks along `axis`, or None if it is no stack."""
    node = value.node
    if node is None or node.op.name != "stack" or node.attrs["axis"] != axis:
        return None
    return list(node.operands)


def picked_at(node: Node, axis: str) -> int | None:
    """Return the position of `axis` that `node` picks from its operand, or None."""
    attrs: Attrs = node.attrs
    is_index = node.op.name == "index" and attrs["axis"] == axis
    return int(attrs["at"]) if is_index else None


def repetitions(attrs: Attrs) -> tuple[str, int]:
    """Return the name of the axis that a ``scan`` runs along, and how often the body runs."""
    (over,) = attrs["over"]
    return over  # type: ignore[no-any-return]


def _infer_scan(operands: Sequence[Operand], attrs: Attrs) -> tuple[TensorType, ...]:
    over = attrs["over"]
    if len(over) != 1 or not isinstance(over[0][1], int) or over[0][1] < 1:
        raise InputError("a scan runs along one axis of known size", found=str(over))
    carries, count = attrs["carries"], attrs["stacked"]
    if carries < 0 or count < 0 or carries + count > len(operands):
        raise InputError(
            "a scan has carries, then stacked operands, then captured ones",
            expected=f"carries + stacked <= {len(operands)}, the operands",
            found=f"{carries} + {count}",
        )
    if attrs["save"] and attrs["remat"] != "save":
        raise InputError("names are saved under remat=save alone", found=f"remat={attrs['remat']}")
    body: Graph = attrs["body"]
    axis = Axis(*repetitions(attrs))
    problems = [*_about_body(body, carries), *_about_operands(operands, body, attrs, axis)]
    if problems:
        raise InputError(problems)
    made = [v.type for v in body.terminator.operands]
    return (*made[:carries], *(stacked(t, axis) for t in made[carries:]))


def _about_body(body: Graph, carries: int) -> list[Problem]:
    found = []
    more = [*(f"param %{n}" for n in body.params), *(n for n in body.attrs if n != MESH)]
    if more:
        what = "a body contains only inputs, nodes and outputs"
        found.append(Problem(what, found=", ".join(more)))
    if len(body.output_names) < max(carries, 1):
        found.append(
            Problem(
                "a body returns its carries, and at least one value",
                expected=f"{max(carries, 1)} outputs",
                found=str(len(body.output_names)),
            )
        )
    if any(node.body is not None for node in body):
        found.append(Problem("a scan within a scan", hint="unroll the inner one"))
    open_types = [
        f"{value!r}"
        for value in (*body.inputs.values(), *body.terminator.operands)
        if value.type.extents
    ]
    if open_types:
        what = "values with extents cannot enter or leave a body"
        found.append(Problem(what, found=", ".join(open_types)))
    return found


def _about_operands(
    operands: Sequence[Operand], body: Graph, attrs: Attrs, axis: Axis
) -> list[Problem]:
    carries, count = attrs["carries"], attrs["stacked"]
    given = [v.type for v in operands]
    wanted = [v.type for v in body.inputs.values()]
    for at in range(carries, carries + count):
        if axis.name not in given[at] or given[at][axis.name].size != axis.size:
            return [
                Problem(
                    f"operand {at} is stacked and has no axis {axis}",
                    found=repr(operands[at]),
                )
            ]
        given[at] = given[at].without(axis.name)
    found = []
    if given != wanted:
        found.append(_differing("the inputs of the body are not its operands", given, wanted))
    made = [v.type for v in body.terminator.operands[:carries]]
    if made != given[: len(made)]:
        what = "a carry leaves the body with another type than it enters with"
        found.append(_differing(what, given[: len(made)], made))
    return found


def _differing(what: str, wanted: list[TensorType], found: list[TensorType]) -> Problem:
    for at, (a, b) in enumerate(zip(wanted, found, strict=False)):
        if a != b:
            return Problem(f"{what}: number {at}", expected=str(a), found=str(b))
    return Problem(what, expected=f"{len(wanted)}", found=f"{len(found)}")


def _mixes_all(operands: Sequence[Operand], attrs: Attrs) -> tuple[str, ...]:
    # The body may contain anything, so a scan counts as mixing all axes of its operands.
    return tuple(dict.fromkeys(n for v in operands for n in v.type.names))


SCAN_DOC = """The body, run once for each position of an axis, one after the other.

        Operands are the carries, then the stacked ones, then the captured ones; the body has an
        input for each. A carry goes in as it came out of the run before. A stacked operand goes in
        at the position of the run, without the axis. A captured one goes in as it is. The body
        returns the carries, then what is stacked: results are the last carries, and the others of
        all runs along the axis, which comes first.

        remat is what is kept of a run for the gradient. none: all values that the gradient needs,
        but for parameters, which are gathered again. full: the operands of the run alone; the rest
        is computed again, and within a run of several layers, layer by layer once more where they
        are alike. block: the same, but a run is computed again once, as a whole. save: the values
        of the names in `save`, which a backend gives, and the rest is computed again. It never
        changes a value."""


def _scan_attributes() -> dict[str, Attr]:
    return {
        "over": Attr("sizes", doc="the axis, and how often the body runs", pins=True),
        "carries": Attr("int", 0, doc="how many of the operands are carries"),
        "stacked": Attr("int", 0, doc="how many of them are stacked"),
        "remat": Attr("str", "none", REMATERIALISATION, doc="what is kept for the gradient"),
        "save": Attr("words", (), doc="remat=save: the names of what is kept"),
        "body": Attr("region", doc="what is repeated, in braces after the line"),
    }


register(
    OpDef(
        "scan",
        SCAN_DOC,
        ("x",),
        _infer_scan,
        attrs=_scan_attributes(),
        results=("y",),
        mixes=_mixes_all,
        variadic=True,
        places=True,
    )
)


# The meaning of repeating a body, stacking, and picking from a stack.


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
    from moecc.ir.interpreter import run_body

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
