"""Running a graph in the reference interpreter, and how far apart arrays may be.

In float64 a correct rewrite of a small graph differs by about 1e-14 times the magnitude of what is
summed, and a wrong one by 1e-7 or more, so the tolerance of 1e-12 separates them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moecc.backend import Arrays, get_backend
from moecc.ir.builder import Builder
from moecc.ir.graph import Graph, Node, Value
from moecc.ir.structure import clone
from moecc.support.untyped import Json, JsonDict
from moecc.testing.data import Sizes, inputs_for, params_for
from moecc.testing.draws import generator
from moecc.types.arrays import Array
from moecc.types.dtypes import KEY
from moecc.types.tensor import TensorType

TOLERANCE = 1e-12
"""The difference allowed between equal outputs, times their magnitude (at least 1)."""

PERTURBATION = 1e-13
"""The relative change of the data that shows how far errors are amplified."""

ROUNDING = 4e-15
"""The relative error of each operation that does so: as of sums of a few dozen terms."""

EDGE = 1e-6
"""The share of an output's magnitude that such errors move only where they tip a choice.

They are amplified ten million times there: two experts, or two tokens, had equal scores.
"""

DRAWS, DRAWS_ON_EDGE = 3, 12
"""How often errors are drawn, and how often where they tip choices."""


def run_reference(
    graph: Graph,
    *,
    seed: int = 0,
    params: Arrays | None = None,
    inputs: Arrays | None = None,
) -> dict[str, Array]:
    """Return the outputs of `graph` in the reference interpreter, on random data.

    Args:
      graph: the graph.
      seed: chooses the parameters and inputs that are not given.
      params: the parameters by name.
      inputs: the inputs by name.

    Raises:
      InputError: the arrays do not fit the graph.
    """
    params = params_for(graph, seed) if params is None else params
    inputs = inputs_for(graph, seed) if inputs is None else inputs
    return get_backend("reference").compile(graph).run(params, inputs)


def gaps(
    graph: Graph,
    data: tuple[Arrays, Arrays],
    found: Mapping[str, Array],
    *,
    seed: int,
    exact: bool = False,
    tolerance: float = TOLERANCE,
) -> list[str]:
    """Return a line for each output in which `found` is not what `graph` computes.

    Where an output differs by more than the tolerance, `graph` runs again with small errors in
    the data and in every result: as far as they move the output, rounding may have.

    Args:
      graph: the graph that is right.
      data: its parameters and its inputs, by name.
      found: the outputs to compare, by name.
      seed: what the lines name.
      exact: whether the outputs must be equal bit for bit.
      tolerance: the difference allowed otherwise, times the magnitude of the output.
    """
    params, inputs = data
    expected = run_reference(graph, params=params, inputs=inputs)
    if exact:
        return list(unequal(expected, found, seed))
    bounds: JsonDict = {n: tolerance * magnitude(a) for n, a in expected.items()}
    if not any(beyond(expected, found, bounds, seed)):
        return []

    noisy, key = with_errors(graph)

    def run(draw: int) -> Mapping[str, Array]:
        near = [{n: _nudged(a, draw, n) for n, a in arrays.items()} for arrays in data]
        drawn = {**near[1], key: np.asarray(draw, np.uint64)}
        return run_reference(noisy, params=near[0], inputs=drawn)

    moved = amplified(run, expected, EDGE)
    bounds = {n: bounds[n] + moved[n] for n in expected}
    return list(beyond(expected, found, bounds, seed))


@dataclass(frozen=True)
class Trial:
    """Two graphs, and the data on which they are compared.

    Attributes:
      before: the graph that is right.
      after: the graph to compare.
      seed: chooses the data.
      sizes: the sizes of the variables.
      exact: whether the outputs must be equal bit for bit.
      tolerance: the difference allowed otherwise, times the magnitude of the output.
    """

    before: Graph
    after: Graph
    seed: int
    sizes: Sizes
    exact: bool = False
    tolerance: float = TOLERANCE

    def gaps(
        self, graph: Graph, data: tuple[Arrays, Arrays], found: Mapping[str, Array]
    ) -> list[str]:
        """Return `gaps` of `found` and the outputs of `graph`, as strictly as was promised."""
        return gaps(graph, data, found, seed=self.seed, exact=self.exact, tolerance=self.tolerance)


def magnitude(data: Array) -> float:
    """Return the largest finite number of `data`, at least 1; 0 for what is no float."""
    if data.dtype.kind != "f":
        return 0.0
    finite = np.abs(data[np.isfinite(data)])
    return max(1.0, float(finite.max(initial=0.0)))


def amplified(
    run: Callable[[int], Mapping[str, Array]], expected: Mapping[str, Array], edge: float
) -> dict[str, Array]:
    """Return how far small errors may move each output; ∞ where they may tip a choice.

    Args:
      run: returns the outputs under errors of a draw.
      expected: the outputs without errors.
      edge: the share of an output's magnitude beyond which a choice was tipped.
    """
    moved: dict[str, Array] = {n: np.zeros(a.shape) for n, a in expected.items()}
    limits = {n: edge * magnitude(a) for n, a in expected.items()}
    for draw in range(DRAWS_ON_EDGE):
        if draw == DRAWS and not any((m > limits[n]).any() for n, m in moved.items()):
            break
        for name, data in run(draw).items():
            moved[name] = np.maximum(moved[name], distance(expected[name], data))
    return {n: np.where(_with_neighbours(m > limits[n]), np.inf, m) for n, m in moved.items()}


def _with_neighbours(tipped: Array) -> Array:
    """Return `tipped` with all elements that are in line with one, along whichever axis.

    What is chosen is a row, and in a rectified one most elements are 0, as in the one before.
    """
    return np.asarray(
        sum((tipped.any(axis=i, keepdims=True) for i in range(tipped.ndim)), tipped), dtype=bool
    )


_ERRORS = "errors"
"""What the key of the errors is called, unless the graph has the name."""


def with_errors(graph: Graph, relative: float = ROUNDING) -> tuple[Graph, str]:
    """Return `graph` with each float result off by a few units in the last place.

    Args:
      graph: the graph.
      relative: the largest relative error of an element.

    Returns:
      The graph, and its further input: the key that draws the errors.
    """
    copy = clone(graph)
    nodes = list(copy)
    key = copy.input(copy.fresh(_ERRORS), TensorType(KEY))
    for number, (node, following) in enumerate(zip(nodes, [*nodes[1:], None], strict=True)):
        builder = Builder(copy, before=following)
        for value in node.results:
            if value.type.dtype.is_float:
                users = list(value.users)
                off = _off(builder, value, builder.fold_key(key, by=number), relative)
                _use_instead(value, off, users)
    return copy, key.name


def _off(b: Builder, value: Value, key: Value, relative: float) -> Value:
    """Return `value`, each element off by itself: equal ones must not stay equal."""
    low, high = 1 - relative, 1 + relative
    if value.type.unreduced or value.type.ragged is not None:
        # No numbers are drawn for parts of a sum, nor for rows whose number the data decide.
        one = b.random_uniform(
            key, b.constant(value=1.0, dtype=value.type.dtype.name), low=low, high=high
        )
        return b.mul(value, one)
    return b.mul(value, b.random_uniform(key, value, low=low, high=high))


def _use_instead(old: Value, new: Value, users: Sequence[Node]) -> None:
    for user in users:
        for at, operand in enumerate(user.operands):
            if operand is old:
                user.set_operand(at, new)


def _nudged(data: Array, draw: int, name: str) -> Array:
    if data.dtype.kind not in "fV":
        return data
    noise = generator(draw, "nudge", name).uniform(-1, 1, data.shape)
    return np.asarray(data.astype(np.float64) * (1 + PERTURBATION * noise))


def distance(expected: Array, found: Array) -> Array:
    """Return how far the arrays are apart: 0 where undefined, ∞ where only one is infinite."""
    a, b = expected.astype(np.float64), found.astype(np.float64)
    with np.errstate(all="ignore"):
        apart = np.where(a == b, 0.0, np.abs(a - b))
    # What is not a number before may be anything after; the reverse is a difference.
    return np.where(np.isnan(a), 0.0, np.where(np.isnan(apart), np.inf, apart))


def unequal(expected: Mapping[str, Array], found: Mapping[str, Array], seed: int) -> Iterator[str]:
    """Yield a line for each output that is not equal bit for bit."""
    for name, a in expected.items():
        if not np.array_equal(a, found[name], equal_nan=a.dtype.kind == "f"):
            yield from beyond({name: a}, found, {name: 0.0}, seed)
            yield f"output {name}: not equal bit for bit (seed {seed})"


def beyond(
    expected: Mapping[str, Array], found: Mapping[str, Array], allowed: Json, seed: int
) -> Iterator[str]:
    """Yield a line for each output that differs by more than `allowed`: the worst element."""
    for name, a in expected.items():
        b = found[name]
        if a.shape != b.shape:
            yield f"output {name}: shape {a.shape} became {b.shape} (seed {seed})"
            continue
        apart, bounds = distance(a, b), np.broadcast_to(allowed[name], a.shape)
        if not (apart > bounds).any():
            continue
        worst = int(np.argmax(np.where(apart > bounds, apart, -1.0)))
        at = tuple(int(i) for i in np.unravel_index(worst, a.shape))
        bound = float(bounds[at])
        yield (
            f"output {name}{list(at)}: expected {a[at].item()!r}, found {b[at].item()!r}, "
            f"allowed difference {bound:.3g} (seed {seed})"
        )
