"""What one device sees of a graph that lies on a mesh: local types and local attributes.

Every device runs the same operations on its parts.  Beside `local_attrs`, these operations need to
know which part it is, because what they compute depends on the place in the whole:
``positions`` and random numbers along an axis that lies split, ``embedding`` of a table whose rows
lie split, ``combine`` of experts that lie split (other devices add the rest), ``within_buffer``,
which numbers groups, and ``mean`` over an axis that lies split, which divides by the size of all.
"""

from __future__ import annotations

from dataclasses import replace

from moecc.errors import InputError
from moecc.ir.graph import Node
from moecc.ir.mesh import Mesh, nearest_divisor, nearest_multiple
from moecc.ir.operand import Attrs
from moecc.types.tensor import Axis, TensorType


def local_size(axis: Axis, size: int, mesh: Mesh) -> int:
    """Return the size of a device's part of `axis`, whose size is `size`.

    Raises:
      InputError: it does not divide.
    """
    parts = mesh.size(axis.mesh)
    if size % parts:
        raise InputError(
            f"the axis {axis.name!r} does not divide over the mesh",
            expected=f"a multiple of {parts} ({'*'.join(axis.mesh)})",
            found=str(size),
            hint=f"{nearest_divisor(size, parts)} parts would, or a size of "
            f"{nearest_multiple(size, parts)}",
        )
    return size // parts


def local_type(type: TensorType, mesh: Mesh) -> TensorType:
    """Return the type of a device's part of a value of `type`; other sizes than numbers stay."""
    axes = (
        Axis(a.name, local_size(a, a.size, mesh) if isinstance(a.size, int) else a.size)
        for a in type.axes
    )
    return replace(type.bare, axes=tuple(axes))


def local_attrs(node: Node, mesh: Mesh) -> Attrs:
    """Return the attributes with which a device runs `node` on its parts: local counts."""
    return node.attrs if node.op.local is None else node.op.local(node, mesh)
