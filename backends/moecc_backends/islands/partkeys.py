"""Whether two parts are the same computation: the same operations on corresponding operands."""

from __future__ import annotations

from moecc.ir.graph import Value, setter_of
from moecc.ir.structure import attributes
from moecc.types import Axis, Extent
from moecc_backends.islands.parts import Part


def part_key(part: Part) -> tuple[object, ...]:
    """Return what is equal for parts that one lowering serves."""
    numbers: dict[Value, int] = {part.x: 0}
    lines: list[object] = [_axes(part.x, numbers)]
    for node in part.side_nodes:
        for operand in node.operands:
            if operand.node is None and operand not in numbers:
                numbers[operand] = len(numbers)
                lines.append(_axes(operand, numbers))
        uses = tuple(numbers[v] for v in node.operands)
        for value in node.results:
            numbers[value] = len(numbers)
        types = tuple(_axes(v, numbers) for v in node.results)
        lines.append((node.op.name, uses, attributes(node.attrs), types))
    lines.append(tuple(numbers[v] for v in (part.y, *part.side)))
    return tuple(lines)


def _axes(value: Value, numbers: dict[Value, int]) -> object:
    return (value.type.dtype.name, tuple(_axis(a, numbers) for a in value.type.axes))


def _axis(axis: Axis, numbers: dict[Value, int]) -> object:
    if isinstance(axis.size, Extent):
        return (axis.name, axis.size.kind, numbers.get(setter_of(axis.size), -1))
    return (axis.name, axis.size)
