"""The training step or the forward pass of a graph on a mesh, ready to be compiled ahead of time.

No weights are needed: parameters, state and inputs are shapes, types and places.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moecc.errors import InputError, Problem
from moecc.ir.dtypes import DType
from moecc.ir.graph import Graph, Node, Value
from moecc.ir.table.repetition import repetitions
from moecc.plan.layout import Layout
from moecc_backends.xla.backend import function
from moecc_backends.xla.options import Options
from moecc_backends.xla.placement import group_counts, value_parts
from moecc_backends.xla.spread import Spread
from moecc_backends.xla.training import (
    LOGITS,
    TARGETS,
    check_trainable,
    moments_like,
    optimizer,
    train_step,
)

_struct: Any = jax.ShapeDtypeStruct

_INTEGER = np.dtype("int32")


@dataclass(frozen=True)
class Setting:
    """How a graph is trained or run.

    Attributes:
      layout: where everything lies.
      sizes: what the variables of the graph stand for.
      dtype: the type of the computation.
      optimizer: of `moecc_backends.xla.training.OPTIMIZERS`; None for the forward pass.
      platform: what it is lowered for, ``tpu``, ``gpu`` or ``cpu``.
    """

    layout: Layout
    sizes: Mapping[str, int]
    dtype: DType
    optimizer: str | None = None
    platform: str = "cpu"


@dataclass(frozen=True)
class Step:
    """A jitted function and what it takes, abstractly."""

    function: Any
    arguments: tuple[Any, ...]


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
    check_groups(graph, setting.layout)
    grid = setting.layout.mesh
    mesh = jax.sharding.Mesh(np.array(devices).reshape(grid.shape), grid.names)
    spread = Spread(mesh, setting.layout)
    params = _params(graph, spread, setting)
    inputs = {n: _input(v, spread, setting) for n, v in graph.inputs.items()}
    options = Options(platform=setting.platform)
    if setting.optimizer is None:
        run = function(graph, dtype=setting.dtype, options=options, around=spread)
        return Step(jax.jit(run), (params, inputs))
    check_trainable(graph)
    update = update or optimizer(setting.optimizer)
    state = params, moments_like(update, params)
    inputs[TARGETS] = _targets(graph.outputs[LOGITS], spread, setting)
    step = train_step(graph, update, dtype=setting.dtype, options=options, around=spread)
    places = jax.tree.map(lambda leaf: leaf.sharding, state)
    jitted = jax.jit(step, donate_argnums=(0,), out_shardings=(places, None))
    return Step(jitted, (state, inputs))


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


def _params(graph: Graph, spread: Spread, setting: Setting) -> dict[str, Any]:
    kind = np.dtype("float32") if setting.optimizer is not None else setting.dtype.numpy
    return {
        name: _struct(
            value.type.shape,
            kind,
            sharding=spread.weight_sharding(value, stored=True, layers=_layer_axis(value)),
        )
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


def _input(value: Value, spread: Spread, setting: Setting) -> Any:
    if value.type.dtype.kind == "key":
        return _struct((), jax.random.key(0).dtype, sharding=spread.sharding((), {}))
    kind = {"float": setting.dtype.numpy, "bool": np.dtype(bool)}.get(value.type.dtype.kind)
    return _abstract(value, value.type.names, kind or _INTEGER, spread, setting)


def _targets(logits: Value, spread: Spread, setting: Setting) -> Any:
    tokens = tuple(n for n in logits.type.names if n != "vocab")
    return _abstract(logits, tokens, _INTEGER, spread, setting)


def _abstract(
    value: Value, names: tuple[str, ...], kind: np.dtype[Any], spread: Spread, setting: Setting
) -> Any:
    sizes = {n: _size(value.type[n].size, setting) for n in names}
    parts = value_parts(spread.layout, sizes)
    return _struct(tuple(sizes.values()), jnp.dtype(kind), sharding=spread.sharding(names, parts))


def _size(size: object, setting: Setting) -> int:
    return size if isinstance(size, int) else setting.sizes[str(size)]
