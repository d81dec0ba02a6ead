"""Parameters made on the devices that hold them: each process reads the slices of its devices.

A weight expression is evaluated box by box, so no host ever has a whole parameter that is sharded,
let alone the whole model.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import numpy as np

from moecc.errors import InputError
from moecc.ir.graph import Graph, Value
from moecc.types.arrays import Array
from moecc.types.dtypes import F32, DType
from moecc.weights.arithmetic import Cast
from moecc.weights.boxes import Box
from moecc.weights.evaluate import Evaluator, Reader
from moecc.weights.expr import Expr
from moecc.weights.simplify import simplify
from moecc_backends.xla.mesh.specs import shardings


def load_params(
    graph: Graph, reader: Reader, mesh: jax.sharding.Mesh, *, dtype: DType = F32
) -> dict[str, jax.Array]:
    """Return the parameters of `graph` as arrays on `mesh`, each made from its weight expression.

    Args:
      graph: a graph on a mesh.
      reader: reads the tensors of the checkpoint, a range of rows at a time.
      mesh: devices, some of them perhaps of other processes.
      dtype: the element type of floating-point parameters.

    Raises:
      InputError: a parameter has no weight expression, or a tensor does not fit its type.
    """
    where = shardings(graph.params, mesh)
    evaluator = Evaluator(reader)
    used: Mapping[str, Value] = {n: v for n, v in graph.params.items() if v.users}
    return {n: _load(v, evaluator, where[n], dtype) for n, v in used.items()}


def _load(
    param: Value, evaluator: Evaluator, where: jax.sharding.NamedSharding, dtype: DType
) -> jax.Array:
    if param.weight is None:
        raise InputError(f"the parameter %{param.name} has no weight expression")
    is_float = param.type.dtype.is_float
    wanted = simplify(Cast(param.weight, dtype) if is_float else param.weight)
    return sharded_array(evaluator, wanted, param.type.shape, where)


def sharded_array(
    evaluator: Evaluator, wanted: Expr, shape: tuple[int, ...], where: jax.sharding.Sharding
) -> jax.Array:
    """Return the values of a weight expression as an array whose shards are evaluated one by one.

    Args:
      evaluator: of the expression.
      wanted: the expression.
      shape: of the array.
      where: its devices, each of which evaluates its own part.
    """
    made: dict[Box, Array] = {}

    def part(index: tuple[slice, ...] | None) -> Array:
        assert index is not None, "every device has its part"
        box = tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))
        # Devices that are copies of one another ask for the same part.
        if box not in made:
            made[box] = np.array(evaluator.block(wanted, box), order="C")
        return made[box]

    return jax.make_array_from_callback(shape, where, part)
