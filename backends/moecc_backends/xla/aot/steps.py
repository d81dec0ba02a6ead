"""The training step or the forward pass of a graph on a mesh, ready to be compiled ahead of time.

No weights are needed: parameters, state and inputs are shapes, types and places.  A graph that lies
on a mesh says itself where everything lies; one that does not is spread by XLA's partitioner.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from moecc.errors import InputError, Problem
from moecc.ir.graph import Graph, Node, Value
from moecc.ir.mesh import mesh_of
from moecc.ir.table.repetition import repetitions
from moecc.plan.layout import Layout
from moecc.types.dtypes import DType
from moecc_backends.xla.backend import function
from moecc_backends.xla.lower.gspmd import Spread
from moecc_backends.xla.lower.shard_map import sharded_function, spec
from moecc_backends.xla.mesh.layout_specs import group_counts, value_parts
from moecc_backends.xla.trace.options import Options
from moecc_backends.xla.train.step import (
    LOGITS,
    TARGETS,
    Model,
    check_trainable,
    moments_like,
    optimizer,
    train_step,
)

# Typed by jax in part only.
_struct: Any = jax.ShapeDtypeStruct
_spec: Any = PartitionSpec

_INTEGER = np.dtype("int32")


@dataclass(frozen=True)
class Setting:
    """How a graph is trained or run.

    Attributes:
      sizes: what the variables of the graph stand for.
      dtype: the type of the computation.
      optimizer: of `moecc_backends.xla.train.step.OPTIMIZERS`; None for the forward pass.
      platform: what it is lowered for, ``tpu``, ``gpu`` or ``cpu``.
      layout: what XLA's partitioner spreads the graph by; None where the graph lies on a mesh.
    """

    sizes: Mapping[str, int]
    dtype: DType
    optimizer: str | None = None
    platform: str = "cpu"
    layout: Layout | None = None

    @property
    def options(self) -> Options:
        """What is chosen for the lowering."""
        return Options(platform=self.platform)


@dataclass(frozen=True)
class Step:
    """A jitted function and what it takes, abstractly."""

    function: Any
    arguments: tuple[Any, ...]


class Places(Protocol):
    """Where the parameters and inputs of a graph lie, and the graph as a function of them."""

    def param(self, value: Value) -> NamedSharding:
        """Return where a parameter lies."""
        ...

    def along(self, value: Value, sizes: Mapping[str, int]) -> NamedSharding:
        """Return where an array lies whose axes, with these sizes, lie as those of `value`."""
        ...

    def model(self, graph: Graph) -> Model:
        """Return `graph` as a function on the mesh."""
        ...


@dataclass(frozen=True)
class Stated:
    """Places as the types of the graph state them, with the graph's own collectives."""

    mesh: jax.sharding.Mesh
    setting: Setting

    def param(self, value: Value) -> NamedSharding:
        """Return where a parameter lies."""
        return NamedSharding(self.mesh, spec(value.type))

    def along(self, value: Value, sizes: Mapping[str, int]) -> NamedSharding:
        """Return where an array lies whose axes, with these sizes, lie as those of `value`."""
        return NamedSharding(self.mesh, _spec(*(value.type[n].mesh or None for n in sizes)))

    def model(self, graph: Graph) -> Model:
        """Return `graph` as a function on the mesh."""
        setting = self.setting
        return sharded_function(graph, self.mesh, dtype=setting.dtype, options=setting.options)


@dataclass(frozen=True)
class Guided:
    """Places as a layout of the plan has them, with the collectives that XLA's partitioner adds."""

    spread: Spread
    setting: Setting

    def param(self, value: Value) -> NamedSharding:
        """Return where a parameter lies."""
        return self.spread.weight_sharding(value, stored=True, layers=_layer_axis(value))

    def along(self, value: Value, sizes: Mapping[str, int]) -> NamedSharding:
        """Return where an array lies whose axes, with these sizes, lie as those of `value`."""
        return self.spread.sharding(tuple(sizes), value_parts(self.spread.layout, sizes))

    def model(self, graph: Graph) -> Model:
        """Return `graph` as a function on the mesh."""
        setting = self.setting
        return function(graph, dtype=setting.dtype, options=setting.options, around=self.spread)


