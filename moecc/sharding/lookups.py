"""Tables whose columns stay where they are stored: all tokens come to them, and rows go back.

A device that has some columns of a table looks them up for the tokens of all devices that have the
others, and an exchange gives each device the whole rows of its own tokens.  So ids are gathered,
which are small, instead of the table; and the gradient of the table is complete where it is stored.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from moecc.ir.traits import Cost
from moecc.sharding.assign import Assignment, Dimension
from moecc.sharding.rules import LayoutRule
from moecc.sharding.sites import Site
from moecc.types.tensor import Axis, TensorType

Mesh = tuple[str, ...]


def looks_up_param(site: Site) -> bool:
    """Whether operand 0 is a parameter in which the operation looks up operand 1."""
    return site.node.op.cost is Cost.LOOK_UP and site.operands[0].is_param


def by_columns(
    assignment: Assignment, stored: TensorType, rules: tuple[LayoutRule, ...]
) -> Assignment | None:
    """Return how a table is looked up where its columns are stored; None: it is gathered.

    Tokens are gathered over the mesh axes of the columns, which have to be the innermost of theirs,
    in the same order: so one exchange brings what is looked up back to the tokens.  A table with
    fewer rows than columns, as of types of tokens, is smaller than what is looked up in it.

    Args:
      assignment: how the operation is sharded where the table is gathered.
      stored: the type of the table, operand 0, as it is stored; operand 1 are the ids.
      rules: those by which parameters are stored.
    """
    site, dimensions = assignment.site, assignment.dimensions
    names, tokens = site.space.operands[:2]
    found = max(_shared(assignment, stored), key=lambda f: len(f[2]), default=None)
    if found is None:
        return None
    axis, token, mesh = found
    column, along = dimensions[names[axis.name]], dimensions[tokens[token]]
    because = tuple(r for r in rules if r.axis == axis.name)
    return Assignment(
        site,
        {
            **dimensions,
            names[axis.name]: replace(column, mesh=(*column.mesh, *mesh), rules=because),
            tokens[token]: replace(along, mesh=along.mesh[: -len(mesh)], rules=because),
        },
    )


def _shared(assignment: Assignment, stored: TensorType) -> Iterator[tuple[Axis, str, Mesh]]:
    """Yield columns, a token axis, and the mesh axes that both could be sharded over."""
    space = assignment.site.space
    names, tokens = space.operands[:2]
    rows = [stored[n] for n, d in names.items() if d in space.summed]
    for axis in stored.axes:
        more = _beyond(axis, assignment.dimensions[names[axis.name]])
        if axis in rows or not all(_is_taller(r, axis) for r in rows):
            continue
        for token, dimension in tokens.items():
            mesh = assignment.dimensions[dimension].mesh
            for count in range(len(more), 0, -1):
                if mesh[-count:] == more[:count]:
                    yield axis, token, more[:count]
                    break


def _beyond(stored: Axis, used: Dimension) -> Mesh:
    """Return the mesh axes that shard an axis only while it is stored."""
    at = len(used.mesh)
    return stored.mesh[at:] if stored.mesh[:at] == used.mesh else ()


def _is_taller(rows: Axis, column: Axis) -> bool:
    return isinstance(rows.size, int) and isinstance(column.size, int) and rows.size >= column.size
