"""Parameters and moments under the names of the model, whatever passes made of its graph.

A *canonical* graph is the model that is trained, unrolled and on no mesh; its parameters are
tensors of a state, by their own names.  A graph that passes made of it, rolled and sharded say, has
weight expressions over these tensors.  Read forwards they restore the state of any program; read
backwards they say which tensors a program's arrays hold.  A moment of a parameter goes the same
ways, along the axes that it has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from moecc.errors import InputError
from moecc.families.inverting import tensors_of
from moecc.ir.graph import Graph
from moecc.ir.structure import clone
from moecc.ir.unroll import unroll
from moecc.types.dtypes import F32, DType
from moecc.types.tensor import TensorType
from moecc.weights.arithmetic import Cast
from moecc.weights.expr import Expr, Source, transform, walk
from moecc.weights.movement import Stack

Weights = Mapping[str, Expr]
"""Weight expressions by the name of a parameter."""


@dataclass(frozen=True)
class Canonical:
    """A model that is trained, with its parameters as tensors of a state.

    Attributes:
      graph: the model.
      weights: how each parameter was made, before the first step.
    """

    graph: Graph
    weights: Weights


def canonical(graph: Graph, dtype: DType = F32) -> Canonical:
    """Return a copy of `graph`, unrolled, whose parameters are sources of their own names.

    Args:
      graph: the model, after its pipeline and before anything that is for training.
      dtype: of the master weights.

    Raises:
      InputError: a parameter has no weight expression, or one with symbolic sizes.
    """
    copy = clone(graph)
    unroll(copy)
    weights: dict[str, Expr] = {}
    for name, param in copy.params.items():
        if param.weight is None:
            raise InputError(f"the parameter %{name} has no weight expression")
        weights[name] = Cast(param.weight, dtype)
        param.weight = Source(name, TensorType(dtype, param.type.bare.axes))
    return Canonical(copy, weights)


def initial(param: Expr, weights: Weights) -> Expr:
    """Return what a program's parameter is before the first step.

    Args:
      param: its expression over the tensors of a state.
      weights: how these were made.
    """

    def made(node: Expr) -> Expr:
        return weights[node.name] if isinstance(node, Source) else node

    return transform(param, made)


def moment(param: Expr, kind: str, shape: tuple[int, ...]) -> Expr | None:
    """Return the expression of a moment of a program's parameter, over tensors of a state.

    Args:
      param: the parameter's expression.
      kind: what the moment's tensors are called, before a dot and the name of their parameter.
      shape: of the moment: the parameter's, or that without one axis, as Adafactor's factors are.

    Returns:
      None where the moment has none of the parameter's axes, and so holds nothing.
    """
    if shape == param.type.shape:
        return _renamed(param, kind, None)
    stacked = {node.axis for node in walk(param) if isinstance(node, Stack)}
    for dropped in param.type.names:
        if dropped not in stacked and shape == param.type.without(dropped).shape:
            return _renamed(param, kind, dropped)
    return None


def _renamed(param: Expr, kind: str, dropped: str | None) -> Expr:
    def moved(node: Expr) -> Expr:
        if not isinstance(node, Source):
            return node
        type = node.type if dropped is None else node.type.without(dropped)
        return Source(f"{kind}.{node.name}", type)

    return transform(param, moved)


def stored(name: str, param: Expr) -> list[tuple[str, Expr]]:
    """Return the tensors that an array of a program holds, with what each is of the array.

    Args:
      name: what the array is called in the expressions that are returned.
      param: the array's expression over tensors of a state.

    Raises:
      InputError: the array is not made by moving tensors alone.
    """
    try:
        return tensors_of(param, Source(name, param.type))
    except ValueError as error:
        raise InputError(f"the parameter %{name} cannot be saved: {error}") from None
