"""From the rules of a layout to the mesh axes of the dimensions of one operation."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from moecc.errors import InputError, Problem
from moecc.ir.graph import Node, Value
from moecc.ir.mesh import (
    Mesh,
    NamedType,
    Space,
    nearest_divisor,
    nearest_multiple,
    sharded_results,
    space_of,
)
from moecc.ir.ops.slots import is_slots
from moecc.ir.traits import Cost, Product
from moecc.sharding.rules import LayoutRule
from moecc.support.text import amount
from moecc.types import Axis, Extent, TensorType

# What propagation reads of a graph, whatever the mesh: its operations as loops over dimensions.
#
# A planner asks for hundreds of meshes of one graph, so this is read once.


@dataclass(frozen=True, eq=False)
class Site:
    """An operation of a graph, as propagation sees it.

    Attributes:
      node: the node.
      operands: its operands.
      space: which axis runs along which dimension.
      dimensions: the axes along each dimension, of operands and results, and the counts that its
        shards must divide.
    """

    node: Node
    operands: tuple[Value, ...]
    space: Space
    dimensions: Mapping[str, Sequence[Axis]]

    @cached_property
    def is_product(self) -> bool:
        """Whether the rules decide what is brought where; others stay where their operands are.

        What costs FLOPs or reads a table does, so that its operands come to it.
        """
        return self.node.op.cost in (
            *(Cost.PRODUCT, Cost.ATTENTION, Cost.RECURRENCE, Cost.LOOK_UP),
        )

    @cached_property
    def names(self) -> dict[str, tuple[str, ...]]:
        """The names of the axes along each dimension."""
        return {d: tuple({a.name: None for a in axes}) for d, axes in self.dimensions.items()}

    @cached_property
    def by_axis(self) -> dict[str, list[str]]:
        """The dimensions along which each axis runs, by its name."""
        dimensions: dict[str, list[str]] = {}
        for dimension, names in self.names.items():
            for name in names:
                dimensions.setdefault(name, []).append(dimension)
        return dimensions

    @cached_property
    def _results(self) -> dict[tuple[TensorType, ...], tuple[TensorType, ...]]:
        return {}

    def results(self, types: Sequence[TensorType]) -> tuple[TensorType, ...]:
        """Return the types of its results where its operands have `types`; worked out once.

        Raises:
          InputError: the operation does not accept an operand's sharding.
        """
        key = tuple(types)
        if key not in self._results:
            operands = [NamedType(v.name, t) for v, t in zip(self.operands, key, strict=True)]
            bare = [v.type for v in self.node.results]
            self._results[key] = sharded_results(self.node.op, self.space, operands, bare, None)
        return self._results[key]

    @cached_property
    def slots(self) -> tuple[int, ...]:
        """The positions of the operands that are slots."""
        return tuple(i for i, v in enumerate(self.operands) if is_slots(v))


def sites_of(nodes: Iterable[Node]) -> list[Site]:
    """Return the operations of `nodes`, which are in topological order."""
    return [_site(node) for node in nodes]


def _site(node: Node) -> Site:
    space = space_of(node.op, node.operands, node.attrs)
    dimensions: dict[str, list[Axis]] = {}
    values = [
        *zip(node.operands, space.operands, strict=True),
        *((v, space.result) for v in node.results),
    ]
    for value, names in values:
        for axis in value.type.axes:
            if axis.name in names:
                along, unsharded = (
                    dimensions.setdefault(names[axis.name], []),
                    Axis(axis.name, axis.size),
                )
                if unsharded not in along:
                    along.append(unsharded)
    for name, (noun, count) in space.counts.items():
        dimensions[name].append(Axis(noun, count))
    return Site(node, tuple(node.operands), space, dimensions)


def cuts_of(sites: Iterable[Site]) -> dict[str, set[int]]:
    """Return, by the name of an axis, the numbers of parts that it is cut into or merged from.

    Names of axes mean one thing in all of a model, so what a projection is cut into later counts
    where it is made.
    """
    cuts: dict[str, set[int]] = {}
    for site in sites:
        sizes = site.node.op.sizes
        product = None if sizes is None else sizes(site.node)
        if not isinstance(product, Product) or not isinstance(product.parts[0], int):
            continue
        before, after = site.node.operands[0].type, site.node.result.type
        if len(after) < len(before):
            before, after = after, before
        changed = (a.name for a in before if a.name not in after or after[a.name].size != a.size)
        joined = next(changed, None)
        if joined is not None:
            cuts.setdefault(joined, set()).add(product.parts[0])
    return cuts


Cuts = Mapping[str, Collection[int]]
"""By the name of an axis, the numbers of what it is cut into or merged from: heads, say."""


Answers = Mapping[tuple[int, tuple[str, ...]], bool]
"""Whether numbers are divided by the sizes of mesh axes."""

ROWS = (Axis("group", "group"), Axis("slot", "slot"))
"""The axes of rows that run beside those of a parameter of experts where it is used."""


@dataclass(slots=True)
class Dimension:
    """A dimension of an operation, and the mesh axes over which it is sharded.

    Attributes:
      axes: the axes that run along it; a count that its shards must divide is one, too.
      split: whether it may be sharded at all.
      cuts: numbers that its shards should divide, too: heads, where the axis is cut into heads.
      mesh: the mesh axes over which it is sharded.
      rules: the rules that say so.
    """

    axes: Sequence[Axis]
    split: bool = True
    cuts: Collection[int] = ()
    mesh: tuple[str, ...] = ()
    rules: tuple[LayoutRule, ...] = ()


class Assignment(NamedTuple):
    """How the dimensions of one operation are sharded.

    Attributes:
      site: the operation.
      dimensions: the dimensions by name.
    """

    site: Site
    dimensions: Mapping[str, Dimension]

    def wanted(self, number: int, type: TensorType) -> TensorType:
        """Return `type`, of operand `number`, sharded as it should be.

        Axes without influence on the operation stay as they are.
        """
        names, dimensions = self.site.space.operands[number], self.dimensions
        meshes = [dimensions[names[a.name]].mesh if a.name in names else a.mesh for a in type.axes]
        return type.sharded(tuple(meshes))

    def rules(self, number: int, type: TensorType) -> list[LayoutRule]:
        """Return the rules by which operand `number`, of `type`, should be sharded otherwise."""
        names, wanted = self.site.space.operands[number], self.wanted(number, type)
        if wanted is type:
            return []
        moved = [a.name for a, b in zip(type, wanted, strict=True) if a.mesh != b.mesh]
        rules = (r for n in moved if n in names for r in self.dimensions[names[n]].rules)
        return list(dict.fromkeys(rules))


@dataclass(frozen=True)
class Assigner:
    """Gives mesh axes to dimensions by rules.

    Attributes:
      mesh: the mesh.
      rules: the rules, those that take mesh axes first in front.
      free: names of axes and counts that any number of shards divides: they are set afterwards.
      lenient: whether every rule is left out where it does not divide.
      used: the mesh axes over which anything is sharded; it grows.
      asked: whether a number is divided by the sizes of mesh axes, as far as it was asked; a mesh
        of the same names that answers alike shards all alike.
    """

    mesh: Mesh
    rules: Sequence[LayoutRule]
    free: frozenset[str] = frozenset()
    lenient: bool = False
    used: set[str] = field(default_factory=set)
    asked: dict[tuple[int, tuple[str, ...]], bool] = field(default_factory=dict)

    def node(
        self, site: Site, operand_types: Sequence[TensorType | None], cuts: Cuts
    ) -> Assignment:
        """Return how the dimensions of an operation are sharded.

        Args:
          site: the operation.
          operand_types: for each operand its type, or None where it is sharded in no way yet.
          cuts: what axes are cut into or merged from.

        Raises:
          InputError: a rule that is not optional does not divide.
        """
        dimensions = {
            name: Dimension(axes, name not in site.space.unsharded)
            for name, axes in site.dimensions.items()
        }
        for axis, numbers in cuts.items():
            for name in site.by_axis.get(axis, ()):
                dimensions[name].cuts = {*dimensions[name].cuts, *numbers}
        _pin(site, operand_types, dimensions)
        if site.is_product:
            self._by_rules(dimensions, site.by_axis)
        self._follow(site, operand_types, dimensions)
        if not site.is_product and not site.space.shape_only:
            self._by_rules(dimensions, site.by_axis)
        return Assignment(site, dimensions)

    def lone(self, type: TensorType, beside: Sequence[Axis] = ()) -> TensorType:
        """Return `type`, of a value that is looked at by itself, sharded by the rules.

        Args:
          type: the type.
          beside: axes that run along with it where it is used, and take mesh axes, too.
        """
        dimensions = {a.name: Dimension((a,)) for a in (*type.axes, *beside)}
        self._by_rules(dimensions, {n: (n,) for n in dimensions})
        return type.sharded(tuple([dimensions[name].mesh for name in type.names]))

    def stored(self, type: TensorType) -> TensorType:
        """Return the `type` of a parameter that is sharded for use, as it is stored.

        A parameter of one axis, the scale of a norm, stays as it is: it is small, and to gather
        hundreds of them costs more than to keep them.
        """
        if len(type.axes) < 2 or not self.for_storage:
            return type
        used = {m for a in type.axes for m in a.mesh}
        axes = {a.name: a for a in type.axes}
        for rule in self.for_storage:
            axis = axes.get(rule.axis)
            if axis is not None:
                more = self._free(rule, used, Dimension((axis,), mesh=axis.mesh))
                axes[rule.axis] = Axis(axis.name, axis.size, (*axis.mesh, *more))
        return type.sharded(tuple([a.mesh for a in axes.values()]), type.unreduced)

    @cached_property
    def _for_use(self) -> tuple[LayoutRule, ...]:
        """The rules of values, and of parameters as they are used."""
        return self._on_mesh(stored=False)

    @cached_property
    def for_storage(self) -> tuple[LayoutRule, ...]:
        """The rules of parameters as they are stored."""
        return self._on_mesh(stored=True)

    def _on_mesh(self, *, stored: bool) -> tuple[LayoutRule, ...]:
        sizes = self.mesh.sizes
        rules = (r for r in self.rules if r.stored is stored)
        return tuple(r for r in rules if any(m in sizes for m in r.mesh))

    def _by_rules(
        self, dimensions: Mapping[str, Dimension], by_axis: Mapping[str, Sequence[str]]
    ) -> None:
        used = {m for d in dimensions.values() for m in d.mesh}
        for rule in self._for_use:
            if rule.axis not in by_axis or (rule.beside and rule.beside not in by_axis):
                continue
            for name in by_axis[rule.axis]:
                dimension = dimensions[name]
                more = self._free(rule, used, dimension) if dimension.split else ()
                if more:
                    dimension.mesh = (*dimension.mesh, *more)
                    dimension.rules = (*dimension.rules, rule)

    def _free(self, rule: LayoutRule, used: set[str], dimension: Dimension) -> tuple[str, ...]:
        """Return the mesh axes of `rule` that are free and divide `dimension`, and take them."""
        more: list[str] = []
        for name in rule.mesh:
            if name not in self.mesh.sizes or name in used:
                continue
            mesh = (*dimension.mesh, *more, name)
            wrong = [a for a in dimension.axes if not self._divides(a, mesh)]
            optional = rule.optional or self.lenient
            if optional and not all(self._parts_divide(c, mesh) for c in dimension.cuts):
                continue
            if not wrong:
                more.append(name)
                used.add(name)
            elif not optional:
                all_axes = (*mesh, *self._left(rule, {*used, name}))
                raise InputError([self._problem(rule, wrong[0], mesh, all_axes)])
        self.used.update(more)
        return tuple(more)

    def _left(self, rule: LayoutRule, used: Collection[str]) -> Iterable[str]:
        """Return the mesh axes that `rule`, and others for the same axis, would take besides."""
        names = (n for r in self._for_use if r.axis == rule.axis and not r.optional for n in r.mesh)
        return dict.fromkeys(n for n in names if n in self.mesh.sizes and n not in used)

    def _problem(
        self, rule: LayoutRule, axis: Axis, mesh: tuple[str, ...], whole_mesh: tuple[str, ...]
    ) -> Problem:
        """Return why `axis` is not over `mesh`, and what would be over all that its rule names."""
        parts, size = self.mesh.size(mesh), axis.size
        sizes = self._sizes(mesh)
        if not isinstance(size, int):
            return Problem(
                f"the axis {axis.name!r} has a size that slots set, and cannot be sharded",
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
        parts, sizes = self.mesh.size(whole_mesh), self._sizes(whole_mesh)
        would = f"{amount(nearest_divisor(size, parts), 'part')} would"
        multiple = nearest_multiple(size, parts)
        if axis.name == "groups":
            return Problem(
                "the groups of tokens do not divide over the mesh",
                expected=f"a multiple of {parts} ({sizes})",
                found=f"groups={size}, and the rule {rule} ({rule.source})",
                hint=f"{would}, or specialize{{groups={multiple}}} first, capacities being those "
                f"of a device's own tokens; in a recipe, data.batch={multiple} x run.micro_batches",
            )
        return Problem(
            f"the axis {axis.name!r} does not divide over the mesh",
            expected=f"a multiple of {parts} ({sizes})",
            found=f"{axis}, and the rule {rule} ({rule.source})",
            hint=f"{would}, or a size of {multiple}; optional = true leaves the rule out here",
        )

    def _sizes(self, mesh: Iterable[str]) -> str:
        return "*".join(f"{n}:{self.mesh.size((n,))}" for n in mesh)

    def _follow(
        self,
        site: Site,
        operand_types: Sequence[TensorType | None],
        dimensions: Mapping[str, Dimension],
    ) -> None:
        """Shard dimensions that no rule shards as all of their operands are, where that is free."""
        left = {n: d for n, d in dimensions.items() if d.split and not d.mesh}
        meshes: dict[str, set[tuple[str, ...]]] = {}
        for type, names in zip(operand_types, site.space.operands, strict=True) if left else ():
            for axis in type.axes if type is not None else ():
                if axis.name in names and names[axis.name] in left:
                    meshes.setdefault(names[axis.name], set()).add(axis.mesh)
        used = {m for d in dimensions.values() for m in d.mesh}
        for name, (mesh, *others) in meshes.items():
            if others or not used.isdisjoint(mesh):
                continue
            if mesh and self._fits(left[name], mesh):
                left[name].mesh = mesh
                used.update(mesh)

    def _fits(self, dimension: Dimension, mesh: tuple[str, ...]) -> bool:
        return all(self._divides(a, mesh) for a in dimension.axes)

    def _divides(self, axis: Axis, mesh: tuple[str, ...]) -> bool:
        size = axis.size
        if isinstance(size, str) or axis.name in self.free:
            return True
        if isinstance(size, Extent):
            # What slots set is known at run time: one shard alone divides it for certain.
            return size.kind == "groups" or self._parts_divide(1, mesh)
        return self._parts_divide(size, mesh)

    def _parts_divide(self, number: int, mesh: tuple[str, ...]) -> bool:
        key = (number, mesh)
        answer = self.asked.get(key)
        if answer is None:
            answer = self.asked[key] = number % self.mesh.size(mesh) == 0
        return answer

    def answers(self, asked: Answers) -> bool:
        """Whether all that another assigner `asked` of its mesh has the same answers on this."""
        return all((number % self.mesh.size(m) == 0) is yes for (number, m), yes in asked.items())


def _pin(
    site: Site, operand_types: Sequence[TensorType | None], dimensions: Mapping[str, Dimension]
) -> None:
    """Shard the dimensions of slots as the slots are: these are never brought elsewhere."""
    for number in site.slots:
        type = operand_types[number]
        for axis in type.axes if type is not None else ():
            if axis.name in site.space.operands[number]:
                dimension = dimensions[site.space.operands[number][axis.name]]
                dimension.mesh, dimension.split = axis.mesh, False
