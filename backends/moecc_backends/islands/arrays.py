"""Arrays of new parameters from leaves: weight expressions evaluated where the leaves lie."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import numpy as np

from moecc.errors import InputError
from moecc.types import Array
from moecc.weights.arithmetic import Cast
from moecc.weights.evaluate import Evaluator
from moecc.weights.expr import Box, Expr, Source, extents
from moecc.weights.simplify import simplify
from moecc_backends.islands.jaxprs import AnyArray, shape_of
from moecc_backends.islands.placement import is_sharded, sharding_of
from moecc_backends.islands.storage import Stored
from moecc_backends.islands.views import Leaf
from moecc_backends.xla.mesh.specs import sharded_array


class LeafEvaluator(Evaluator):
    """Evaluates weight expressions whose sources are leaves, from what this process has of them.

    Args:
      leaves: the arrays by the names of the leaves.
    """

    def __init__(self, leaves: Mapping[str, AnyArray]) -> None:
        super().__init__(self._rows)
        self._leaves = leaves

    def _rows(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        whole: Array = np.asarray(self._leaves[name])
        return whole[start:stop] if whole.ndim else whole

    def block(self, expr: Expr, box: Box) -> Array:
        """Return the elements of `expr` in `box`.

        Raises:
          InputError: another process has some of them.
        """
        if isinstance(expr, Source):
            return _part(expr.name, self._leaves[expr.name], box)
        return super().block(expr, box)


def _part(name: str, leaf: AnyArray, box: Box) -> Array:
    """Return a box of a leaf from the shards that are here, without putting the leaf together."""
    if not is_sharded(leaf):
        whole: Array = np.asarray(leaf)[tuple(slice(*ends) for ends in box)]
        return whole
    made: Array = np.empty(extents(box), leaf.dtype)
    missing = np.ones(extents(box), bool)
    for shard in leaf.addressable_shards:
        ends = [s.indices(n)[:2] for s, n in zip(shard.index, leaf.shape, strict=True)]
        both = [(max(a, c), min(b, d)) for (a, b), (c, d) in zip(box, ends, strict=True)]
        if any(start >= stop for start, stop in both):
            continue
        into = tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(both, box, strict=True))
        if missing[into].any():
            from_ = tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(both, ends, strict=True))
            made[into] = np.asarray(shard.data)[from_]
            missing[into] = False
    if missing.any():
        raise InputError(
            "another process has a part of this leaf that experts here need",
            where=f"params {name}",
            expected="a leaf whose shards go where the experts' go, or a replicated one",
            found=str(leaf.sharding),
        )
    return made


def make_array(
    stored: Stored, leaves: Mapping[str, Leaf], arrays: Mapping[str, AnyArray]
) -> AnyArray:
    """Return an array of the new parameters, or its shape where leaves are shapes.

    It lies where the dense leaf does, sharded likewise.

    Args:
      stored: what it is.
      leaves: the leaves by name.
      arrays: their arrays, or shapes.

    Raises:
      InputError: values overflow, or another process has a part that is needed here.
    """
    dtype, like = leaves[stored.like].dtype, arrays[stored.like]
    shape = stored.weight.type.shape
    sharding = sharding_of(stored.weight, like)
    if isinstance(like, jax.ShapeDtypeStruct):
        return shape_of(shape, dtype.numpy, sharding)
    wanted = simplify(Cast(stored.weight, dtype))
    evaluator = LeafEvaluator(arrays)
    if sharding is not None:
        return sharded_array(evaluator, wanted, shape, sharding)
    whole = np.array(evaluator.block(wanted, tuple((0, n) for n in shape)), order="C")
    if not isinstance(like, jax.Array):
        return whole
    is_fixed = getattr(like, "committed", True) and not is_sharded(like)
    return jax.device_put(whole, like.sharding if is_fixed else None)
