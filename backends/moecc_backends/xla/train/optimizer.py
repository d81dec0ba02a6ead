"""Optimisers of optax, and the shardings of their state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from moecc.errors import MachineError, UsageError, nearest
from moecc_backends.xla.trace.typed_jax import abstract_array, partition_spec

OPTIMIZERS = ("adafactor", "adamw")


def optimizer(name: str, learning_rate: float = 1e-3) -> Any:
    """Return an optimiser of optax: Adafactor, factored and without momentum, or AdamW.

    Raises:
      UsageError: there is no such optimiser.
      MachineError: optax is missing.
    """
    if name not in OPTIMIZERS:
        hint = nearest(name, OPTIMIZERS) or f"optimizers: {', '.join(OPTIMIZERS)}"
        raise UsageError(f"unknown optimizer {name!r}", hint=hint)
    try:
        import optax
    except ImportError:
        raise MachineError("training needs optax: pip install 'moecc[train]'") from None
    if name == "adafactor":
        return optax.adafactor(learning_rate, momentum=None, factored=True)
    return optax.adamw(learning_rate, b1=0.9, b2=0.95, weight_decay=0.1)


def moments_like(update: Any, params: Mapping[str, jax.ShapeDtypeStruct]) -> Any:
    """Return the shapes of an optimiser's state, each sharded as the parameter that it follows.

    A moment of a parameter's shape is sharded as it is.  Of Adafactor's two vectors one lacks the
    largest axis of the parameter, the other the next (Shazeer and Stern 2018, §4).
    """
    state = jax.eval_shape(update.init, dict(params))

    some = next((p.sharding for p in params.values()), None)
    everywhere = None if some is None else NamedSharding(some.mesh, partition_spec())

    def sharded(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> Any:
        names = [getattr(key, "key", getattr(key, "name", None)) for key in path]
        param = next((params[n] for n in names if isinstance(n, str) and n in params), None)
        follows = everywhere if param is None or some is None else _follow(leaf, param, names)
        return abstract_array(leaf.shape, leaf.dtype, follows)

    mesh = next((p.sharding.mesh for p in params.values() if p.sharding is not None), None)
    made = jax.tree_util.tree_map_with_path(sharded, state)
    if mesh is None:
        return made
    everywhere = NamedSharding(mesh, partition_spec())
    return jax.tree.map(
        lambda leaf: (
            leaf
            if leaf.sharding is not None
            else abstract_array(leaf.shape, leaf.dtype, everywhere)
        ),
        made,
    )


def _follow(leaf: Any, param: Any, names: list[Any]) -> NamedSharding:
    spec = [*param.sharding.spec, *(None for _ in range(len(param.shape)))][: len(param.shape)]
    if leaf.shape == param.shape:
        return NamedSharding(param.sharding.mesh, partition_spec(*spec))
    order = np.argsort(param.shape)
    for name, dropped in (("v_row", order[-1]), ("v_col", order[-2] if len(order) > 1 else 0)):
        rest = (*param.shape[:dropped], *param.shape[dropped + 1 :])
        if name in names and leaf.shape == rest:
            kept = (*spec[:dropped], *spec[dropped + 1 :])
            return NamedSharding(param.sharding.mesh, partition_spec(*kept))
    return NamedSharding(param.sharding.mesh, partition_spec())
