"""Counterexamples: data on which the reference interpreter computes two different results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import lcm, prod

from moecc.errors import InputError
from moecc.ir.graph import Graph, Value
from moecc.ir.interpreter import ReferenceProgram
from moecc.ir.mesh import mesh_of
from moecc.ir.ops.slots import SlotsOp
from moecc.ir.structure import index_sizes, length_bounds
from moecc.ir.unroll import unrolled
from moecc.support.lazy import np
from moecc.testing.data import Sizes, shape_of
from moecc.testing.weights import generator
from moecc.types import F32, F64, Array, Arrays, TensorType
from moecc.weights.arithmetic import Cast
from moecc.weights.evaluate import evaluate
from moecc.weights.expr import Expr, Source, sources, transform

MOST_ELEMENTS = 2_000_000
"""Graphs with more elements in their parameters are not run."""

LARGEST_SIZES = (4, 4, 6, 8, 4, 6)
"""The largest size of an open axis, for each seed: some differences need long sequences."""

NEGATIVE_SEEDS = (4,)
"""Seeds of data below 0, where sums of products do not cancel."""

ORACLE_SEEDS = 2
"""How often gradients and devices are compared."""

DIFFERENCE = 1e-6
"""A smaller difference, relative to the magnitude of an output, may be rounding."""
NUDGE = 1e-12
ERRORS = 8
"""How often rounding is drawn before a difference counts; a tie tips in half of the draws."""


@dataclass(frozen=True)
class Counterexample:
    """Data on which two graphs differ.

    Attributes:
      output: the output that differs.
      seed: of the data.
      sizes: of the open axes.
      difference: the greatest, relative to the magnitude of the output; None for one of shapes,
        gradients or devices.
    """

    output: str
    seed: int
    sizes: dict[str, int]
    difference: float | None

    def __str__(self) -> str:
        sizes = ", ".join(f"{name} = {size}" for name, size in self.sizes.items())
        by = "" if self.difference is None else f" by {self.difference:.2g}"
        return f"{self.output} differs{by}, seed {self.seed}" + (f" at {sizes}" if sizes else "")


def find_counterexample(before: Graph, after: Graph, *, exact: bool) -> Counterexample | None:
    """Return data on which the outputs of two graphs differ, or None if none were drawn.

    Data are drawn again where an operation makes an infinite number, or none at all, of finite
    ones: a promise is about finite values.

    Args:
      before: a graph.
      after: one with the same inputs and outputs.
      exact: whether results differ that are not the same bits.
    """
    before, after = unrolled(before), unrolled(after)
    if _elements((before, after)) > MOST_ELEMENTS:
        return None
    for seed in range(len(LARGEST_SIZES)):
        try:
            example = _differing_output(before, after, seed, exact)
            if example is None and seed < ORACLE_SEEDS:
                example = _differing_gradient(before, after, seed)
        except InputError:  # no meaning in NumPy, or none for these data
            continue
        if example is not None:
            return example
    return None


def _differing_gradient(before: Graph, after: Graph, seed: int) -> Counterexample | None:
    from moecc.testing.oracle import Trial, divisible, gradient_gaps

    sizes = divisible(_sizes((before, after), seed), before, after)
    if gradient_gaps(Trial(before, after, seed, sizes)):
        return Counterexample("the gradient", seed, sizes, None)
    return None


def find_device_gap(before: Graph, after: Graph) -> Counterexample | None:
    """Return data on which devices compute an output wrongly or hold it elsewhere, or None.

    Args:
      before: a graph.
      after: a graph of the same global values; only its mesh counts.
    """
    from moecc.testing.oracle import Trial, device_gaps, divisible, moved_values

    if mesh_of(after) is None or _elements((after,)) > MOST_ELEMENTS:
        return None
    if not before.outputs.keys() <= after.outputs.keys():
        return None
    for seed in range(ORACLE_SEEDS):
        sizes = divisible(_sizes((before, after), seed), before, after)
        try:
            differs = any(moved_values(before, after)) or bool(
                device_gaps(Trial(before, after, seed, sizes))
            )
        except InputError:  # no meaning in NumPy, or none for these data
            continue
        if differs:
            return Counterexample("devices", seed, sizes, None)
    return None


def _elements(graphs: Sequence[Graph]) -> int:
    return sum(
        prod(s for s in v.type.sizes if isinstance(s, int))
        for graph in graphs
        for v in graph.params.values()
    )


def _differing_output(before: Graph, after: Graph, seed: int, exact: bool) -> Counterexample | None:
    from moecc.testing.oracle import keeps_finite

    sizes = _sizes((before, after), seed)
    inputs = {
        name: _input(value, after.inputs[name], seed, sizes)
        for name, value in before.inputs.items()
    }
    runs = [_Run(g, _parameters(g, seed, sizes), inputs) for g in (before, after)]
    expected, actual = (run.outputs for run in runs)
    gaps: dict[str, float] = {}
    for name, right in expected.items():
        wrong = actual[name]
        if right.shape != wrong.shape:
            return Counterexample(name, seed, sizes, None)
        gap = _gap(right, wrong)
        is_finite = np.isfinite(right).all() and np.isfinite(wrong).all()
        if is_finite and not np.array_equal(right, wrong) and (exact or gap > DIFFERENCE):
            gaps[name] = gap
    if not exact:
        for run in runs:
            gaps = run.significant(gaps, seed)
    if gaps and all(keeps_finite(run.graph, run.params, inputs) for run in runs):
        name, gap = next(iter(gaps.items()))
        return Counterexample(name, seed, sizes, gap)
    return None


def _gap(right: Array, wrong: Array) -> float:
    """Return the greatest difference relative to the larger magnitude; 0 where one is not finite.

    Relative to zeros alone, what another graph makes of them by rounding would be infinite.
    """
    a, b = right.astype(np.float64), wrong.astype(np.float64)
    if not np.isfinite(a).all() or not np.isfinite(b).all() or not a.size:
        return 0.0
    largest = max(float(np.abs(x).max()) for x in (a, b))
    return float(np.abs(a - b).max() / max(largest, 1e-30))


class _Run:
    """A graph, its data, and its outputs."""

    def __init__(self, graph: Graph, params: Arrays, inputs: Arrays) -> None:
        self.graph, self.params, self.inputs = graph, params, inputs
        self.outputs = ReferenceProgram(graph).run(params, inputs)

    def significant(self, gaps: dict[str, float], seed: int) -> dict[str, float]:
        """Return the gaps that exceed those of rounding by far, ties that it tips included."""
        from moecc.testing.oracle import with_errors

        params = {n: _nudged(a, seed, n) for n, a in self.params.items()} if gaps else {}
        for draw in range(ERRORS if _chooses(self.graph) else 1):
            if not gaps:
                break
            outputs = with_errors(self.graph, draw).run(params, self.inputs)
            gaps = {n: g for n, g in gaps.items() if g > 100 * _gap(self.outputs[n], outputs[n])}
        return gaps


def _chooses(graph: Graph) -> bool:
    """Return whether integers or truth values come of floats somewhere, which may jump."""
    return any(
        not result.type.dtype.is_float and any(v.type.dtype.is_float for v in node.operands)
        for node in graph
        for result in node.results
    )


def _nudged(data: Array, seed: int, name: str) -> Array:
    if data.dtype.kind in "biu":
        return data
    noise = generator(seed, "nudge", name).standard_normal(data.shape)
    return np.asarray(data.astype(np.float64) * (1 + NUDGE * noise))


# Data by seed and name.


def _sizes(graphs: Sequence[Graph], seed: int) -> dict[str, int]:
    """Return small sizes for the open axes, such that groups divide the tokens."""
    values = [v for g in graphs for v in (*g.inputs.values(), *g.params.values())]
    names = sorted({s for v in values for s in v.type.sizes if isinstance(s, str)})
    largest = LARGEST_SIZES[seed]
    sizes = {n: int(generator(seed, "size", n).integers(2, largest + 1)) for n in names}
    bounds = [length_bounds(g) for g in graphs]
    sizes = {n: min([s, *(b[n] for b in bounds if n in b)]) for n, s in sizes.items()}
    for node in (n for g in graphs for n in g if n.op.assigns_slots):
        attrs, type = SlotsOp.of_node(node), node.operands[0].type
        groups = attrs.group_size or attrs.groups
        open_sizes = [s for a in attrs.tokens if isinstance(s := type[a].size, str)]
        if open_sizes:
            sizes[open_sizes[0]] = lcm(sizes[open_sizes[0]], groups)
    return sizes


def _input(value: Value, same: Value, seed: int, sizes: Sizes) -> Array:
    bounds = [s for v in (value, same) for s in index_sizes(v) if isinstance(s, int)]
    return _drawn(f"input {value.name}", value.type, seed, sizes, min(bounds, default=8))


def _drawn(name: str, type: TensorType, seed: int, sizes: Sizes, below: int = 8) -> Array:
    rng, shape = generator(seed, name), shape_of(type, sizes)
    if type.dtype.kind == "float":
        data = np.asarray(rng.standard_normal(shape))
        if type.dtype.itemsize_bytes < F32.itemsize_bytes:
            data = data.astype(type.dtype.numpy).astype(np.float64)
        return -np.abs(data) if seed in NEGATIVE_SEEDS else data
    if type.dtype.kind == "bool":
        return np.asarray(rng.random(shape) < 0.5)
    return np.asarray(rng.integers(0, below, shape)).astype(type.dtype.numpy)


def _parameters(graph: Graph, seed: int, sizes: Sizes) -> dict[str, Array]:
    return {name: _parameter(value, seed, sizes) for name, value in graph.params.items()}


def _parameter(value: Value, seed: int, sizes: Sizes) -> Array:
    if value.weight is None:
        return _drawn(f"source {value.name}", value.type, seed, sizes)
    types = {s.name: s.type for s in sources(value.weight)}

    def read(name: str, start: int = 0, stop: int | None = None) -> Array:
        data = _drawn(f"source {name}", types[name], seed, {}, 2)
        if types[name].dtype.is_float:
            data = data.astype(types[name].dtype.numpy).astype(np.float64)
        return data[start:stop] if types[name].axes else data

    weight = transform(value.weight, _in_float64)
    return evaluate(weight, read)


def _in_float64(expr: Expr) -> Expr:
    """Return an expression that computes in float64, and rounds where it casts to a narrow type."""
    dtype = expr.type.dtype
    if not dtype.is_float or dtype is F64:
        return expr
    if isinstance(expr, Source):
        return Source(expr.name, expr.type.with_dtype(F64))
    if isinstance(expr, Cast):
        # float32 rounds less than what counts as a difference.
        return expr.x if dtype is F32 else Cast(Cast(expr.x, dtype), F64)
    return Cast(expr, F64)