def make_step(
    graph: Graph, setting: Setting, devices: list[Any], update: Any | None = None
) -> Step:
    """Return the step of `graph` over `devices`, which the mesh has as many of.

    Args:
      graph: the graph, for training with its losses.
      setting: how it is trained or run.
      devices: in the order of the mesh.
      update: an optimiser of optax's in place of the one that is named.

    Raises:
      InputError: the mesh cuts a group of tokens, or the graph cannot be trained.
    """
    places = _places(graph, setting, devices)
    params = _params(graph, places, setting)
    inputs = {n: _input(v, places, setting) for n, v in graph.inputs.items()}
    if setting.optimizer is None:
        return Step(jax.jit(places.model(graph)), (params, inputs))
    check_trainable(graph)
    update = update or optimizer(setting.optimizer)
    state = params, moments_like(update, params)
    inputs[TARGETS] = _targets(graph.outputs[LOGITS], places, setting)
    step = train_step(places.model(graph), update)
    lie = jax.tree.map(lambda leaf: leaf.sharding, state)
    jitted = jax.jit(step, donate_argnums=(0,), out_shardings=(lie, None))
    return Step(jitted, (state, inputs))


def _places(graph: Graph, setting: Setting, devices: list[Any]) -> Places:
    grid = mesh_of(graph) if setting.layout is None else setting.layout.mesh
    if grid is None:
        raise InputError("the graph is on no mesh", hint="annotate-sharding{mesh=data:8}")
    mesh = jax.sharding.Mesh(np.array(devices).reshape(grid.shape), grid.names)
    if setting.layout is None:
        return Stated(mesh, setting)
    check_groups(graph, setting.layout)
    return Guided(Spread(mesh, setting.layout), setting)


def check_groups(graph: Graph, layout: Layout) -> None:
    """Raise InputError if a group of tokens, within which slots are counted, would be cut."""
    shards = layout.mesh.size(layout.batch_axes)
    found = [
        Problem(
            f"{' x '.join(layout.batch_axes)} cuts the token groups",
            f"mesh {layout.mesh}",
            f"a divisor of {groups} groups",
            str(shards),
            f"specialize{{groups={shards}}} makes as many groups",
        )
        for groups in sorted(group_counts(graph))
        if groups % shards
    ]
    if found:
        raise InputError(found)


def _params(graph: Graph, places: Places, setting: Setting) -> dict[str, Any]:
    kind = np.dtype("float32") if setting.optimizer is not None else setting.dtype.numpy
    return {
        name: _struct(value.type.shape, kind, sharding=places.param(value))
        for name, value in graph.params.items()
        if value.users
    }


def _layer_axis(value: Value) -> str:
    """Return the axis along which `value` is stacked for a scan, or an empty string."""
    scans = [node for node in value.users if node.body is not None]
    names = {repetitions(node.attrs)[0] for node in scans if _is_stacked(node, value)}
    return names.pop() if names else ""


def _is_stacked(scan: Node, value: Value) -> bool:
    first = scan.attrs["carries"]
    return value in scan.operands[first : first + scan.attrs["stacked"]]


def _input(value: Value, places: Places, setting: Setting) -> Any:
    if value.type.dtype.kind == "key":
        return _struct((), jax.random.key(0).dtype, sharding=places.along(value, {}))
    kind = {"float": setting.dtype.numpy, "bool": np.dtype(bool)}.get(value.type.dtype.kind)
    return _abstract(value, value.type.names, kind or _INTEGER, places, setting)


def _targets(logits: Value, places: Places, setting: Setting) -> Any:
    tokens = tuple(n for n in logits.type.names if n != "vocab")
    return _abstract(logits, tokens, _INTEGER, places, setting)


def _abstract(
    value: Value, names: tuple[str, ...], kind: np.dtype[Any], places: Places, setting: Setting
) -> Any:
    sizes = {n: _size(value.type[n].size, setting) for n in names}
    return _struct(tuple(sizes.values()), jnp.dtype(kind), sharding=places.along(value, sizes))


def _size(size: object, setting: Setting) -> int:
    return size if isinstance(size, int) else setting.sizes[str(size)]
