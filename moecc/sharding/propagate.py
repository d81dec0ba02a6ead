"""Propagation: how every value of a graph is sharded by the rules of a layout, and where anew.

Nothing is changed: the pass ``annotate-sharding`` writes what is found into the graph, and a plan
prices it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Generic, TypeVar

from moecc.errors import InputError
from moecc.ir.graph import Node, Value, where
from moecc.ir.ops.slots import assigner
from moecc.ir.traits import Cost
from moecc.sharding.assign import Answers, Assigner, Assignment, Cuts, Dimension, Site, cuts_of
from moecc.sharding.layout import Layout
from moecc.sharding.rules import LayoutRule
from moecc.types import Axis, TensorType

# Tables whose columns stay where they are stored: all tokens come to them, and rows go back.
#
# A device that has some columns of a table looks them up for the tokens of all devices that have
# the others, and an exchange gives each device the whole rows of its own tokens.  So ids are
# gathered, which are small, instead of the table; and the gradient of the table is complete where
# it is stored.

MeshAxes = tuple[str, ...]


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
    shared = max(_shared(assignment, stored), key=lambda f: len(f[2]), default=None)
    if shared is None:
        return None
    axis, token, mesh = shared
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


def _shared(assignment: Assignment, stored: TensorType) -> Iterator[tuple[Axis, str, MeshAxes]]:
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


def _beyond(stored: Axis, used: Dimension) -> MeshAxes:
    """Return the mesh axes that shard an axis only while it is stored."""
    at = len(used.mesh)
    return stored.mesh[at:] if stored.mesh[:at] == used.mesh else ()


def _is_taller(rows: Axis, column: Axis) -> bool:
    return isinstance(rows.size, int) and isinstance(column.size, int) and rows.size >= column.size


@dataclass(frozen=True, eq=False)
class Reshard:
    """A value that is brought from one sharding to another.

    Attributes:
      operand: the value, or an earlier reshard of it.
      source: its type.
      target: its type afterwards.
      node: the operation that it is brought to; of a sum, or of rows that were looked up where
        the columns of a table are, the one that makes it.
      rules: the rules that want it so.
      is_sum: whether it carries out a sum, at once, for all that use it.
    """

    operand: Value | Reshard
    source: TensorType
    target: TensorType
    node: Node
    rules: tuple[LayoutRule, ...]
    is_sum: bool = False

    @property
    def value(self) -> Value:
        """The value that is brought elsewhere."""
        ref = self.operand
        while isinstance(ref, Reshard):
            ref = ref.operand
        return ref


Ref = Value | Reshard
"""A value as it was made, or brought elsewhere."""


@dataclass(frozen=True)
class Propagation:
    """How the values of a graph are sharded.

    Attributes:
      types: of each value as it is made, and of each reshard.
      wanted: of each parameter as its first use wants it; a look-up where its columns are stored
        counts where there is no other.
      visible: of each value what others see: itself, or its sum carried out, or whole rows.
      operands: of each node what it takes.
      reshards: what is brought elsewhere, in the order of the nodes.
    """

    types: dict[Ref, TensorType] = field(default_factory=dict)
    wanted: dict[Value, TensorType] = field(default_factory=dict)
    visible: dict[Value, Ref] = field(default_factory=dict)
    operands: dict[Node, tuple[Ref, ...]] = field(default_factory=dict)
    reshards: list[Reshard] = field(default_factory=list)

    @property
    def sharded(self) -> int:
        """How many values are sharded, or sums that are still to be carried out."""
        return sum(self.types[value].is_sharded for value in self.visible)

    def used(self, node: Node) -> list[TensorType]:
        """Return the types of the operands that `node` takes."""
        return [self.types[ref] for ref in self.operands[node]]


def propagate(
    sites: Sequence[Site],
    inputs: Iterable[Value],
    params: Iterable[Value],
    assigner: Assigner,
    cuts: Cuts | None = None,
) -> Propagation:
    """Return how the values that `sites` take and make are sharded.

    Args:
      sites: the operations, in topological order.
      inputs: values from outside, sharded as the rules shard a value by itself.
      params: parameters, sharded as their first use wants them, and stored as the rules store.
      assigner: the rules and the mesh.
      cuts: what axes are cut into; None: as `sites` say.

    Raises:
      InputError: a rule does not divide; an operation cannot take its operands.
    """
    walk = _Walk(assigner, cuts_of(sites) if cuts is None else cuts)
    for value in inputs:
        walk.make(value, assigner.lone(value.type))
    for site in sites:
        try:
            walk.site(site)
        except InputError as error:
            raise InputError(
                replace(p, where=p.where or where(site.node)) for p in error.problems
            ) from None
    for value in params:
        if value not in walk.found.visible:
            walk.store(value, assigner.lone(value.type))
    return walk.found


class _Walk:
    """The state of one propagation."""

    def __init__(self, assigner: Assigner, cuts: Cuts) -> None:
        self.assigner = assigner
        self.cuts = cuts
        self.found = Propagation()
        self.made: dict[tuple[Ref, TensorType, str], Reshard] = {}
        self.looked_up: set[Value] = set()

    def make(self, value: Value, type: TensorType) -> None:
        self.found.types[value] = type
        self.found.visible[value] = value

    def store(self, value: Value, wanted: TensorType) -> None:
        self.found.wanted[value] = wanted
        self.make(value, self.assigner.stored(wanted))

    def site(self, site: Site) -> None:
        node, types, visible = site.node, self.found.types, self.found.visible
        refs = [visible.get(v) for v in site.operands]
        if node.op.moves is not None:
            # Slots and the experts that they were given for belong together.
            refs[1] = self._experts_of(site.operands[2])
        operand_types = [None if ref is None else types[ref] for ref in refs]
        first = self.assigner.node(site, operand_types, self.cuts)
        assignment = self._by_columns(first, operand_types[0]) if looks_up_param(site) else first
        for number, value in enumerate(site.operands):
            self._want(assignment, number, value, is_lasting=assignment is first)
        operands = tuple(
            self._brought(assignment, number, ref or visible[site.operands[number]])
            for number, ref in enumerate(refs)
        )
        self.found.operands[node] = operands
        for value, type in zip(
            node.results, site.results([types[r] for r in operands]), strict=True
        ):
            self.make(value, type)
            if type.unreduced:
                visible[value] = self._summed(assignment, value, type)
            elif assignment is not first:
                visible[value] = self._whole_rows(first, assignment, value, type)

    def _by_columns(self, first: Assignment, stored: TensorType | None) -> Assignment:
        """Return how a table is looked up, `first` where it is gathered."""
        if stored is None:
            table = first.site.operands[0].type
            stored = self.assigner.stored(first.wanted(0, table))
        return by_columns(first, stored, self.assigner.for_storage) or first

    def _want(self, assignment: Assignment, number: int, value: Value, *, is_lasting: bool) -> None:
        """Store a parameter where it is met first, and as a use that lasts wants it."""
        if value not in self.found.visible:
            self.store(value, assignment.wanted(number, value.type))
            if number == 0 and not is_lasting:
                self.looked_up.add(value)
        elif is_lasting and value in self.looked_up:
            self.looked_up.remove(value)
            self.found.wanted[value] = assignment.wanted(number, self.found.types[value])

    def _experts_of(self, slots: Value) -> Ref:
        """Return the experts that `slots` were assigned to."""
        node = assigner(slots)
        if node.op.chooses:
            return self.found.visible[node.results[0]]
        return self.found.operands[node][0]

    def _brought(self, assignment: Assignment, number: int, ref: Ref) -> Ref:
        """Return operand `number` as the operation wants it."""
        type = self.found.types[ref]
        wanted = assignment.wanted(number, type)
        if wanted is type:
            return ref
        rules = assignment.rules(number, type) or self._rules_of(type, wanted)
        return self._reshard(Reshard(ref, type, wanted, assignment.site.node, tuple(rules)))

    def _rules_of(self, type: TensorType, wanted: TensorType) -> list[LayoutRule]:
        """Return the rules behind how a value is sharded now, and shall not be."""
        axes = {a.name for a, b in zip(type, wanted, strict=True) if a.mesh != b.mesh}
        return [r for r in self.assigner.rules if r.axis in axes]

    def _summed(self, assignment: Assignment, value: Value, type: TensorType) -> Reshard:
        """Carry out the sum `value`, so that it is sharded as the rules want it."""
        wanted = self.assigner.lone(type.bare)
        # What no rule shards stays as it is.
        used = {m for a in wanted.axes for m in a.mesh}
        meshes = [
            mesh if mesh or used & set(old) else old
            for mesh, old in zip(wanted.meshes, type.meshes, strict=True)
        ]
        summed = sorted(assignment.site.space.summed)
        rules = tuple(r for d in summed for r in assignment.dimensions[d].rules)
        target = type.sharded(tuple(meshes))
        node = assignment.site.node
        return self._reshard(Reshard(value, type, target, node, rules, is_sum=True))

    def _whole_rows(
        self, first: Assignment, assignment: Assignment, value: Value, type: TensorType
    ) -> Reshard:
        """Bring what was looked up in columns to where a gathered table would have made it."""
        names, before = first.site.space.result, first.dimensions
        target = type.sharded(tuple([before[names[a.name]].mesh for a in type.axes]))
        changed = [d for name, d in assignment.dimensions.items() if d is not before[name]]
        rules = tuple(dict.fromkeys(r for d in changed for r in d.rules))
        return self._reshard(Reshard(value, type, target, first.site.node, rules))

    def _reshard(self, reshard: Reshard) -> Reshard:
        """Return a reshard, or the same one that was made before.

        A parameter is brought anew for every layer, so that it need not stay there.
        """
        ref = reshard.operand
        is_param = isinstance(ref, Value) and ref.is_param
        key = (ref, reshard.target, reshard.node.loc if is_param else "")
        if key not in self.made:
            self.made[key] = reshard
            self.found.types[reshard] = reshard.target
            self.found.reshards.append(reshard)
        return self.made[key]


# What is worked out once for all meshes on which it is the same.
#
# The sizes of a mesh decide nothing but whether they divide a number.  So what an assigner found is
# found again on every mesh with the same axes and rules whose sizes answer alike all that was
# asked.

T = TypeVar("T")


@dataclass(frozen=True)
class Alike(Generic[T]):
    """Remembers what was made under layouts."""

    _known: dict[Hashable, list[tuple[Answers, T]]] = field(default_factory=dict)

    def under(self, layout: Layout, key: Hashable, make: Callable[[Assigner], T]) -> T:
        """Return what `make` makes, or made, with an assigner that shards as that of `layout`.

        Args:
          layout: the layout.
          key: what is made.
          make: makes it; of the mesh it may read nothing but what the assigner answers.
        """
        outcomes = self._known.setdefault((key, layout.names, tuple(layout.sizes)), [])
        for asked, outcome in outcomes:
            if layout.assigner.answers(asked):
                return outcome
        assigner = replace(layout.assigner, asked={})
        outcome = make(assigner)
        outcomes.append((assigner.asked, outcome))
        return outcome
