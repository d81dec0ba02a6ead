"""Random weight expressions for the parameters of random graphs, and random source tensors."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from moecc.testing.choices import Choices, pick
from moecc.testing.draws import generator, moved
from moecc.types.arrays import Array
from moecc.types.dtypes import F32, F64
from moecc.types.tensor import TensorType
from moecc.weights.arithmetic import Cast, Scale
from moecc.weights.draws import Normal
from moecc.weights.evaluate import Reader, evaluate
from moecc.weights.expr import Expr, Source, sources, transform
from moecc.weights.movement import Permute, Stack, Tile


def grow_weight(choices: Choices, type: TensorType) -> Expr:
    """Return an expression that makes a tensor of `type`."""
    kind = pick(choices, ("source", "tile", "permute", "stack", "scale", "normal"))
    if kind == "tile" and type.axes:
        axis = pick(choices, type.axes)
        part = _source(choices, type.without(axis.name))
        return Tile(part, axis.name, int(str(axis.size)), type.names.index(axis.name))
    if kind == "stack" and type.axes:
        axis = type.axes[0]
        rest = type.without(axis.name)
        return Stack(tuple(_source(choices, rest) for _ in range(int(str(axis.size)))), axis.name)
    if kind == "permute":
        return Permute(_source(choices, type.with_axes(type.axes[::-1])), type.names)
    if kind == "scale":
        return Scale(_source(choices, type), pick(choices, (2.0, 0.5, -3.0)))
    if kind == "normal":
        return Normal(type.with_dtype(F32), 0.5, choices.below(4))
    return _source(choices, type)


def _source(choices: Choices, type: TensorType) -> Source:
    # Few names, so that parameters of one type are sometimes tied.
    sizes = "x".join(map(str, type.shape))
    return Source(f"model.{choices.below(3)}.weight_{sizes}_{'_'.join(type.names)}", type)


def weight_for(weight: Expr, seed: int, step: float = 0.0) -> Array:
    """Return what `weight` makes of random source tensors, in float64 throughout.

    Casts between floats are left out: rounded to a narrow type, weights that are equal in real
    arithmetic would differ.

    Args:
      weight: the expression.
      seed: chooses the source tensors, together with their names.
      step: how far each of their floats moves from there.
    """
    return evaluate(transform(weight, _in_float64), _Sources((weight,), seed, step))


def stored_weight(weight: Expr, seed: int) -> Array:
    """Return what `weight` makes of random source tensors as a checkpoint would hold it.

    Every cast and every product rounds as the types of the expression say; what comes out is in
    float64 again, as far as it is a float.
    """
    made = evaluate(weight, _Stored((weight,), seed))
    return made.astype(np.float64) if weight.type.dtype.is_float else made


def _in_float64(expr: Expr) -> Expr:
    if not expr.type.dtype.is_float or expr.type.dtype is F64:
        return expr
    if isinstance(expr, Source):
        return Source(expr.name, expr.type.with_dtype(F64))
    if isinstance(expr, Cast):
        return expr.x
    return Cast(expr, F64)


class _Sources:
    """Reads source tensors that depend on the seed and on their names alone."""

    def __init__(self, weights: Iterable[Expr], seed: int, step: float = 0.0) -> None:
        self.seed = seed
        self.step = step
        self.types = {s.name: s.type for weight in weights for s in sources(weight)}

    def __call__(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        type = self.types[name]
        rng = generator(self.seed, "source", name)
        if not type.dtype.is_float:
            whole = rng.integers(0, 2, type.shape).astype(type.dtype.numpy)
        else:
            # As stored: a checkpoint holds what its element type can say.
            whole = rng.standard_normal(type.shape).astype(type.dtype.numpy).astype(np.float64)
            whole = moved(whole, self.step, self.seed, "source", name)
        return whole[start:stop] if type.axes else whole


def stored_sources(weights: Iterable[Expr], seed: int) -> Reader:
    """Return what reads random source tensors of several expressions, in their element types."""
    return _Stored(tuple(weights), seed)


class _Stored(_Sources):
    """Reads the same tensors in their own element types."""

    def __call__(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        return super().__call__(name, start, stop).astype(self.types[name].dtype.numpy)
