"""Arrays of new parameters from leaves: weight expressions evaluated where the leaves lie."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from moecc.types.arrays import Array
from moecc.types.dtypes import DTYPES, DType
from moecc.weights.arithmetic import Cast
from moecc.weights.boxes import Box
from moecc.weights.evaluate import Evaluator
from moecc.weights.expr import Expr, Source
from moecc.weights.simplify import simplify
from moecc_backends.islands.jaxprs import shape_of
from moecc_backends.islands.storage import Stored
from moecc_backends.islands.views import Leaf


class LeafEvaluator(Evaluator):
    """Evaluates weight expressions whose sources are leaves.

    Args:
      leaves: the arrays by the names of the leaves.
    """

    def __init__(self, leaves: Mapping[str, Any]) -> None:
        super().__init__(lambda name, start=0, stop=None: np.asarray(leaves[name])[start:stop])
        self._leaves = leaves

    def block(self, expr: Expr, box: Box) -> Array:
        """Return the elements of `expr` in `box`."""
        if isinstance(expr, Source):
            return np.asarray(self._leaves[expr.name])[tuple(slice(*ends) for ends in box)]
        return super().block(expr, box)


def make_array(stored: Stored, leaves: Mapping[str, Leaf], arrays: Mapping[str, Any]) -> Any:
    """Return an array of the new parameters, or its shape where leaves are shapes.

    Args:
      stored: what it is.
      leaves: the leaves by name.
      arrays: their arrays, or shapes.
    """
    dtype = leaves[stored.like].dtype
    like = arrays[stored.like]
    shape = stored.weight.type.shape
    if isinstance(like, jax.ShapeDtypeStruct):
        return shape_of(shape, dtype.numpy)
    wanted = simplify(Cast(stored.weight, dtype))
    made = LeafEvaluator(arrays).block(wanted, tuple((0, n) for n in shape))
    made = np.ascontiguousarray(made)
    if not isinstance(like, jax.Array):
        return made
    return jax.device_put(made, next(iter(like.devices())))


def dtype_named(dtype: Any) -> DType | None:
    """Return an element type of NumPy's as the IR has it, or None."""
    return next((d for d in DTYPES.values() if d.numpy == dtype), None)
