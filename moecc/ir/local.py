"""The program of one device: local types and local attributes of a graph sharded on a mesh.

Every device runs the same operations on its local shards.  Beyond `local_attrs`, these operations
need the device's coordinates, because their result depends on the position in the global value:
``positions`` and random numbers along a sharded axis, ``embedding`` of a table with sharded rows,
``combine`` of sharded experts (other devices add the rest), ``within_buffer``,
which numbers groups, and ``mean`` over a sharded axis, which divides by the global size.
"""

from __future__ import annotations

from dataclasses import replace

from moecc.errors import InputError
from moecc.ir.graph import Node
from moecc.ir.mesh import Mesh, nearest_divisor, nearest_multiple
from moecc.ir.operand import Attrs
from moecc.support.text import amount
from moecc.types.tensor import Axis, TensorType


def local_size(axis: Axis, size: int, mesh: Mesh) -> int:
    """Return the size of a local shard of `axis`, whose global size is `size`.

    Raises:
      InputError: the mesh axes do not divide it.
    """
    parts = mesh.size(axis.mesh)
    if size % parts:
        raise InputError(
            f"the axis {axis.name!r} does not divide over the mesh",
            expected=f"a multiple of {parts} ({'*'.join(axis.mesh)})",
            found=str(size),
            hint=f"{amount(nearest_divisor(size, parts), 'part')} would, or a size of "
            f"{nearest_multiple(size, parts)}",
        )
    return size // parts


def local_type(type: TensorType, mesh: Mesh) -> TensorType:
    """Return the type of a local shard of a value of `type`; sizes that are not numbers stay."""
    axes = (
        Axis(a.name, local_size(a, a.size, mesh) if isinstance(a.size, int) else a.size)
        for a in type.axes
    )
    return replace(type.bare, axes=tuple(axes))


def local_attrs(node: Node, mesh: Mesh) -> Attrs:
    """Return the attributes with which a device runs `node` on its local shards: local counts."""
    return node.attrs if node.op.local is None else node.op.local(node, mesh)
