"""Collectives: the identity on the global value, changing only its sharding.

A mesh axis is added to and removed from an axis as its innermost mesh axis,
so that a part is always a run of neighbouring elements.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from moecc.errors import InputError, nearest
from moecc.ir.arrays import Array, meaning
from moecc.ir.operand import Operand
from moecc.ir.operation import OPS, Attr, Attrs, OpDef, register
from moecc.ir.ops.rules import axis_of
from moecc.ir.sharding_rules import spelled
from moecc.ir.traits import Collective
from moecc.types import Axis, Extent, TensorType, is_name

_MESH = Attr("axes", doc="the mesh axes, outermost first")


def _gathered(type: TensorType, name: str, mesh: tuple[str, ...]) -> TensorType:
    """Return `type` with the axis `name` no longer on the mesh axes `mesh`."""
    axis = axis_of(type, name)
    left = len(axis.mesh) - len(mesh)
    if not mesh or left < 0 or axis.mesh[left:] != mesh:
        raise InputError(
            f"the axis {name!r} is not sharded, innermost, over {'*'.join(mesh) or 'nothing'}",
            expected=f"{name}@…{'*'.join(mesh)}",
            found=spelled(axis),
        )
    return type.with_axes(replace(a, mesh=a.mesh[:left]) if a is axis else a for a in type.axes)


def _scattered(type: TensorType, name: str, mesh: tuple[str, ...]) -> TensorType:
    """Return `type` with the axis `name` split further over the mesh axes `mesh`."""
    axis = axis_of(type, name)
    used = {*type.unreduced, *(m for a in type.axes for m in a.mesh)}
    twice = [m for m in mesh if m in used]
    if twice or not mesh:
        raise InputError(
            f"the value is sharded over the mesh axis {twice[0]!r} already"
            if twice
            else "no mesh axis is named",
            found=str(type),
        )
    if isinstance(axis.size, Extent) and axis.size.kind != "groups":
        raise InputError(f"slots cannot be sharded: {name!r}", found=str(type))
    return type.with_axes(replace(a, mesh=(*a.mesh, *mesh)) if a is axis else a for a in type.axes)


def _reduced(type: TensorType, mesh: tuple[str, ...]) -> TensorType:
    """Return `type` as a sum that is carried out over `mesh`."""
    if not mesh or not set(mesh) <= set(type.unreduced):
        raise InputError(
            f"the value is not an unreduced sum over {', '.join(mesh) or 'nothing'}",
            found=str(type),
            hint="leave the collective out",
        )
    left = tuple(m for m in type.unreduced if m not in mesh)
    return TensorType(type.dtype, type.axes, left)


def _all_gather(type: TensorType, attrs: Attrs) -> TensorType:
    return _gathered(type, attrs["axis"], attrs["mesh"])


def _shard(type: TensorType, attrs: Attrs) -> TensorType:
    return _scattered(type, attrs["axis"], attrs["mesh"])


def _all_reduce(type: TensorType, attrs: Attrs) -> TensorType:
    return _reduced(type, attrs["mesh"])


def _reduce_scatter(type: TensorType, attrs: Attrs) -> TensorType:
    return _scattered(_reduced(type, attrs["mesh"]), attrs["axis"], attrs["mesh"])


def _moved(type: TensorType, attrs: Attrs) -> TensorType:
    if attrs["split"] == attrs["gather"]:
        raise InputError("an axis cannot be split and gathered at once", found=attrs["split"])
    gathered = _gathered(type, attrs["gather"], attrs["mesh"])
    return _scattered(gathered, attrs["split"], attrs["mesh"])


def _all_to_all(type: TensorType, attrs: Attrs) -> TensorType:
    if type.ragged is not None:
        raise InputError(
            "ragged rows are exchanged by ragged_all_to_all, which sends the rows that are there",
            found=str(type),
        )
    return _moved(type, attrs)


def _ragged_all_to_all(type: TensorType, attrs: Attrs) -> TensorType:
    if type.ragged is None or {attrs["split"], attrs["gather"]} != {"group", "expert"}:
        raise InputError(
            "ragged_all_to_all exchanges ragged rows between their groups and their experts",
            expected="an axis slot=ragged(%slots); split and gather group and expert",
            found=str(type),
            hint="all_to_all moves what is not ragged",
        )
    return _moved(type, attrs)


def parse_sharding(text: str) -> dict[str, tuple[str, ...]]:
    """Return the mesh axes of each axis that ``batch@data,mlp@model*expert`` names.

    Raises:
      InputError: the text is none.
    """
    placement: dict[str, tuple[str, ...]] = {}
    for part in filter(None, text.split(",")):
        name, at, where = part.partition("@")
        mesh = tuple(where.split("*"))
        if not at or not is_name(name) or not all(map(is_name, mesh)) or name in placement:
            raise InputError(
                "not a sharding", expected="batch@data,mlp@model*expert, or nothing", found=text
            )
        placement[name] = mesh
    return placement


def format_sharding(type: TensorType) -> str:
    """Return the text from which `parse_sharding` reads the sharding of `type`."""
    return ",".join(spelled(a) for a in type.axes if a.mesh)


def _reshard(type: TensorType, attrs: Attrs) -> TensorType:
    placement = parse_sharding(attrs["to"])
    for name in placement:
        if name not in type:
            hint = nearest(name, type.names)
            raise InputError(f"there is no axis {name!r}", found=str(type), hint=hint)
    axes = tuple(Axis(a.name, a.size, placement.get(a.name, ())) for a in type.axes)
    made = TensorType(type.dtype, axes)
    if format_sharding(made) != attrs["to"]:
        raise InputError(
            "a sharding names axes in their order, without spaces",
            expected=format_sharding(made),
            found=attrs["to"],
        )
    used = [m for a in axes for m in a.mesh]
    if len(set(used)) != len(used):
        raise InputError("a mesh axis is used twice", found=attrs["to"])
    return made


Change = Callable[[TensorType, Attrs], TensorType]

_CHANGES: dict[str, Change] = {}


def collective_type(name: str, type: TensorType, attrs: Attrs) -> TensorType:
    """Return what the collective `name` makes of the type of its operand.

    Raises:
      InputError: the collective cannot be done to such a value.
    """
    return _CHANGES[name](type, attrs)


def _register(name: str, doc: str, change: Change, does: Collective, **attrs: Attr) -> None:
    def infer(operands: Sequence[Operand], attrs: Attrs) -> tuple[TensorType, ...]:
        return (change(operands[0].type, attrs),)

    _CHANGES[name] = change
    row = OpDef(name, doc, ("x",), infer, attrs=attrs, linear=(0,), places=True, collective=does)
    register(row)


_SPLIT = Attr("axis", doc="the axis that is split over them afterwards")

_register(
    "reshard",
    """x, lying elsewhere, however it gets there.

    ``annotate-sharding`` puts it where the placements of two operations disagree;
    ``lower-collectives`` makes collectives of it.  A sum that is not yet carried out is.""",
    _reshard,
    Collective.ANY,
    to=Attr("str", "", doc="the sharded axes, `batch@data,mlp@model`; others are not"),
)
_register(
    "shard",
    "x, of which every device keeps its part along an axis; nothing is sent.",
    _shard,
    Collective.LOCAL,
    axis=_SPLIT,
    mesh=_MESH,
)
_register(
    "all_gather",
    "x, of which every device gets the parts of the others along an axis.",
    _all_gather,
    Collective.BRINGS,
    axis=Attr("axis", doc="the axis that is whole afterwards"),
    mesh=_MESH,
)
_register(
    "all_reduce",
    "x, a sum that is carried out over mesh axes; every device gets all of it.",
    _all_reduce,
    Collective.BRINGS,
    mesh=_MESH,
)
_register(
    "reduce_scatter",
    "x, a sum that is carried out over mesh axes; every device gets its part along an axis.",
    _reduce_scatter,
    Collective.BRINGS,
    axis=_SPLIT,
    mesh=_MESH,
)
_register(
    "all_to_all",
    "x, of which every device gives parts along one axis for parts along another.",
    _all_to_all,
    Collective.EXCHANGES,
    mesh=_MESH,
    split=_SPLIT,
    gather=Attr("axis", doc="the axis that is whole afterwards"),
)
_register(
    "ragged_all_to_all",
    "Ragged rows, exchanged between their groups and their experts; only rows that are there.",
    _ragged_all_to_all,
    Collective.EXCHANGES,
    mesh=_MESH,
    split=_SPLIT,
    gather=Attr("axis", doc="the axis that is whole afterwards"),
)

COLLECTIVES = tuple(name for name, entry in OPS.items() if entry.collective is not None)
"""The operations that change only a value's sharding."""


# The meaning of collectives on the global value: the identity.
#
# Their effect on each device is in `moecc.ir.devices`.


def _identity(x: Array, **attrs: object) -> Array:
    return x


for _name in COLLECTIVES:
    meaning(_name)(_identity)
