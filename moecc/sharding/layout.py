"""Layouts: which mesh axes shard the batch, the experts, the neurons and the parameters.

They are those of the rules by which ``annotate-sharding`` shards a graph: rules that the user
names, or those that the axes of the mesh stand for.  The paper's layout has the experts on the
rows of data and splits heads and neurons over ``model`` (ST-MoE, appendix H); ``fsdp`` splits
parameters too and gathers them where they are used.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property

from moecc.errors import InputError, Problem
from moecc.ir.mesh import Mesh
from moecc.sharding.assign import ROWS, Assigner
from moecc.sharding.rules import LayoutRule, read_layouts
from moecc.types import F32, Axis, TensorType

DENSE_WEIGHTS = ("whole", "split")
"""Whether parameters of no expert are replicated along the experts' axes, or sharded."""

TENSOR_AXES = ("q", "kv", "head", "kv_head", "mlp", "vocab")
"""The axes of values that tensor parallelism splits."""

KNOWN = frozenset({"batch", "group", "expert", "seq", *TENSOR_AXES})
"""The axes of values that a layout of a plan may split."""


@dataclass(frozen=True)
class Layout:
    """How everything is sharded.

    Attributes:
      mesh: the mesh.
      experts: how many experts a layer has, 0 in a dense model.
      dense_weights: one of `DENSE_WEIGHTS`.
      replicated: whether all devices of the experts' axes have the same tokens.
      stated: the names or files of the rules; empty: those that the mesh's axes stand for.
    """

    mesh: Mesh
    experts: int = 0
    dense_weights: str = "whole"
    replicated: bool = False
    stated: tuple[str, ...] = ()

    @classmethod
    def ruled(cls, mesh: Mesh, experts: int, rules: tuple[str, ...]) -> Layout:
        """Return the layout of rules that the user names.

        Raises:
          UsageError: there is no such layout.
          InputError: a file cannot be read, or splits an axis that a plan does not know.
        """
        layout = cls(mesh, experts, stated=rules)
        unknown = [r for r in layout.rules if not r.stored and r.axis not in KNOWN]
        if unknown:
            raise InputError(
                Problem(
                    f"the plan does not know what it costs to split the axis {rule.axis!r}",
                    rule.source,
                    ", ".join(sorted(KNOWN)),
                    str(rule),
                )
                for rule in unknown
            )
        apart = not set(layout.expert_axes) <= set(layout.batch_axes)
        dense = "split" if {"zero", "zero-expert"} & set(rules) else "whole"
        return cls(mesh, experts, dense, apart, rules)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The names of the rules, those that count most in front.

        ``fsdp`` comes first, so that the experts' axis shards the batch innermost and rows reach
        their experts by one exchange.

        Raises:
          InputError: tokens are to be the same along the axis of data.
        """
        if self.stated:
            return self.stated
        names = [n for n in ("fsdp",) if n in self.mesh.names]
        names += self._rows()
        if "model" in self.mesh.names and "st-moe" not in names:
            names.append("tensor-parallel")
        if self.dense_weights == "split":
            names.append("zero-expert" if self.has_expert_axis else "zero")
        return tuple(names)

    def _rows(self) -> list[str]:
        """Return the rules that shard the batch besides, and the experts."""
        if self.has_expert_axis:
            return ["expert-replicated" if self.replicated else "expert-parallel"]
        data = self.sizes.get("data", 1)
        if self.experts and data > 1 and self.experts % data == 0:
            if self.replicated:
                raise InputError(
                    "the rows of data cannot all have the same tokens",
                    where=f"mesh {self.mesh}",
                    hint="experts on an axis of their own: expert=8",
                )
            return ["st-moe"]
        return ["data-parallel"] if "data" in self.sizes else []

    @property
    def has_expert_axis(self) -> bool:
        """Whether there are experts and a mesh axis for them alone."""
        return self.experts > 0 and "expert" in self.sizes

    @cached_property
    def rules(self) -> tuple[LayoutRule, ...]:
        """The rules, those that count most in front."""
        return tuple(read_layouts(self.names))

    @cached_property
    def of_values(self) -> Layout:
        """The layout that shards values as this one does, and stores parameters as they are used.

        Layouts that differ in what is stored where have it in common.
        """
        return self if self.dense_weights == "whole" else replace(self, dense_weights="whole")

    @cached_property
    def assigner(self) -> Assigner:
        """What shards values and parameters; where a rule does not divide, it is left out."""
        return Assigner(self.mesh, self.rules, frozenset(("group", "groups")), lenient=True)

    def sharded(self, name: str, *, of_rows: bool = False) -> tuple[str, ...]:
        """Return the mesh axes over which an axis is sharded, outermost first.

        Args:
          name: of the axis.
          of_rows: whether it is one of rows, whose other axes take mesh axes, too.
        """
        if self.stated:
            return _sharded(self.assigner, name, of_rows)
        return _sharded_by_shipped(self.names, self.mesh.names, name, of_rows)

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes of the mesh axes by name, outermost first."""
        return self.mesh.sizes

    def size(self, axes: Iterable[str]) -> int:
        """Return the number of shards over mesh axes together."""
        return self.mesh.size(axes)

    def shards_of(self, type: TensorType) -> int:
        """Return the number of shards of a value of `type`."""
        return self.mesh.size(m for a in type.axes for m in a.mesh)

    def ordered(self, axes: Collection[str]) -> tuple[str, ...]:
        """Return mesh axes in the order of the mesh."""
        return tuple(n for n in self.mesh.names if n in axes)

    def split(self, axes: Iterable[str]) -> tuple[str, ...]:
        """Return those of mesh axes along which there are several devices."""
        return tuple(n for n in axes if self.mesh.sizes[n] > 1)

    @cached_property
    def expert_axes(self) -> tuple[str, ...]:
        """The mesh axes over which the experts are sharded."""
        return self.ordered(self.sharded("expert", of_rows=True)) if self.experts else ()

    @cached_property
    def batch_axes(self) -> tuple[str, ...]:
        """The mesh axes over which the batch is sharded."""
        return self.ordered(self.sharded("batch"))

    @cached_property
    def tensor_axes(self) -> tuple[str, ...]:
        """The mesh axes over which heads, neurons and the vocabulary are sharded."""
        return self.ordered({m for name in TENSOR_AXES for m in self.sharded(name)})

    @cached_property
    def sequence_axes(self) -> tuple[str, ...]:
        """The mesh axes over which sequences are sharded, between products or all through."""
        return self.ordered(self.sharded("seq"))

    @cached_property
    def shards(self) -> dict[str, int]:
        """In how many shards each axis of a value is."""
        return {
            **{name: self.size(self.sharded(name)) for name in TENSOR_AXES},
            "batch": self.size(self.batch_axes),
            "expert": self.size(self.expert_axes),
            "seq": self.size(self.sequence_axes),
        }

    @cached_property
    def used(self) -> frozenset[str]:
        """The mesh axes over which anything is sharded."""
        stored = {m for r in self.rules if r.stored for m in r.mesh}
        values = (*self.batch_axes, *self.expert_axes, *self.tensor_axes, *self.sequence_axes)
        return frozenset((*values, *stored))


