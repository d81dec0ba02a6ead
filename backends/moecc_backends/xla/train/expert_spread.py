"""How far the experts of a layer are apart: nothing at first, where they are copies."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax.sharding import Sharding

from moecc.analysis.groups import parameter_groups
from moecc.ir.graph import Graph
from moecc.types.ranges import element, has_range
from moecc.types.tensor import TensorType
from moecc_backends.xla.trace.typed_jax import PyTree

EXPERT, LAYER = "expert", "layer"

SpreadOf = Callable[[Mapping[str, jax.Array]], dict[str, list[float]]]


def spread_of(graph: Graph, whole: Sharding) -> SpreadOf | None:
    """Return a function from parameters to the spread of the experts of each layer, by location.

    For each expert: ‖W − mean of all experts‖ / ‖mean of all experts‖, over all of its matrices.
    None where the graph has no experts.

    Args:
      graph: of a program.
      whole: where every device of the program has all of an array.
    """
    groups = parameter_groups(graph)
    chosen = {
        name: param.type
        for name, param in graph.params.items()
        if EXPERT in param.type and "router" not in groups[name] and param.users
    }
    if not chosen:
        return None
    places = {name: graph.params[name].loc for name in chosen}

    def squares(params: PyTree) -> dict[str, tuple[jax.Array, jax.Array]]:
        found: dict[str, tuple[jax.Array, jax.Array]] = {}
        for name, type in chosen.items():
            own = _squares(params[name], type)
            before = found.get(places[name], (0.0, 0.0))
            found[places[name]] = (before[0] + own[0], before[1] + own[1])
        return found

    compiled = jax.jit(squares, out_shardings=whole)

    def spread(params: Mapping[str, jax.Array]) -> dict[str, list[float]]:
        made: dict[str, list[float]] = {}
        found = jax.device_get(compiled({name: params[name] for name in chosen}))
        for place, (apart, size) in found.items():
            ratios = (apart / (size + (size == 0))) ** 0.5
            rows = ratios if ratios.ndim == 2 else ratios[None]
            for at, row in enumerate(rows):
                where = element(place, at) if has_range(place) else place
                made[where] = [float(x) for x in row]
        return made

    return spread


def _squares(array: jax.Array, type: TensorType) -> tuple[jax.Array, jax.Array]:
    """Return the squared distances ``[layer, expert]``, and the squared norm of the mean."""
    order = [n for n in (LAYER, EXPERT) if n in type]
    wide = jnp.moveaxis(
        array.astype(jnp.float32), [type.names.index(n) for n in order], range(len(order))
    )
    mean = jnp.mean(wide, axis=len(order) - 1, keepdims=True)
    rest = tuple(range(len(order), wide.ndim))
    return jnp.sum((wide - mean) ** 2, axis=rest), jnp.sum(mean**2, axis=rest)
