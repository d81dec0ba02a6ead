"""Collectives: the identity on the global value, changing only its sharding.

A mesh axis is added to and removed from an axis as its innermost mesh axis,
so that a part is always a run of neighbouring elements.  The effect of a collective on each device
is in `moecc.ir.devices`.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from moecc.errors import InputError, nearest
from moecc.ir.arrays import Array
from moecc.ir.mesh import spelled
from moecc.ir.operand import Attrs, Operand
from moecc.ir.operation import OPS, AxisName, AxisNames, Op, Word, operation
from moecc.ir.ops.rules import axis_of
from moecc.ir.traits import CollectiveKind
from moecc.terms.tensor import Tensor
from moecc.terms.term import Algebra
from moecc.types import Axis, Extent, TensorType, is_name


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


def collective_type(name: str, type: TensorType, attrs: Attrs) -> TensorType:
    """Return the type of the result of the collective `name` for an operand of `type`.

    Raises:
      InputError: the collective cannot be done to such a value.
    """
    declared = OPS[name].declared
    assert declared is not None, name
    assert issubclass(declared, _ShardingOp), name
    return declared(attrs).changed(type)


_collective = partial(operation, operands="x", linear=(0,), places=True, rearranges=True)


class _ShardingOp(Op):
    """An operation that changes only a value's sharding."""

    def term(self, algebra: Algebra, x: Tensor) -> Tensor:
        return x

    def infer(self, x: Operand) -> TensorType:
        return self.changed(x.type)

    def changed(self, type: TensorType) -> TensorType:
        """Return the type of the result for an operand of `type`."""
        raise NotImplementedError

    def meaning(self, x: Array) -> Array:
        return x


@_collective("reshard", collective=CollectiveKind.ANY)
class ReshardOp(_ShardingOp):
    """x, lying elsewhere, however it gets there.

    ``annotate-sharding`` puts it where the placements of two operations disagree;
    ``lower-collectives`` makes collectives of it.  A sum that is not yet carried out is.
    """

    to = Word("the sharded axes, `batch@data,mlp@model`; others are not", "")

    def changed(self, type: TensorType) -> TensorType:
        placement = parse_sharding(self.to)
        for name in placement:
            if name not in type:
                hint = nearest(name, type.names)
                raise InputError(f"there is no axis {name!r}", found=str(type), hint=hint)
        axes = tuple(Axis(a.name, a.size, placement.get(a.name, ())) for a in type.axes)
        resharded = TensorType(type.dtype, axes)
        if format_sharding(resharded) != self.to:
            raise InputError(
                "a sharding names axes in their order, without spaces",
                expected=format_sharding(resharded),
                found=self.to,
            )
        used = [m for a in axes for m in a.mesh]
        if len(set(used)) != len(used):
            raise InputError("a mesh axis is used twice", found=self.to)
        return resharded


class CollectiveOp(_ShardingOp):
    """An operation that moves data between devices."""

    @property
    def mesh(self) -> tuple[str, ...]:
        """The mesh axes, outermost first."""
        return self.attrs["mesh"]  # type: ignore[no-any-return]


class _AxisCollectiveOp(CollectiveOp):
    """A collective along one axis."""

    axis = AxisName("the axis that is split over them afterwards")
    mesh = AxisNames("the mesh axes, outermost first")


@_collective("shard", collective=CollectiveKind.LOCAL)
class ShardOp(_AxisCollectiveOp):
    """x, of which every device keeps its part along an axis; nothing is sent."""

    def changed(self, type: TensorType) -> TensorType:
        return _scattered(type, self.axis, self.mesh)


@_collective("all_gather", collective=CollectiveKind.BRINGS)
class AllGatherOp(_AxisCollectiveOp):
    """x, of which every device gets the parts of the others along an axis."""

    axis = AxisName("the axis that is whole afterwards")

    def changed(self, type: TensorType) -> TensorType:
        return _gathered(type, self.axis, self.mesh)


@_collective("all_reduce", collective=CollectiveKind.BRINGS)
class AllReduceOp(CollectiveOp):
    """x, a sum that is carried out over mesh axes; every device gets all of it."""

    mesh = AxisNames("the mesh axes, outermost first")

    def changed(self, type: TensorType) -> TensorType:
        return _reduced(type, self.mesh)


@_collective("reduce_scatter", collective=CollectiveKind.BRINGS)
class ReduceScatterOp(_AxisCollectiveOp):
    """x, a sum that is carried out over mesh axes; every device gets its part along an axis."""

    def changed(self, type: TensorType) -> TensorType:
        return _scattered(_reduced(type, self.mesh), self.axis, self.mesh)


class ExchangeOp(CollectiveOp):
    """A collective in which devices give parts along one axis for parts along another."""

    mesh = AxisNames("the mesh axes, outermost first")
    split = AxisName("the axis that is split over them afterwards")
    gather = AxisName("the axis that is whole afterwards")

    def changed(self, type: TensorType) -> TensorType:
        if self.split == self.gather:
            raise InputError("an axis cannot be split and gathered at once", found=self.split)
        return _scattered(_gathered(type, self.gather, self.mesh), self.split, self.mesh)


@_collective("all_to_all", collective=CollectiveKind.EXCHANGES)
class AllToAllOp(ExchangeOp):
    """x, of which every device gives parts along one axis for parts along another."""

    def changed(self, type: TensorType) -> TensorType:
        if type.ragged is not None:
            raise InputError(
                "ragged rows are exchanged by ragged_all_to_all, which sends the rows that are "
                "there",
                found=str(type),
            )
        return super().changed(type)


@_collective("ragged_all_to_all", collective=CollectiveKind.EXCHANGES)
class RaggedAllToAllOp(ExchangeOp):
    """Ragged rows, exchanged between their groups and their experts; only rows that are there."""

    def changed(self, type: TensorType) -> TensorType:
        if type.ragged is None or {self.split, self.gather} != {"group", "expert"}:
            raise InputError(
                "ragged_all_to_all exchanges ragged rows between their groups and their experts",
                expected="an axis slot=ragged(%slots); split and gather group and expert",
                found=str(type),
                hint="all_to_all moves what is not ragged",
            )
        return super().changed(type)
