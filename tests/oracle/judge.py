"""The reference as a judge of two graphs: on many kinds of data, ties and single elements included.

`moecc.testing.oracle` compares two graphs on normal data, where no two logits are equal and every
size is drawn.  A prover claims more: equality for all data and all sizes.  So graphs are compared
here on signs, zeros and equal elements, too, and with sizes of one.  Two things keep such data from
accusing a right verdict: data on which a graph divides by zero or is undefined lie outside the
prover's assumptions, and errors are drawn only where a float64 rounds, so that a tie between sums
of whole numbers stays one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from math import lcm
from typing import Literal

import numpy as np

from moecc.errors import InputError
from moecc.ir import Graph
from moecc.ir.interpreter import ReferenceProgram
from moecc.testing.data import inputs_for, params_for, sizes_for
from moecc.testing.oracle import (
    TOLERANCE,
    Run,
    Trial,
    _signature_changes,
    amplified,
    beyond,
    device_gaps,
    divisible,
    gradient_gaps,
    keeps_finite,
    magnitude,
    rerun_of,
    unequal,
    weight_gaps,
    with_errors,
)
from moecc.testing.weights import generator, moved
from moecc.types import F32, F64, Array
from moecc.weights.arithmetic import Cast
from moecc.weights.evaluate import evaluate
from moecc.weights.expr import Expr, Source, sources, transform

Kind = Literal[
    "normal", "signs", "equal", "sparse", "negative", "large", "wide", "precise", "fractions"
]
"""What floats are: normal; −1, 0 or 1; one number a tensor; mostly 0; below 0; to 30; to 10⁸;
float64 whatever their type, so that sums round; of ten binary places, which bfloat16 rounds."""

TIES = ("signs", "equal", "fractions")
"""Kinds of data whose sums are exact in float64, so that equal logits stay equal."""

EXACT_OPS = frozenset(
    {
        *("contract", "sum", "max", "add", "sub", "mul", "square", "neg", "scale", "relu"),
        *("maximum", "minimum", "less", "equal", "select", "mask", "constant", "stop_gradient"),
        *("rename", "split", "merge", "broadcast", "slice", "stack", "index", "chunk", "join"),
        *("positions", "embedding", "one_hot", "update_slice", "causal", "same_segment"),
        *("relative_buckets", "reshard", "shard", "all_gather", "all_reduce", "reduce_scatter"),
        *("scan", "all_to_all", "ragged_all_to_all", "assign_slots", "dispatch", "group_sum"),
        *("hash_experts", "within_buffer", "keep_choices", "fold_key"),
    }
)
"""Operations that do not round on whole numbers of moderate size."""


def shaped(data: Array, kind: Kind, *words: str) -> Array:
    """Return normal `data` made into data of a kind."""
    match kind:
        case "signs":
            return np.asarray(np.sign(np.round(data.astype(np.float64))), data.dtype)
        case "fractions":
            return np.asarray(np.round(data.astype(np.float64) * 1024) / 1024, data.dtype)
        case "equal":
            number = generator(0, "equal", *words).choice([-2.0, -1.0, -0.5, 0.5, 1.0, 2.0])
            return np.full(data.shape, number, data.dtype)
        case "sparse":
            zero = generator(0, "sparse", *words).random(data.shape) < 0.6
            return np.where(zero, np.zeros((), data.dtype), data)
        case "negative":
            return np.asarray(-abs(data), data.dtype)
        case "large":
            return np.asarray(data * np.asarray(10, data.dtype), data.dtype)
        case "wide":
            powers = generator(0, "wide", *words).integers(-8, 9, data.shape)
            return np.asarray(data.astype(np.float64) * 10.0**powers, data.dtype)
        case "precise":
            return generator(0, "precise", *words).standard_normal(data.shape)
    return data


class _Sources:
    """Reads source tensors of a kind; each depends on the seed and on its name alone."""

    def __init__(self, weight: Expr, seed: int, kind: Kind, step: float) -> None:
        self.seed, self.kind, self.step = seed, kind, step
        self.types = {s.name: s.type for s in sources(weight)}

    def __call__(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        type = self.types[name]
        rng = generator(self.seed, "source", name)
        if not type.dtype.is_float:
            data = rng.integers(0, 2, type.shape).astype(type.dtype.numpy)
        else:
            drawn = rng.standard_normal(type.shape).astype(type.dtype.numpy)
            data = shaped(drawn, self.kind, str(self.seed), name).astype(np.float64)
            data = moved(data, self.step, self.seed, "source", name)
        return data[start:stop] if type.axes else data


def _in_float64(expr: Expr) -> Expr:
    if not expr.type.dtype.is_float or expr.type.dtype is F64:
        return expr
    if isinstance(expr, Source):
        return Source(expr.name, expr.type.with_dtype(F64))
    if isinstance(expr, Cast):
        # A narrow type rounds so much that functions differ; what float32 rounds is drawn.
        is_narrow = expr.type.dtype.itemsize_bytes < F32.itemsize_bytes
        return Cast(Cast(expr.x, expr.type.dtype), F64) if is_narrow else expr.x
    return Cast(expr, F64)


@dataclass(frozen=True)
class Draw(Trial):
    """Two graphs and data of a kind."""

    kind: Kind = "normal"

    def data(self, graph: Graph, step: float = 0.0) -> tuple[dict[str, Array], dict[str, Array]]:
        if self.kind == "normal":
            return super().data(graph, step)
        params: dict[str, Array] = {}
        plain: dict[str, Array] | None = None
        for name, value in graph.params.items():
            if value.weight is not None:
                reader = _Sources(value.weight, self.seed, self.kind, step)
                params[name] = evaluate(transform(value.weight, _in_float64), reader)
                continue
            plain = params_for(graph, self.seed, self.sizes) if plain is None else plain
            params[name] = self._float(plain[name], step, name)
        inputs = inputs_for(self.before, self.seed, self.sizes)
        return params, {n: self._float(a, step, n) for n, a in inputs.items()}

    def _float(self, data: Array, step: float, name: str) -> Array:
        if data.dtype.kind not in "fV":
            return data
        data = shaped(data, self.kind, str(self.seed), name)
        return moved(data, step, self.seed, "direction", name)


@dataclass(frozen=True)
class Difference:
    """How two graphs differ.

    Attributes:
      law: ``interface``, ``values``, ``gradients``, ``weights`` or ``devices``.
      line: the first line about it.
      seed: of the data.
      kind: of the data.
      sizes: of the variables.
    """

    law: str
    line: str
    seed: int = 0
    kind: str = "normal"
    sizes: tuple[tuple[str, int], ...] = ()


def interface_changes(before: Graph, after: Graph) -> list[str]:
    """Return the differences between interfaces: names, element types, axes, shardings."""
    return list(_signature_changes(before, after))


def sizes_of(before: Graph, after: Graph, seed: int, size: int = 0) -> dict[str, int]:
    """Return sizes that suit both graphs: drawn, or `size` where their types allow it."""
    old, new = sizes_for(before, seed, size), sizes_for(after, seed, size)
    sizes = {n: lcm(old.get(n, 1), new.get(n, 1)) for n in old | new}
    return divisible(sizes, before, after)


def outputs_of(graph: Graph, params: Mapping[str, Array], inputs: Mapping[str, Array]):  # type: ignore[no-untyped-def]
    """Return the outputs of `graph` in the reference."""
    return ReferenceProgram(graph).run(params, inputs)


def value_gaps(draw: Draw, coarse: bool = False) -> list[str]:
    """Return a line for each output that differs on data of a kind, rounding excluded.

    Args:
      draw: the graphs and the data.
      coarse: whether a large difference counts without a look at where it comes from.
    """
    params, inputs = draw.data(draw.before)
    expected = outputs_of(draw.before, params, inputs)
    after_params = draw.data(draw.after)[0]
    actual = outputs_of(draw.after, after_params, inputs)
    if draw.exact:
        lines = list(unequal(expected, actual, draw.seed))
    else:
        bounds = {n: draw.tolerance * magnitude(a) for n, a in expected.items()}
        lines = list(beyond(expected, actual, bounds, draw.seed))
        if lines and not (coarse and draw.kind == "normal"):
            run = _noisy(draw)
            rerun = amplified(run, expected, 1e-6)
            bounds = {n: bounds[n] + rerun[n] for n in expected}
            lines = list(beyond(expected, actual, bounds, draw.seed))
    if lines and not all(
        keeps_finite(g, p, inputs) for g, p in ((draw.before, params), (draw.after, after_params))
    ):
        return []
    return lines


def _noisy(draw: Draw) -> Run:
    """Return a function that runs the right graph with errors where it rounds."""
    params, inputs = draw.data(draw.before)
    if draw.kind not in TIES:
        return rerun_of(draw.before, params, inputs)
    return lambda number: with_errors(draw.before, number, exact_ops=EXACT_OPS).run(params, inputs)


def plan(seed: int, thorough: bool) -> Iterator[tuple[int, Kind, int]]:
    """Yield seeds, kinds of data and sizes (0: drawn) of the comparisons of a pair."""
    yield seed, "normal", 0
    yield seed + 1, ("signs", "equal")[seed % 2], (0, 1, 2)[seed % 3]
    if not thorough:
        return
    yield seed + 2, ("equal", "signs")[seed % 2], 0
    yield seed + 3, "normal", 1
    yield seed + 4, "sparse", 3
    yield seed + 5, "negative", 0
    yield seed + 6, "large", 5
    yield seed + 7, "signs", 6


def difference(
    before: Graph,
    after: Graph,
    seed: int = 0,
    *,
    exact: bool = False,
    thorough: bool = False,
    more: int = 0,
    coarse: bool = False,
) -> Difference | None:
    """Return how two graphs differ in the reference, or None where they agree on all data.

    Args:
      before: the graph that is right.
      after: the graph to compare.
      seed: chooses the data.
      exact: whether outputs must be equal bit for bit.
      thorough: whether all kinds of data are drawn, not two.
      more: further draws of normal data, of signs, and of negative numbers and fractions, or if
        exact of precise and wide ones.
      coarse: whether a large difference of values counts without a look at where it comes from.
    """
    changed = interface_changes(before, after)
    if changed:
        return Difference("interface", changed[0])
    draws = [*plan(seed, thorough)]
    if exact:
        draws += [(seed + 8, "precise", 0), (seed + 9, "wide", 4), (seed + 10, "precise", 4)]
    # Gradients are compared where data are normal.
    kinds: tuple[Kind, ...] = ("normal", "signs", "negative", "fractions")
    if exact:
        kinds = ("normal", "precise", "wide")
    draws += [
        (seed + 11 + i, kinds[i % len(kinds)], (0, 4, 8)[i // len(kinds) % 3]) for i in range(more)
    ]
    for number, kind, size in draws:
        sizes = sizes_of(before, after, number, size)
        draw = Draw(before, after, number, sizes, exact, TOLERANCE, kind)
        laws = {"values": partial(value_gaps, coarse=coarse)}
        for law, gaps in (laws | LAWS if kind == "normal" else laws).items():
            line = _first(gaps, draw)
            if line:
                return Difference(law, line, number, kind, tuple(sorted(sizes.items())))
    return None


LAWS = {"gradients": gradient_gaps, "weights": weight_gaps, "devices": device_gaps}


def _first(gaps, draw: Draw) -> str:  # type: ignore[no-untyped-def]
    try:
        lines = gaps(draw)
    except InputError:
        # The data do not suit the graph: an index that an edit made is out of range.
        return ""
    return lines[0] if lines else ""