def _sharded(assigner: Assigner, name: str, of_rows: bool) -> tuple[str, ...]:
    type = assigner.lone(TensorType(F32, (Axis(name, name),)), ROWS if of_rows else ())
    return type[name].mesh


@cache
def _sharded_by_shipped(
    names: tuple[str, ...], mesh: tuple[str, ...], name: str, of_rows: bool
) -> tuple[str, ...]:
    # An axis without a size is divided by any mesh, so the sizes of this one do not count.
    return _sharded(Assigner(Mesh(tuple((n, 1) for n in mesh)), read_layouts(names)), name, of_rows)


# Sharding specs of single arrays, by the names and sizes of their axes, without a graph.
#
# XLA's partitioner receives these; they are what propagation starts from at inputs and
# parameters.

ShardingSpec = dict[str, tuple[str, ...]]
"""For each axis that is sharded, its mesh axes, outermost first."""

Sizes = Mapping[str, int]
"""The sizes of the axes of an array, by name."""


def spec_of(type: TensorType) -> ShardingSpec:
    """Return the spec of a type."""
    return {axis.name: axis.mesh for axis in type if axis.mesh}


def value_spec(layout: Layout, sizes: Sizes) -> ShardingSpec:
    """Return how a value is sharded whose axes have `sizes`; what does not divide is left whole."""
    return spec_of(_lone(layout, sizes))


def group_spec(layout: Layout, sizes: Sizes) -> ShardingSpec:
    """Return how rows are sharded with their token groups, before or after an exchange."""
    return value_spec(layout, {name: size for name, size in sizes.items() if name == "group"})


def param_spec(layout: Layout, sizes: Sizes, *, stored: bool, layers: str = "") -> ShardingSpec:
    """Return how a parameter is sharded.

    Args:
      layout: the layout.
      sizes: of its axes; an axis of experts meets rows.
      stored: as it is stored, or else as it is used.
      layers: the axis along which layers are stacked, which is never sharded.
    """
    inner = {name: size for name, size in sizes.items() if name != layers}
    used = _lone(layout, inner, ROWS if "expert" in inner else ())
    return spec_of(layout.assigner.stored(used) if stored else used)


def _lone(layout: Layout, sizes: Sizes, beside: Sequence[Axis] = ()) -> TensorType:
    # Sizes are known here, and so are the numbers of groups.
    assigner = replace(layout.assigner, free=frozenset())
    type = TensorType(F32, tuple(Axis(name, size) for name, size in sizes.items()))
    return assigner.lone(type, beside)
