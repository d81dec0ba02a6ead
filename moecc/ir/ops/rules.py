"""Typing rules that several operations share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from moecc.errors import InputError, nearest
from moecc.ir.mesh import Names, Rule, Space
from moecc.ir.operand import Attrs, Operand, OperationRow
from moecc.types import Axis, DType, TensorType


def axis_of(type: TensorType, name: str, noun: str = "the operand") -> Axis:
    """Return the axis `name` of `type`.

    Raises:
      InputError: there is no such axis; the nearest name is suggested.
    """
    axis = type.by_name.get(name)
    if axis is None:
        raise InputError(
            f"{noun} has no axis {name!r}", found=str(type), hint=nearest(name, type.names)
        )
    return axis


def need_float(type: TensorType, noun: str = "the operand") -> None:
    """Raise InputError unless `type` has floating-point elements."""
    if not type.dtype.is_float:
        raise InputError(f"{noun} must be floating-point", found=str(type))


def need_kind(type: TensorType, kind: str, noun: str) -> None:
    """Raise InputError unless the elements of `type` are of `kind`."""
    if type.dtype.kind != kind:
        raise InputError(f"{noun} must have {kind} elements", found=str(type))


def need_order(
    operands: Iterable[Operand], query: TensorType, key: TensorType, along: str, nouns: str
) -> None:
    """Raise InputError unless keys are in order along an axis that queries do not have.

    Args:
      operands: all operands, of which none may be the rows of experts, whose number varies.
      query: the queries.
      key: the keys.
      along: the axis of the keys.
      nouns: what else has the axis.
    """
    for operand in operands:
        if operand.type.extents:
            raise InputError(
                "the rows of experts are in no order",
                found=f"%{operand.name} : {operand.type}",
                hint="combine the rows first",
            )
    axis_of(key, along, "the key")
    if along in query:
        raise InputError(
            f"queries and keys share the axis {along!r}, along which keys are",
            found=str(query),
            hint=f"rename that of the keys{nouns}",
        )


def same_size(a: Axis, b: Axis) -> None:
    """Raise InputError unless two axes of one name have the same size."""
    if a.size != b.size:
        raise InputError(
            f"the axis {a.name!r} has two sizes",
            expected=str(a),
            found=str(b),
            hint="rename one of them, or slice it",
        )


def same_dtype(types: Sequence[TensorType]) -> DType:
    """Return the element type that all `types` share.

    Raises:
      InputError: they differ.
    """
    first = types[0].dtype
    for type in types:
        if type.dtype is not first and type.dtype != first:
            raise InputError(
                "the operands have different element types",
                expected=str(first),
                found=str(type.dtype),
                hint="cast one of them",
            )
    return first


def widest(types: Sequence[TensorType]) -> TensorType:
    """Return the operand type whose axes contain those of all others.

    Raises:
      InputError: an operand has an axis that the widest lacks, or sizes differ.
    """
    wide = max(types, key=len)
    for narrow in types:
        if narrow is wide:
            continue
        for axis in narrow.axes:
            mine = wide.by_name.get(axis.name)
            if mine is None:
                raise InputError(
                    f"no operand has all axes: {axis.name!r} is missing from one",
                    expected=f"axes contained in {wide}",
                    found=str(narrow),
                    hint="broadcast the operand that lacks the axis",
                )
            if mine.size != axis.size:
                same_size(mine, axis)
    return wide


def elementwise(operands: Sequence[Operand], attrs: Attrs) -> TensorType:
    """Infer the type of an elementwise operation: the operand type with all the axes."""
    first = operands[0].type
    if all(v.type is first for v in operands):
        return first
    types = [v.type for v in operands]
    same_dtype(types)
    return widest(types)


def arithmetic(operands: Sequence[Operand], attrs: Attrs) -> TensorType:
    """Infer an elementwise type of numeric operands."""
    for v in operands:
        if v.type.dtype.kind not in ("float", "int"):
            raise InputError("arithmetic needs numbers", found=str(v.type))
    return elementwise(operands, attrs)


def float_elementwise(operands: Sequence[Operand], attrs: Attrs) -> TensorType:
    """Infer an elementwise type of floating-point operands."""
    for v in operands:
        need_float(v.type)
    return elementwise(operands, attrs)


def no_duplicates(axes: Iterable[Axis]) -> tuple[Axis, ...]:
    """Return `axes`.

    Raises:
      InputError: two of them have the same name.
    """
    result = tuple(axes)
    names = [a.name for a in result]
    if len(set(names)) != len(names):
        twice = next(n for n in names if names.count(n) > 1)
        raise InputError(
            f"the result would have two axes {twice!r}",
            found=", ".join(map(str, result)),
            hint="rename one of them first",
        )
    return result


EXTENT_AXES = ("group", "expert")
"""The axes over which each kind of extent varies."""


def no_ragged(type: TensorType, names: Iterable[str], refusal: str) -> None:
    """Raise InputError if `type` is ragged and its extents depend on one of the axes `names`.

    Rows beyond an extent do not exist, so nothing may mix along them, nor along the axes on
    which the extents depend: the same slot of two experts may exist for one of them only.
    """
    ragged = type.ragged
    if ragged is None:
        return
    for name in names:
        if name == ragged.name:
            raise InputError(f"{refusal} along the ragged axis {name!r}", found=str(type))
        if name in EXTENT_AXES:
            raise InputError(
                f"{refusal} along {name!r}, on which the extents of {ragged.name!r} depend",
                found=str(type),
                hint="combine the rows first, or give the experts a capacity",
            )


# Sharding rules of operations: the dimensions each loops over (`moecc.ir.mesh`).


def _identity(names: Iterable[str]) -> dict[str, str]:
    return {n: n for n in names}


def named_dimensions(operands: Sequence[Operand]) -> tuple[tuple[Names, ...], dict[str, str]]:
    """Return dimensions named after the axes, of each operand and of all of them together."""
    every = _identity(n for v in operands for n in v.type.names)
    return tuple(_identity(v.type.names) for v in operands), every


def by_name(entry: OperationRow, operands: Sequence[Operand], attrs: Attrs) -> Space:
    """Axes of one name are one dimension; mixed axes must not be sharded."""
    return Space(*named_dimensions(operands), unsharded=frozenset(entry.mixes(operands, attrs)))


def by_place(entry: OperationRow, operands: Sequence[Operand], attrs: Attrs) -> Space:
    """Axes of one name are one dimension, and every device knows its elements' global indices.

    So random numbers may be sharded, although each depends on its global index.
    """
    return Space(*named_dimensions(operands), shape_only=True)


def summing(attribute: str) -> Rule:
    """Axes of one name are one dimension, and those that `attribute` names are summed over."""

    def rule(entry: OperationRow, operands: Sequence[Operand], attrs: Attrs) -> Space:
        return Space(*named_dimensions(operands), summed=frozenset(attrs[attribute]))

    return rule


def in_parts(entry: OperationRow, operands: Sequence[Operand], attrs: Attrs) -> Space:
    """Axes of one name are one dimension, and its shards must divide the equal runs."""
    counts = {attrs["axis"]: ("parts", attrs["parts"])}
    return Space(*named_dimensions(operands), counts=counts)


def renamed(entry: OperationRow, operands: Sequence[Operand], attrs: Attrs) -> Space:
    """The new name runs along the dimension of the old one."""
    axes = _identity(operands[0].type.names)
    result = {n: d for n, d in axes.items() if n != attrs["axis"]}
    return Space((axes,), {**result, attrs["to"]: attrs["axis"]})


def cut(entry: OperationRow, operands: Sequence[Operand], attrs: Attrs) -> Space:
    """The first of the new axes is the outermost, so a shard of the old axis is a shard of it."""
    axes = _identity(operands[0].type.names)
    result = {n: d for n, d in axes.items() if n != attrs["axis"]}
    return Space((axes,), {**result, attrs["into"][0][0]: attrs["axis"]})


def merged(entry: OperationRow, operands: Sequence[Operand], attrs: Attrs) -> Space:
    """The merged axis is sharded as its outermost part is; the others must not be."""
    axes = _identity(operands[0].type.names)
    first, *others = attrs["axes"]
    result = {n: d for n, d in axes.items() if n not in attrs["axes"]}
    return Space((axes,), {**result, attrs["into"]: first}, unsharded=frozenset(others))


def along_axis(entry: OperationRow, operands: Sequence[Operand], attrs: Attrs) -> Space:
    """Only the axis named by the attribute counts."""
    names = _identity([attrs["axis"]])
    return Space((names,), names, shape_only=True)


def looked_up(entry: OperationRow, operands: Sequence[Operand], attrs: Attrs) -> Space:
    """A device adds the rows of its shard of the table, and zeros for the others."""
    table, ids = (v.type for v in operands)
    rows = {n: n for n in table.names if n != attrs["axis"]}
    picked = {**rows, attrs["axis"]: f"table.{attrs['axis']}"}
    axes = _identity(ids.names)
    summed = frozenset([f"table.{attrs['axis']}"])
    return Space((picked, axes), {**rows, **axes}, summed=summed)


def _tokens(names: Iterable[str], tokens: Sequence[str]) -> dict[str, str]:
    """Return dimensions by name, of which the outermost token axis is that of the groups.

    Tokens are numbered outermost first and cut into groups, so a part of the outermost axis is a
    run of whole groups, and a part of another axis is not.
    """
    return {n: "group" if n == tokens[0] else n for n in names}


def _tokens_of(slots: Operand) -> tuple[str, ...]:
    """Return the token axes of the operation that assigns `slots`."""
    assert slots.node is not None, "the operation was inferred, so slots come from a node"
    tokens: tuple[str, ...] = slots.node.attrs["tokens"]
    return tokens


def numbered(entry: OperationRow, operands: Sequence[Operand], attrs: Attrs) -> Space:
    """Tokens are numbered in their groups, which may be sharded; nothing else may."""
    tokens = attrs["tokens"]
    names = tuple(_tokens(v.type.names, tokens) for v in operands)
    every = {n: d for axes in names for n, d in axes.items()}
    counts = {} if attrs["group_size"] else {"group": ("groups", attrs["groups"])}
    return Space(names, every, unsharded=frozenset(every.values()) - {"group"}, counts=counts)


def received(entry: OperationRow, operands: Sequence[Operand], attrs: Attrs) -> Space:
    """As slots are numbered; counts are left as they are."""
    # Where the counts lie is checked by the operation: of all that a device exchanges with.
    names = tuple(_tokens(v.type.names, attrs["tokens"]) for v in operands[:2])
    every = {n: d for axes in names for n, d in axes.items()}
    return Space((*names, {}), every, unsharded=frozenset(every.values()) - {"group"})


def dispatched(entry: OperationRow, operands: Sequence[Operand], attrs: Attrs) -> Space:
    """Groups of tokens become groups of rows; other token axes must not be sharded."""
    tokens = _tokens_of(operands[-1])
    names = tuple(_tokens(v.type.names, tokens) for v in operands)
    routing = {d for axes in names[1:] for d in axes.values()}
    result = {n: d for n, d in names[0].items() if n not in tokens}
    unsplit = frozenset((routing | set(tokens)) - {"group"})
    return Space(names, {**result, "group": "group"}, unsharded=unsplit)


def gates_dispatched(entry: OperationRow, operands: Sequence[Operand], attrs: Attrs) -> Space:
    """Groups of tokens become groups of gates; nothing else of a choice may be sharded."""
    names = tuple(_tokens(v.type.names, _tokens_of(operands[-1])) for v in operands)
    every = {d for axes in names for d in axes.values()}
    return Space(names, {"group": "group"}, unsharded=frozenset(every - {"group"}))


def combined(entry: OperationRow, operands: Sequence[Operand], attrs: Attrs) -> Space:
    """A device combines the rows of its experts; what other experts add is summed afterwards."""
    rows, _, slots = operands[:3]
    tokens = _tokens_of(slots)
    routing = tuple(_tokens(v.type.names, tokens) for v in operands[1:])
    axes = _identity(rows.type.names)
    unsplit = frozenset({"slot", *(d for r in routing for d in r.values())} - {"group", "expert"})
    result = {n: n for n in rows.type.names if n not in ("group", "expert", "slot")}
    result |= {n: d for n, d in routing[1].items() if n in tokens}
    return Space((axes, *routing), result, summed=frozenset(["expert"]), unsharded=unsplit)
