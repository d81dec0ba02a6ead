"""What the backward pass sums over the mesh: gradients of which each device has a part.

A gradient with respect to an operand is a sum over the dimensions along which the operand has no
axis.  Where such a dimension is sharded, each device has the sum over its shard: a parameter that
is the same along an axis of data, or what a product over sharded neurons was made of.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from moecc.ir.graph import Value
from moecc.sharding.propagate import Propagation
from moecc.sharding.sites import Site
from moecc.types.tensor import TensorType


@dataclass(frozen=True)
class GradientSum:
    """A gradient that is summed where an operation differs from device to device.

    Attributes:
      site: the operation.
      number: of the operand whose gradient it is.
      axes: the mesh axes to sum over.
    """

    site: Site
    number: int
    axes: frozenset[str]


@dataclass(frozen=True)
class Gradients:
    """The sums of a backward pass.

    Attributes:
      params: of each parameter, the mesh axes over which its gradient is summed.
      values: those of other values, in the order of the nodes.
    """

    params: dict[Value, set[str]] = field(default_factory=dict)
    values: list[GradientSum] = field(default_factory=list)


@dataclass(frozen=True)
class Dependence:
    """What a gradient flows to.

    Attributes:
      differentiable: values that depend on parameters, these included.
      of_inputs: values that depend on inputs.
    """

    differentiable: set[Value]
    of_inputs: set[Value]

    def is_deferred(self, value: Value) -> bool:
        """Whether parameters alone make `value`: their gradient is summed, and not its own."""
        return value in self.differentiable and value not in self.of_inputs


def dependence(sites: Iterable[Site], inputs: Iterable[Value]) -> Dependence:
    """Return which values of `sites` depend on parameters, and which on inputs."""
    differentiable, of_inputs = set[Value](), set(inputs)
    for site in sites:
        differentiable.update(v for v in site.operands if v.is_param and v.type.dtype.is_float)
        if not site.space.shape_only and not of_inputs.isdisjoint(site.operands):
            of_inputs.update(site.node.results)
        if site.node.op.blocks_gradient or differentiable.isdisjoint(site.operands):
            continue
        differentiable.update(v for v in site.node.results if v.type.dtype.is_float)
    return Dependence(differentiable, of_inputs)


def gradients(sites: Sequence[Site], found: Propagation, on: Dependence) -> Gradients:
    """Return the sums of the backward pass of `sites`, sharded as was `found`."""
    made = Gradients()
    deferred: dict[Value, set[str]] = made.params
    for site in reversed(sites):
        left = {m for v in site.node.results for m in deferred.get(v, ())}
        along = None
        for number, value in enumerate(site.operands):
            if value not in on.differentiable:
                continue
            along = _along(site, found.used(site.node)) if along is None else along
            axes = _sharded_beside(along, site.space.operands[number].values()) if along else set()
            if on.is_deferred(value):
                deferred.setdefault(value, set()).update(axes, left)
            elif axes:
                made.values.append(GradientSum(site, number, frozenset(axes)))
    made.values.reverse()
    return made


def _sharded_beside(along: Mapping[str, Iterable[str]], own: Collection[str]) -> set[str]:
    """Return the mesh axes of the dimensions that are not the operand's own."""
    return {m for dimension, mesh in along.items() if dimension not in own for m in mesh}


def _along(site: Site, types: Sequence[TensorType]) -> dict[str, tuple[str, ...]]:
    """Return the mesh axes of the dimensions that are sharded."""
    found: dict[str, tuple[str, ...]] = {}
    for type, names in zip(types, site.space.operands, strict=True):
        for axis in type.axes if type.is_sharded else ():
            if axis.mesh and axis.name in names:
                found[names[axis.name]] = axis.mesh
    return found
