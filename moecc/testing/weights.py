"""Random weight expressions, source tensors and numbers: they depend on a seed and names alone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from math import prod
from typing import Any, Protocol, TypeVar

from moecc.support.lazy import np
from moecc.types import F16, F32, F64, Array, DType, TensorType
from moecc.weights import draws as random
from moecc.weights.arithmetic import Add, Cast, Minimum, Moment, Mul, Scale, Select
from moecc.weights.draws import Normal, Subset, TruncatedNormal, Uniform
from moecc.weights.evaluate import TensorReader, evaluate
from moecc.weights.expr import Expr, Full, Source, source_types, transform
from moecc.weights.fits import Fitted, cluster_order, fitted_rows, matched_order
from moecc.weights.movement import (
    Aligned,
    Clusters,
    Concat,
    Index,
    Merge,
    Permutation,
    Permute,
    Rename,
    Slice,
    Split,
    Stack,
    Take,
    Tile,
)


def grow_weight(choices: Choices, type: TensorType) -> Expr:
    """Return an expression that makes a tensor of `type`."""
    kind = pick(choices, ("source", "tile", "permute", "stack", "scale", "normal"))
    if kind == "tile" and type.axes:
        axis = pick(choices, type.axes)
        part = _source(choices, type.without(axis.name))
        return Tile(part, axis.name, int(str(axis.size)), type.names.index(axis.name))
    if kind == "stack" and type.axes:
        axis = type.axes[0]
        inner = type.without(axis.name)
        return Stack(tuple(_source(choices, inner) for _ in range(int(str(axis.size)))), axis.name)
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
    stored = evaluate(weight, _Stored((weight,), seed))
    return stored.astype(np.float64) if weight.type.dtype.is_float else stored


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
        self.types = source_types(weights)

    def __call__(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        type = self.types[name]
        rng = generator(self.seed, "source", name)
        if not type.dtype.is_float:
            data = rng.integers(0, 2, type.shape).astype(type.dtype.numpy)
        else:
            # As stored: a checkpoint holds what its element type can say.
            data = rng.standard_normal(type.shape).astype(type.dtype.numpy).astype(np.float64)
            data = moved(data, self.step, self.seed, "source", name)
        return data[start:stop] if type.axes else data


def stored_sources(weights: Iterable[Expr], seed: int) -> TensorReader:
    """Return what reads random source tensors of several expressions, in their element types."""
    return _Stored(tuple(weights), seed)


class _Stored(_Sources):
    """Reads the same tensors in their own element types."""

    def __call__(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        return super().__call__(name, start, stop).astype(self.types[name].dtype.numpy)


# The meaning of weight expressions: whole tensors, in the plainest way.
#
# It shares no code with the evaluator and the simplifier, which are compared with it, but the
# functions that turn random words into numbers, that cluster, and that fit routers.


def whole_naively(expr: Expr, read: TensorReader) -> Array:
    """Return the tensor of `expr`.

    Args:
      expr: the expression; it is small.
      read: reads a whole source.
    """
    with np.errstate(all="ignore"):
        return _naive(expr, read)


def _naive(e: Expr, read: TensorReader) -> Array:
    x = [_naive(y, read) for y in e.operands]
    n = e.type.names
    match e:
        case Source():
            return read(e.name)
        case Full():
            return np.full(e.type.shape, e.value, np.float64).astype(e.type.dtype.numpy)
        case Normal() | TruncatedNormal() | Uniform() | Subset():
            return _draw(e)
        case Tile():
            return np.stack(x * e.size, axis=e.position)
        case Stack():
            return np.stack(x, axis=e.position)
        case Concat():
            return np.concatenate(x, axis=n.index(e.axis))
        case Index():
            return np.asarray(np.take(x[0], e.at, axis=e.x.type.names.index(e.axis)))
        case Slice():
            return np.take(x[0], range(e.start, e.stop), axis=n.index(e.axis))
        case Split() | Merge() | Rename():
            return x[0].reshape(e.type.shape)
        case Permute():
            return np.transpose(x[0], [e.x.type.names.index(name) for name in e.order])
        case Cast():
            return _cast(x[0], e.dtype)
        case Moment():
            return _moment(e, *x)
        case Take():
            return np.take(x[0], x[1], axis=n.index(e.axis))
        case Permutation():
            words = np.random.Philox(key=e.key).random_raw(e.type.shape[0])
            return np.argsort(words).astype(np.int32)
        case Clusters():
            return cluster_order(lambda a, b: x[0][a:b], len(x[0]), e.first, e.groups)
        case Aligned():
            rows = [np.moveaxis(v, y.type.names.index(e.axis), 0).astype(np.float64)
                    for v, y in zip(x, e.xs, strict=True)]  # fmt: skip
            neurons, half = np.arange(len(rows[0])), len(rows) // 2
            scores = [[sum(np.vdot(rows[n][i], rows[n + half][j]) for n in np.arange(half))
                       for i in neurons] for j in neurons]  # fmt: skip
            return matched_order(np.array(scores, np.float64))
        case Fitted():
            a, b, c = (v.astype(np.float64) for v in x)
            return fitted_rows(a, b, c, ridge=e.ridge, std=e.std)
    return _arithmetic(e, x)


def _arithmetic(e: Expr, x: list[Array]) -> Array:
    wide = [_cast(v, e.type.dtype) if v.dtype != bool else v for v in x]
    if isinstance(e, Scale):
        return np.asarray(wide[0] * wide[0].dtype.type(e.factor))
    a, b, *c = (_spread(v, y.type, e.type) for v, y in zip(wide, e.operands, strict=True))
    if isinstance(e, Add):
        return np.asarray(a + b)
    if isinstance(e, Mul):
        return np.asarray(a * b)
    if isinstance(e, Minimum):
        return np.where(np.isnan(a) | (a < b), a, b)
    assert isinstance(e, Select), f"an expression of a kind that is unknown here: {e}"
    return np.where(a, b, c[0])


def _spread(v: Array, small: TensorType, large: TensorType) -> Array:
    """Broadcast by looking up each element by the names of its axes."""
    spread = np.empty(large.shape, v.dtype)
    for position in np.ndindex(large.shape):
        by_name = dict(zip(large.names, position, strict=True))
        spread[position] = v[tuple(by_name[name] for name in small.names)]
    return spread


def _cast(v: Array, dtype: DType) -> Array:
    if v.dtype == np.float64 and dtype not in (F64, F32, F16):
        # Through extended precision there is no double rounding in these magnitudes.
        near = [_nearest(float(u), dtype) for u in v.ravel()]
        return np.array(near, dtype.numpy).reshape(v.shape)
    return v.astype(np.float32 if v.dtype.itemsize < 8 else np.float64).astype(dtype.numpy)


def _nearest(value: float, dtype: DType) -> Any:
    """Round a float64, by trying the neighbours of a first guess."""
    guess = np.array(value, np.float32).astype(dtype.numpy)
    raw = np.uint16 if dtype.itemsize_bytes == 2 else np.uint8
    bits = int(guess.view(raw))
    near = [raw(bits + d).view(dtype.numpy) for d in (-1, 0, 1) if bits + d >= 0]
    near = [v for v in near if np.isfinite(v) and np.signbit(v) == np.signbit(guess)]
    best = min(abs(float(v) - value) for v in near)
    ties = [v for v in near if abs(float(v) - value) == best]
    return min(ties, key=lambda v: int(v.view(raw)) & 1)


def _draw(e: Normal | TruncatedNormal | Uniform | Subset) -> Array:
    words = np.random.Philox(key=e.key).random_raw(prod(e.type.shape)).reshape(e.type.shape)
    if isinstance(e, Subset):
        at = e.type.names.index(e.axis)
        rank = np.argsort(np.argsort(words, axis=at), axis=at)
        return np.asarray(rank < e.count)
    if isinstance(e, Normal):
        return random.normal(words, e.mean, e.std)
    if isinstance(e, TruncatedNormal):
        return random.truncated_normal(words, e.std, e.bound)
    return random.uniform(words, e.low, e.high)


def _moment(e: Moment, x: Array, mask: Array | None = None) -> Array:
    t = e.x.type
    x = x.astype(np.float64)
    held = np.ones(x.shape, bool)
    if mask is not None and e.mask is not None:
        held = _spread(mask, e.mask.type, t)
    order = [t.names.index(name) for name in e.keep]
    order += [i for i in range(t.rank) if i not in order]
    x, held = x.transpose(order), held.transpose(order)
    moment = np.zeros(e.type.shape, np.float64)
    for position in np.ndindex(e.type.shape):
        count = int(held[position].sum())
        if count:
            moment[position] = _tree(np.where(held[position], x[position], 0.0)) / count
            if e.kind == "std":
                square = np.where(held[position], (x[position] - moment[position]) ** 2, 0.0)
                moment[position] = np.sqrt(_tree(square) / count)
    return moment.astype(e.type.dtype.numpy)


def _tree(v: Array) -> float:
    """Sum by halves, the last axis first."""
    if not v.ndim:
        return float(v)
    flat = [_tree(u) for u in v]
    while len(flat) > 1:
        half = len(flat) // 2
        odd = flat[2 * half :]
        flat = [a + b for a, b in zip(flat[:half], flat[half : 2 * half], strict=True)]
        if odd:
            flat[0] += odd[0]
    return flat[0]


def generator(seed: int, *words: str) -> np.random.Generator:
    """Return a generator that depends on `seed` and `words` alone."""
    # The name of a tensor may be half a surrogate, which JSON can escape.
    text = "\0".join(words).encode("utf-8", "surrogatepass")
    digest = hashlib.blake2b(text, digest_size=8).digest()
    return np.random.default_rng([seed, int.from_bytes(digest, "little")])


def moved(data: Array, step: float, seed: int, *words: str) -> Array:
    """Return `data`, in float64 and a step further in a direction that `words` decide.

    Where the step is 0, `data` itself: in its own element type.
    """
    if not step:
        return data
    direction = generator(seed, "direction", *words).standard_normal(data.shape)
    return np.asarray(data.astype(np.float64) + step * direction)


# Decisions that a generator makes, each between alternatives from simple to complex.

T = TypeVar("T")


class Choices(Protocol):
    """Where the decisions come from."""

    def below(self, count: int) -> int:
        """Return a number from 0 to `count` − 1; 0 is the simplest choice."""
        ...


class Decisions:
    """Decisions that a seed makes."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)

    def below(self, count: int) -> int:
        """Return a number from 0 to `count` − 1, each as likely."""
        return int(self._rng.integers(count))


def chance(choices: Choices, percent: int) -> bool:
    """Return whether something happens that happens in `percent` of all cases."""
    return choices.below(100) >= 100 - percent


def pick(choices: Choices, items: Sequence[T]) -> T:
    """Return one of `items`, which are ordered from simple to complex."""
    return items[choices.below(len(items))]
