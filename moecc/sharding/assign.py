"""From the rules of a layout to the mesh axes of the dimensions of one operation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from moecc.errors import InputError, Problem
from moecc.ir.attributes import MergeAttrs, SplitAttrs
from moecc.ir.flow import Space, space_of
from moecc.ir.graph import Graph, Node
from moecc.ir.mesh import Mesh, nearest_divisor, nearest_multiple
from moecc.ir.table.slots import is_slots
from moecc.sharding.rules import LayoutRule
from moecc.types.tensor import Axis, Extent, Size, TensorType

PRODUCTS = ("contract", "embedding")
"""Operations where rules decide what is brought where; others stay where their operands are."""

FOLLOWING = ("positions", "random_uniform", "random_normal")
"""Operations that look at the axes of an operand alone: nothing is brought elsewhere for them."""


@dataclass
class Dimension:
    """A dimension of an operation, and where it lies.

    Attributes:
      axes: the axes that run along it; a count that its parts must divide stands as one.
      split: whether it may lie split at all.
      cuts: numbers that its parts should divide, too: heads, where the axis is cut into heads.
      mesh: the mesh axes that it lies on.
      rules: the rules that say so.
    """

    axes: list[Axis] = field(default_factory=list)
    split: bool = True
    cuts: set[int] = field(default_factory=set)
    mesh: tuple[str, ...] = ()
    rules: list[LayoutRule] = field(default_factory=list)

    @property
    def names(self) -> set[str]:
        """The names of its axes."""
        return {a.name for a in self.axes}


@dataclass(frozen=True)
class Assignment:
    """Where the dimensions of one operation lie.

    Attributes:
      space: which axis runs along which dimension.
      dimensions: the dimensions by name.
    """

    space: Space
    dimensions: Mapping[str, Dimension]

    def wanted(self, number: int, type: TensorType) -> TensorType:
        """Return `type`, of operand `number`, as it should lie; axes without influence stay."""
        names = self.space.operands[number]
        axes = (
            Axis(a.name, a.size, self.dimensions[names[a.name]].mesh if a.name in names else a.mesh)
            for a in type.axes
        )
        return TensorType(type.dtype, tuple(axes))

    def rules(self, number: int, type: TensorType) -> list[LayoutRule]:
        """Return the rules by which operand `number`, of `type`, should lie elsewhere."""
        names, wanted = self.space.operands[number], self.wanted(number, type)
        moved = [a.name for a, b in zip(type, wanted, strict=True) if a.mesh != b.mesh]
        found = (r for n in moved if n in names for r in self.dimensions[names[n]].rules)
        return list(dict.fromkeys(found))


@dataclass(frozen=True)
class Assigner:
    """Lays dimensions on a mesh by rules.

    Attributes:
      mesh: the mesh.
      rules: the rules, those that take mesh axes first in front.
      cuts: by the name of an axis, the numbers of what it is cut into or merged from.
      used: the mesh axes that anything lies on; it grows.
    """

    mesh: Mesh
    rules: Sequence[LayoutRule]
    cuts: Mapping[str, set[int]] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)

    def node(self, node: Node, placed: Iterable[bool]) -> Assignment:
        """Return where the dimensions of `node` lie.

        Args:
          node: the operation.
          placed: for each operand, whether it lies somewhere already.

        Raises:
          InputError: a rule that is not optional does not divide.
        """
        space = space_of(node.op, node.operands, node.attrs)
        dimensions = _dimensions(node, space)
        for dimension in dimensions.values():
            dimension.cuts = set().union(*(self.cuts.get(n, set()) for n in dimension.names))
        _pin(node, space, dimensions)
        ruled = node.op.name in PRODUCTS
        if ruled:
            self._by_rules(dimensions)
        self._follow(node, space, dimensions, placed)
        if not ruled and node.op.name not in FOLLOWING:
            self._by_rules(dimensions)
        return Assignment(space, dimensions)

    def lone(self, type: TensorType) -> TensorType:
        """Return `type`, of a value that is looked at by itself, as the rules lay it."""
        dimensions = {a.name: Dimension([a]) for a in type.axes}
        self._by_rules(dimensions)
        axes = (Axis(a.name, a.size, dimensions[a.name].mesh) for a in type.axes)
        return TensorType(type.dtype, tuple(axes))

    def stored(self, type: TensorType) -> TensorType:
        """Return the `type` of a parameter that lies for use, as it is stored.

        A parameter of one axis, the scale of a norm, stays as it is: it is small, and to gather
        hundreds of them costs more than to keep them.
        """
        if len(type.axes) < 2:
            return type
        taken = {m for a in type.axes for m in a.mesh}
        axes = {a.name: a for a in type.axes}
        for rule in self.rules:
            axis = axes.get(rule.axis)
            if rule.stored and axis is not None:
                more = self._free(rule, taken, Dimension([axis], mesh=axis.mesh))
                axes[rule.axis] = Axis(axis.name, axis.size, (*axis.mesh, *more))
        return type.with_axes(axes.values())

    def _by_rules(self, dimensions: Mapping[str, Dimension]) -> None:
        taken = {m for d in dimensions.values() for m in d.mesh}
        names = {n for d in dimensions.values() for n in d.names}
        for rule in self.rules:
            if rule.beside and rule.beside not in names:
                continue
            for dimension in dimensions.values():
                if rule.stored or not dimension.split or rule.axis not in dimension.names:
                    continue
                more = self._free(rule, taken, dimension)
                if more:
                    dimension.mesh = (*dimension.mesh, *more)
                    dimension.rules.append(rule)

    def _free(self, rule: LayoutRule, taken: set[str], dimension: Dimension) -> tuple[str, ...]:
        """Return the mesh axes of `rule` that are free and divide `dimension`, and take them."""
        more: list[str] = []
        for name in rule.mesh:
            if name not in self.mesh.names or name in taken:
                continue
            mesh = (*dimension.mesh, *more, name)
            parts = self.mesh.size(mesh)
            wrong = [a for a in dimension.axes if not _divides(a.size, parts)]
            if rule.optional and any(cut % parts for cut in dimension.cuts):
                continue
            if not wrong:
                more.append(name)
                taken.add(name)
            elif not rule.optional:
                raise InputError([self._problem(rule, wrong[0], mesh)])
        self.used.update(more)
        return tuple(more)

    def _problem(self, rule: LayoutRule, axis: Axis, mesh: tuple[str, ...]) -> Problem:
        parts, size = self.mesh.size(mesh), axis.size
        sizes = "*".join(f"{n}:{self.mesh.size((n,))}" for n in mesh)
        if not isinstance(size, int):
            return Problem(
                f"the axis {axis.name!r} has a size that a place sets, and cannot lie split",
                found=f"{axis}, and the rule {rule} ({rule.source})",
            )
        if axis.name == "expert" and parts > size:
            return Problem(
                "more devices for experts than experts",
                expected=f"at most {size} devices",
                found=f"{sizes}, by the rule {rule} ({rule.source})",
                hint="copy the experts over an outer axis: rules=st-moe-outer "
                f"mesh=outer:{parts // size},inner:{size}",
            )
        if axis.name == "groups":
            return Problem(
                "the groups of tokens do not divide over the mesh",
                expected=f"a multiple of {parts} ({sizes})",
                found=f"groups={size}, and the rule {rule} ({rule.source})",
                hint=f"specialize{{groups={nearest_multiple(size, parts)}}} first: capacities are "
                "then those of a device's own tokens",
            )
        return Problem(
            f"the axis {axis.name!r} does not divide over the mesh",
            expected=f"a multiple of {parts} ({sizes})",
            found=f"{axis}, and the rule {rule} ({rule.source})",
            hint=f"{nearest_divisor(size, parts)} parts would, or a size of "
            f"{nearest_multiple(size, parts)}; a ? after the rule leaves it out here",
        )

    def _follow(
        self,
        node: Node,
        space: Space,
        dimensions: Mapping[str, Dimension],
        placed: Iterable[bool],
    ) -> None:
        """Let dimensions that no rule lays lie as all of their operands do, where that is free."""
        taken = {m for d in dimensions.values() for m in d.mesh}
        found: dict[str, set[tuple[str, ...]]] = {}
        for value, names, known in zip(node.operands, space.operands, placed, strict=True):
            for axis in value.type.axes if known else ():
                if axis.name in names:
                    found.setdefault(names[axis.name], set()).add(axis.mesh)
        for name, meshes in found.items():
            dimension, (mesh, *others) = dimensions[name], meshes
            free = not dimension.mesh and dimension.split and not others
            if free and mesh and not taken & set(mesh) and self._fits(dimension, mesh):
                dimension.mesh = mesh
                taken.update(mesh)

    def _fits(self, dimension: Dimension, mesh: tuple[str, ...]) -> bool:
        return all(_divides(a.size, self.mesh.size(mesh)) for a in dimension.axes)


def _divides(size: Size, parts: int) -> bool:
    if isinstance(size, Extent):
        return size.kind == "groups" or parts == 1
    return isinstance(size, str) or size % parts == 0


def _dimensions(node: Node, space: Space) -> dict[str, Dimension]:
    dimensions: dict[str, Dimension] = {}
    values = [
        *zip(node.operands, space.operands, strict=True),
        *((v, space.result) for v in node.results),
    ]
    for value, names in values:
        for axis in value.type.axes:
            if axis.name in names:
                dimension = dimensions.setdefault(names[axis.name], Dimension())
                dimension.axes.append(Axis(axis.name, axis.size))
    for name, (what, count) in space.counts.items():
        dimensions[name].axes.append(Axis(what, count))
    for name in space.whole & set(dimensions):
        dimensions[name].split = False
    return dimensions


def cuts_of(graph: Graph) -> dict[str, set[int]]:
    """Return, by the name of an axis, the numbers of parts that it is cut into or merged from.

    Names of axes mean one thing in all of a model, so what a projection is cut into later counts
    where it is made.
    """
    cuts: dict[str, set[int]] = {}
    for node in graph:
        if node.op.name == "split":
            cut = SplitAttrs.of_node(node)
            if isinstance(parts := cut.into[0][1], int):
                cuts.setdefault(cut.axis, set()).add(parts)
        elif node.op.name == "merge":
            merge = MergeAttrs.of_node(node)
            outermost = node.operands[0].type[merge.axes[0]].size
            if isinstance(outermost, int):
                cuts.setdefault(merge.into, set()).add(outermost)
    return cuts


def _pin(node: Node, space: Space, dimensions: Mapping[str, Dimension]) -> None:
    """Let the dimensions of slots lie as the slots do: these are never brought elsewhere."""
    for value, names in zip(node.operands, space.operands, strict=True):
        for axis in value.type.axes if is_slots(value) else ():
            if axis.name in names:
                dimensions[names[axis.name]].mesh = axis.mesh
                dimensions[names[axis.name]].split = False
